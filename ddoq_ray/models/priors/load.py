"""Which kind of prior a folder holds: a table from diffusers' pipeline classes to what reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ddoq_ray.models.folders import read_json, resolve_folder
from ddoq_ray.models.priors.base import Prior
from ddoq_ray.models.priors.class_conditional import ClassConditionalPrior

# `_class_name` of model_index.json -> reader(folder, index, device=, dtype=). A new kind of prior is a row.
LOADERS: dict[str, Callable[..., Prior]] = {
    "DiTPipeline": ClassConditionalPrior.from_folder,
    "DiffusionPipeline": ClassConditionalPrior.from_folder,  # parts that no pipeline of diffusers has, as train-prior's
}


def load_prior(path: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: str = "float32") -> Prior:
    """Load a prior from a folder in diffusers' format, `shipped:<name>`, or a Hugging Face id.

    Args:
        path: a folder of model_index.json, vae/, unet/ or transformer/, scheduler/, as DiTPipeline saves.
        device: where it runs.
        dtype: "float32", "float16" or "bfloat16": the networks' arithmetic. Latents stay float32.

    Raises:
        ValueError: the folder is missing, incomplete, of an unknown kind, or its parts do not fit together.
    """
    folder = resolve_folder(path, "prior")
    index = read_json(folder / "model_index.json", "prior")
    return _reader(folder, index)(folder, index, device=device, dtype=dtype)


def _reader(folder: Path, index: dict[str, Any]) -> Callable[..., Prior]:
    name = str(index.get("_class_name"))
    if name not in LOADERS:
        told = "a text-conditional pipeline" if "text_encoder" in index else "a pipeline"
        raise ValueError(f"prior: {folder} is {told} of the class {name}; this version reads {', '.join(LOADERS)}")
    return LOADERS[name]
