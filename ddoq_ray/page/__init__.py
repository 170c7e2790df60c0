"""The report page: pure functions from the results dictionary and the images to text; no Ray, no I/O."""

from ddoq_ray.page.render import render_page
from ddoq_ray.page.tables import METHODS, accuracy_table

__all__ = ["METHODS", "accuracy_table", "render_page"]
