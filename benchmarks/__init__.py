"""Measurements, one module each: ``python -m benchmarks.<name> [--json FILE]``; results are kept in results/."""
