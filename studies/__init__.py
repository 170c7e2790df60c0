"""Measurements of the method: the paper's theory, the digits at three sizes, where synthesis starts."""
