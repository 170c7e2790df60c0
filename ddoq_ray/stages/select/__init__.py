"""Baselines of real images: a module a way to choose, named as its method is."""
