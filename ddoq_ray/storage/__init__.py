"""Files: how they are reached, the run directory and a module a format; no Ray."""
