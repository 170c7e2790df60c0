"""``python -m ddoq_ray``: the same as the command ``ddoq-ray``."""

from ddoq_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
