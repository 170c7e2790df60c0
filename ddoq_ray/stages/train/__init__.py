"""Students on the distilled sets, in one Ray Train run."""
