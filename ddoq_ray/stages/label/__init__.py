"""Soft labels of the images by a teacher that is checked first."""
