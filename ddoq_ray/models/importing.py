"""Classifiers that others trained, as this package's own: their tensors, never code, under its networks' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ddoq_ray.config.importing import ImportTeacherConfig
from ddoq_ray.models.architectures import is_import_path
from ddoq_ray.models.classifiers import (
    CONFIG_JSON,
    IMAGENET,
    TORCHVISION_PREFIX,
    Classifier,
    Normalisation,
    build_classifier,
    check_answers,
    load_classifier,
    weights_file,
)
from ddoq_ray.models.folders import read_json, resolve_folder
from ddoq_ray.models.weights_files import check_finite, check_not_pointers, fit_names, read_tensors


def import_classifier(asked: ImportTeacherConfig, classes: Sequence[str] | None = None) -> Classifier:
    """The network that the keys tell of, in eval mode, float32.

    Args:
        asked: See `ImportTeacherConfig`; `source` is given.
        classes: Names in the order of the outputs.

    Raises:
        ValueError: The weights are missing, damaged, or of another network; or what the network expects is not told.
    """
    source = str(asked.source)
    if source.startswith(TORCHVISION_PREFIX):
        return load_classifier(source)
    file, told = _found(source)
    arch, size = asked.arch or told.get("arch"), asked.image_size or told.get("image_size")
    missing = [key for key, value in (("arch", arch), ("image_size", size)) if value is None]
    if missing:
        raise ValueError(
            f"import-teacher: {file} does not say its {' and '.join(missing)}; give {'=... '.join(missing)}=..."
        )
    assert arch is not None and size is not None
    if is_import_path(arch):
        raise ValueError(
            f"import-teacher: arch={arch}: a teacher is of one of the architectures that are known by name"
        )
    tensors = read_tensors(file, "classifier")
    check_finite(tensors, f"classifier: {file}")
    where = f"import-teacher: {file} as {arch}"
    model = build_classifier(arch, _outputs(tensors, where), int(size), _normalisation(asked, told), classes=classes)
    wanted = model.state_dict()
    model.load_state_dict(
        fit_names(tensors, wanted, where) if asked.match == "names" else _in_order(tensors, wanted, where)
    )
    try:
        check_answers(model.eval(), arch, int(size))
    except ValueError as error:
        raise ValueError(f"import-teacher: {error}") from error
    return model


def _found(source: str) -> tuple[Path, dict[str, Any]]:
    """The file of tensors, and what the folder around it says of the network."""
    if Path(source).is_file():
        return Path(source), {}
    folder = resolve_folder(source, "classifier")
    check_not_pointers(folder, "classifier")
    told = read_json(folder / CONFIG_JSON, "classifier") if (folder / CONFIG_JSON).is_file() else {}
    return weights_file(folder), _as_timm_says(told) if "architecture" in told else told


def _as_timm_says(config: Mapping[str, Any]) -> dict[str, Any]:
    """timm's config.json in this package's words."""
    of = config.get("pretrained_cfg") or config
    found = {"arch": config["architecture"], "mean": of.get("mean"), "std": of.get("std")}
    size = of.get("input_size")
    return {k: v for k, v in found.items() if v is not None} | ({"image_size": int(size[-1])} if size else {})


def _normalisation(asked: ImportTeacherConfig, told: Mapping[str, Any]) -> Normalisation:
    mean, std = (asked.mean, asked.std) if asked.mean is not None else (told.get("mean"), told.get("std"))
    return IMAGENET if mean is None or std is None else Normalisation(tuple(mean), tuple(std))


def _outputs(tensors: Mapping[str, Tensor], where: str) -> int:
    """C: rows of the last matrix, which is the head's."""
    matrices = [t for t in tensors.values() if t.ndim == 2]
    if not matrices:
        raise ValueError(f"{where}: no matrix among its {len(tensors)} tensors, which the last layer must have")
    return int(matrices[-1].shape[0])


def _in_order(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Tensors under the names of `wanted`, the first for the first, where all their shapes fit.

    Raises:
        ValueError: naming the first pair that does not fit.
    """
    if len(tensors) != len(wanted):
        raise ValueError(f"{where}: it holds {len(tensors)} tensors, and the network {len(wanted)}; is it another one?")
    for (theirs, tensor), (ours, own) in zip(tensors.items(), wanted.items(), strict=True):
        if tensor.shape != own.shape:
            raise ValueError(
                f"{where}: {theirs} {list(tensor.shape)} stands where {ours} {list(own.shape)} is; another network?"
            )
    return dict(zip(wanted, tensors.values(), strict=True))
