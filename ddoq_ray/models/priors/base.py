"""Which kind of prior a folder holds: a table from diffusers' pipeline classes to what reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ddoq_ray.models.priors.base import Prior
from ddoq_ray.models.priors.class_conditional import ClassConditionalPrior

# `_class_name` of model_index.json -> reader(folder, index, device=, dtype=). A new kind of prior is a row.
LOADERS: dict[str, Callable[..., Prior]] = {
    "DiTPipeline": ClassConditionalPrior.from_folder,
    "DiffusionPipeline": ClassConditionalPrior.from_folder,  # parts that no pipeline of diffusers has, as train-prior's
}
