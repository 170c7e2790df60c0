"""Model folders: where one is found, how one is published, and the digest that names its content."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch

SHIPPED = Path(__file__).parent / "weights"
_SHIPPED_PREFIX = "shipped:"
_UNREAD = ("safety_checker", "feature_extractor", "image_encoder")
# Not those of half precision ("model.fp16"), or of before averaging ("model.non_ema").
_OWN_WEIGHTS = re.compile(r"(diffusion_pytorch_|pytorch_)?model(-\d+-of-\d+)?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def resolve_folder(path: str | os.PathLike[str], what: str) -> Path:
    """Find a model folder on this machine, downloading it only when `path` is a Hugging Face id.

    Args:
        path: a folder, `shipped:<name>` for the weights inside this package, or a Hugging Face id
            `owner/name[@revision]` (an existing folder of that name wins).
        what: the noun for messages, such as "prior".

    Raises:
        ValueError: no such folder, or the hub could not be read.
    """
    text = os.fspath(path)
    if text.startswith(_SHIPPED_PREFIX):
        folder = SHIPPED / text.removeprefix(_SHIPPED_PREFIX)
        if not folder.is_dir():
            names = sorted(entry.name for entry in SHIPPED.glob("*/"))
            raise ValueError(f"{what}: this package ships {names}, but {text!r} was asked for")
        return folder
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if _HUB_ID.fullmatch(text):
        return _download(text, what)
    raise ValueError(
        f"{what}: expected a folder, shipped:<name> or a Hugging Face id owner/name[@revision], "
        f"but {text!r} is no existing folder; check the path as the worker sees it"
    )


def _download(hub_id: str, what: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    wanted = ["*.json", "*/*.json", "*/*.txt", "*.safetensors", "*/*.safetensors", "*/*.bin"]
    try:
        try:
            there = snapshot_download(name, revision=revision or None, dry_run=True)
            wanted = files_read([file.filename for file in there])
        except OSError:  # no network: what an earlier download left may do
            pass
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # hub errors are OSErrors, a bad repository name a ValueError
        raise ValueError(
            f"{what}: {hub_id!r} is no existing folder and could not be read from the Hugging Face hub "
            f"({error}); download it where there is a network and give the folder"
        ) from error


def files_read(names: Iterable[str]) -> list[str]:
    """Of a repository's files those that a model is read from: configurations, and one form of the weights a folder.

    Stable Diffusion's repositories hold each network in six forms, and two whole checkpoints beside them: 40 GB, of
    which 4 are read.
    """
    folders: dict[str, list[PurePosixPath]] = {}
    for path in map(PurePosixPath, names):
        folders.setdefault(path.parent.as_posix(), []).append(path)
    parts = any(path.name == "model_index.json" for path in folders.get(".", []))
    found: list[PurePosixPath] = []
    for folder, paths in folders.items():
        if "/" in folder or folder in _UNREAD:
            continue
        found += [path for path in paths if path.suffix in (".json", ".txt")]
        weights = [path for path in paths if path.suffix in (".safetensors", ".bin")]
        if not (parts and folder == "."):
            own = [path for path in weights if _OWN_WEIGHTS.fullmatch(path.stem)] or weights
            found += [path for path in own if path.suffix == ".safetensors"] or own
    return sorted(path.as_posix() for path in found)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`; a ValueError names the file when it is missing or is not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{what}: expected the file {path.name} in {path.parent}, found none") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}: {path} is not valid JSON ({error})") from error
    except OSError as error:
        raise ValueError(f"{what}: {path} cannot be read: {error.strerror or error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected a JSON object in {path}, got {type(value).__name__}")
    return value


def first_line(error: BaseException) -> str:
    """What another library says of an error, in a line; its kind, where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as stable, readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def content_digest(configs: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """16 hex digits that name a model: its configuration and the float32 values of its tensors.

    Values, not files, are hashed: the same weights saved as .bin or .safetensors, in one file or in shards,
    are one model. Keys starting with "_" (library version, original location) are left out, except the
    class's name.
    """
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps(_without_private(configs), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu")
        if tensor.is_floating_point():
            tensor = tensor.float()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _without_private(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_private(v) for k, v in value.items() if not k.startswith("_") or k == "_class_name"}
    return value


@contextmanager
def published_folder(out: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` by one rename when the block ends without an error.

    Raises:
        ValueError: `out` exists already and `overwrite` is false.
    """
    target = Path(out)
    check_free(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    work.chmod(0o755)  # mkdtemp makes it private; a model is read by other users of a cluster
    try:
        yield work
        for path in work.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes private files
        check_free(target, overwrite=overwrite)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old / target.name)
            os.replace(work, target)
            shutil.rmtree(old)
        else:
            os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_free(out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise a ValueError if `out` exists and may not be replaced; so call it before hours of training."""
    if Path(out).exists() and not overwrite:
        raise ValueError(f"{out} exists already: give another folder, remove it, or ask to overwrite it")
