"""Training of the networks that a run takes: priors and teachers."""
