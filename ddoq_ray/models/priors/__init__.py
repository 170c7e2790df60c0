"""Latent diffusion: a module a kind of prior, and the table that loads them."""
