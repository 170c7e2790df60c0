"""Configuration: frozen dataclasses own names, types, defaults, words and checks; configs/*.yaml choose values."""

from ddoq_ray.config.run import METHODS, STAGES, RunConfig

__all__ = ["METHODS", "STAGES", "RunConfig"]
