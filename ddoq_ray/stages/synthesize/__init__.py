"""Codebooks to image shards, and real images for the baselines that choose some."""
