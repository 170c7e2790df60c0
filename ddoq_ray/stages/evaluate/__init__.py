"""Students on the real validation images."""
