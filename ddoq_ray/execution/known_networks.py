"""Answers about networks, kept for later starts of a command: to load networks only to look at them takes ten seconds.

A file in the user's cache folder (`$XDG_CACHE_HOME/ddoq_ray`, else `~/.cache/ddoq_ray`) for each question, named by a
digest of all that its answer follows from: the question, names, sizes and times of the networks' files, the libraries'
versions, this package's own source, and the processor. Whatever cannot be read or written is as if it were not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ddoq_ray.provenance import hardware

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "torchvision", "diffusers", "transformers", "numpy", "safetensors", "ray")


def place_of(question: str, networks: Iterable[str]) -> Path | None:
    """The file of an answer; None where none is kept: for a network that is in no folder of this machine."""
    files: list[Any] = []
    for path in networks:
        shipped = path.startswith("shipped:")
        folder = PACKAGE / "models/weights" / path.removeprefix("shipped:") if shipped else Path(path).expanduser()
        if not folder.is_dir():  # a hub id, or torchvision's: what they mean may change elsewhere
            return None
        stats = [(p, p.stat()) for p in sorted(folder.rglob("*")) if p.is_file()]
        files.append([str(folder.resolve()), [(str(p), s.st_size, s.st_mtime_ns) for p, s in stats]])
    source = hashlib.sha256()
    for module in sorted(PACKAGE.rglob("*.py")):
        source.update(module.read_bytes())
    machine = [hardware(), platform.python_version(), os.environ.get("ATEN_CPU_CAPABILITY")]
    whole = [question, files, [_version(name) for name in LIBRARIES], source.hexdigest(), machine]
    name = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
    with contextlib.suppress(RuntimeError):  # a user without a home
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache) / "ddoq_ray" / "networks" / f"{name}.json"
    return None


def kept(place: Path | None) -> dict[str, Any] | None:
    """The facts that were kept, if any."""
    with contextlib.suppress(OSError, ValueError):
        if place is not None:
            return dict(json.loads(place.read_text()))
    return None


def keep(place: Path | None, facts: dict[str, Any]) -> None:
    """Keep facts, whole or not at all."""
    with contextlib.suppress(OSError):
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=place.parent, suffix=".part", delete=False) as file:
                file.write(json.dumps(facts))
            os.replace(file.name, place)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
