"""Files of weights as others leave them: prefixes, wrappers, half precision only, pointers, damaged numbers."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

ENDINGS = (".safetensors", ".bin", ".pth", ".pt")
_PREFIXES = ("module.", "_orig_mod.", "model.", "ema_model.", "ema.", "net.", "backbone.")
_WRAPPERS = ("ema_state_dict", "model_ema", "state_dict", "model_state_dict", "model")
_POINTER = b"version https://git-lfs"


def check_not_pointers(folder: Path, what: str) -> None:
    """Refuse the little texts that git leaves in place of weights where git-lfs was not installed."""
    for path in sorted(folder.glob("*")):
        small = path.suffix in ENDINGS and path.is_file() and path.stat().st_size < 1024
        if small and path.read_bytes().startswith(_POINTER):
            raise ValueError(
                f"{what}: {path} is a git-lfs pointer, not the weights; run `git lfs pull` in that folder, or "
                "download the file itself"
            )


def variant_of(folder: Path) -> str | None:
    """ "fp16" where a folder holds its weights in half precision only, which diffusers must be told."""
    weights = [p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin")]
    return "fp16" if weights and all(".fp16" in name for name in weights) else None


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights with NaN or infinite values: what such a network makes is black, or noise, in silence."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{where}: the tensor {name} holds {int((~torch.isfinite(tensor)).sum())} NaN or infinite values; "
                "the file is damaged, or was saved from a diverged training: take another copy"
            )


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a file, out of the dictionaries that trainers wrap them in.

    Raises:
        ValueError: when it does not read as tensors alone; code in a pickle is never run.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        value: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{what}: {path} does not read as a file of tensors ({first}); save the state dict alone, best as "
            "model.safetensors"
        ) from error
    while isinstance(value, Mapping) and not any(isinstance(v, Tensor) for v in value.values()):
        inner = next((value[key] for key in _WRAPPERS if isinstance(value.get(key), Mapping)), None)
        if inner is None:
            break
        value = inner
    found = {str(k): v for k, v in value.items() if isinstance(v, Tensor)} if isinstance(value, Mapping) else {}
    if not found:
        raise ValueError(f"{what}: {path} holds no tensors by name; expected a state dict")
    return found


def fit_names(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Tensors under the names of `wanted` (trunk... and head...), whichever wrapper or torchvision named them.

    Raises:
        ValueError: in one line, when names or shapes do not fit.
    """
    named = _without_prefixes(tensors, wanted)
    if not set(named) & set(wanted):
        renamed = {f"trunk.{key}": value for key, value in named.items()}
        rest = sorted(key for key in renamed if key not in wanted)
        head = {key.rpartition(".")[0] for key in rest}
        if len(head) == 1:  # the one layer that the trunk has not: fc, classifier.1, heads.head, ...
            renamed |= {f"head.{key.rpartition('.')[2]}": renamed.pop(key) for key in rest}
        named = renamed
    absent, extra = sorted(set(wanted) - set(named)), sorted(set(named) - set(wanted))
    shapes = [k for k in wanted if k in named and named[k].shape != wanted[k].shape]
    if absent or extra or shapes:
        kinds = ((absent, "tensors lacking"), (extra, "unknown"), (shapes, "of another shape"))
        parts = [f"{len(k)} {w} ({', '.join(k[:2])}{', ...' if len(k) > 2 else ''})" for k, w in kinds if k]
        raise ValueError(f"{where} does not fit its config.json: {'; '.join(parts)}; is it of another architecture?")
    return named


def _without_prefixes(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = dict(tensors)
    for key in ("n_averaged", "ema.n_averaged"):  # torch's AveragedModel counts beside the weights
        if key not in wanted:
            named.pop(key, None)
    while not set(named) <= set(wanted):
        prefix = next((p for p in _PREFIXES if named and all(k.startswith(p) for k in named)), None)
        if prefix is None:
            return named
        named = {key.removeprefix(prefix): value for key, value in named.items()}
    return named
