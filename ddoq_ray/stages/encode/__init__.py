"""Shards to the latent log, and the validation images to theirs."""
