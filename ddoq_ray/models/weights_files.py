"""Files of weights as others leave them: prefixes, wrappers, half precision only, pointers, damaged numbers."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddoq_ray.models.folders import first_line

ENDINGS = (".safetensors", ".bin", ".pth", ".pt")
# Averaged weights first: what a trainer that keeps them evaluates and publishes.
_WRAPPERS = ("ema_state_dict", "state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
_COUNTED = "num_batches_tracked"  # steps of a batch norm's training: nothing that it computes by
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)|loading `?([\w.]+)`?")
_SHARD = re.compile(r"-\d+-of-\d+")
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
    """Such as "fp16", where a folder holds its weights in that variant only, which diffusers must be told.

    Where it holds several and none plain, that of a known precision comes first, then the first by name.
    """
    found = {_variant(p) for p in folder.glob("*") if p.suffix in (".safetensors", ".bin")}
    if not found or "" in found:
        return None
    return next((v for v in ("fp16", "bf16") if v in found), min(found))


def is_safetensors(folder: Path, variant: str | None) -> bool:
    """Whether that variant of a folder's weights is there as safetensors; else as .bin."""
    return any(_variant(path) == (variant or "") for path in folder.glob("*.safetensors"))


def _variant(path: Path) -> str:
    """ "fp16" of model-00001-of-00002.fp16.safetensors; "" of model.bin."""
    return _SHARD.sub("", path.stem).partition(".")[2]


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
        raise ValueError(
            f"{what}: {path} does not read as a file of tensors ({_told(error)}); save the network's state_dict() "
            "alone, best as model.safetensors"
        ) from error
    while (inner := _inside(value)) is not None:
        value = inner
    found = {str(k): v for k, v in value.items() if isinstance(v, Tensor)} if isinstance(value, Mapping) else {}
    if not found:
        raise ValueError(f"{what}: {path} holds no tensors by name; expected a state dict")
    return found


def _told(error: Exception) -> str:
    """What is wrong with a file, without torch's advice to run the code in it."""
    text = str(error).strip()
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text:
        found = _GLOBAL.search(text)
        kind = f", such as {found[1] or found[2]}" if found else ""
        return f"it holds objects beside tensors{kind}, and code in a file of weights is never run"
    return first_line(error)


def _inside(value: Any) -> Any:
    """The dictionary that a trainer's holds the weights in; None where it is they that it holds."""
    if not isinstance(value, Mapping):
        return None
    for key in _WRAPPERS:
        if isinstance(value.get(key), Mapping):
            return value[key]
    inner = [v for v in value.values() if isinstance(v, Mapping) and any(isinstance(t, Tensor) for t in v.values())]
    return inner[0] if len(inner) == 1 else None


def fit_names(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Tensors under the names of `wanted` (trunk... and head...), whichever wrapper or torchvision named them.

    Raises:
        ValueError: in one line, when names or shapes do not fit.
    """
    named = _without_prefixes(tensors, wanted)
    named = {key if key in wanted else f"trunk.{key}": value for key, value in named.items()}
    rest = sorted(key for key in named if key not in wanted)
    head = {key.rpartition(".")[0] for key in rest}
    if len(head) == 1 and "head.weight" not in named:  # the one layer that the trunk has not: fc, heads.head, ...
        named |= {f"head.{key.rpartition('.')[2]}": named.pop(key) for key in rest}
    named |= {key: t for key, t in wanted.items() if key not in named and key.endswith(_COUNTED)}
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
        first = {key.partition(".")[0] for key in named}  # module, _orig_mod, model, student, ...: the wrapper's own
        if len(first) != 1 or not all("." in key for key in named):
            return named
        named = {key.partition(".")[2]: value for key, value in named.items()}
    return named
