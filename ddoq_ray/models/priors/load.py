"""Which kind of prior a folder holds: a table from diffusers' pipeline classes to what reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddoq_ray.models.autoencoder import KINDS
from ddoq_ray.models.folders import read_json, resolve_folder
from ddoq_ray.models.priors.autoencoder import AutoencoderPrior, is_autoencoder
from ddoq_ray.models.priors.base import Prior
from ddoq_ray.models.priors.class_conditional import ClassConditionalPrior
from ddoq_ray.models.priors.loading import Loading
from ddoq_ray.models.priors.stable_diffusion import StableDiffusionPrior

# `_class_name` of model_index.json -> reader(folder, index, how). A new kind of prior is a row.
LOADERS: dict[str, Callable[[Path, dict[str, Any], Loading], Prior]] = {
    "StableDiffusionPipeline": StableDiffusionPrior.from_folder,
    "StableDiffusionImg2ImgPipeline": StableDiffusionPrior.from_folder,
    "DiTPipeline": ClassConditionalPrior.from_folder,
    "DiffusionPipeline": ClassConditionalPrior.from_folder,  # parts that no pipeline of diffusers has, as train-prior's
}


def load_prior(path: str | os.PathLike[str], **how: Any) -> Prior:
    """Load a prior from a folder in diffusers' format, `shipped:<name>`, or a Hugging Face id.

    Args:
        path: a folder of model_index.json, vae/, unet/ or transformer/, scheduler/, as diffusers' pipelines save, or a
            folder of an autoencoder alone.
        how: what of it is taken and how it runs: the attributes of `Loading`, by name.

    Raises:
        ValueError: the folder is missing, incomplete, of an unknown kind, its parts do not fit together, or the kind
            cannot follow `how`.
    """
    loading = Loading(**how)
    folder = resolve_folder(path, "prior")
    if loading.autoencoder_only or is_autoencoder(folder):
        return AutoencoderPrior.from_folder(folder, loading)
    _check_whole(folder)
    index = read_json(folder / "model_index.json", "prior")
    return _reader(folder, index)(folder, index, loading)


def _check_whole(folder: Path) -> None:
    """Refuse a network alone by its own name: that no model_index.json is there says little of it."""
    if (folder / "model_index.json").exists() or not (folder / "config.json").is_file():
        return
    kind = read_json(folder / "config.json", "prior").get("_class_name")
    raise ValueError(
        f"prior: expected the file model_index.json in {folder}, and vae/, unet/ or transformer/ and scheduler/ by it "
        f"as diffusers' pipelines save, or one of {', '.join(sorted(KINDS))} alone; found a {kind} alone"
    )


def _reader(folder: Path, index: dict[str, Any]) -> Callable[[Path, dict[str, Any], Loading], Prior]:
    name = str(index.get("_class_name"))
    if name not in LOADERS:
        told = "a text-conditional pipeline" if "text_encoder" in index else "a pipeline"
        raise ValueError(
            f"prior: {folder} is {told} of the class {name}; this version reads {', '.join(LOADERS)}, and of any "
            "with a vae/ the autoencoder (prior=autoencoder)"
        )
    return LOADERS[name]
