"""The YAML groups, and what a prior brings: a preset's settings, or those that its own folder holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ddoq_ray.config.latents import EncoderConfig
from ddoq_ray.config.models import PriorConfig
from ddoq_ray.config.paths import plain_path
from ddoq_ray.config.run import RunConfig
from ddoq_ray.config.schema import from_mapping
from ddoq_ray.config.synthesizer import SynthesizerConfig

PRIOR_JSON = "ddoq_prior.json"
OWN = "own"  # the choice for a prior that has no preset
ABLATION = "ablation/"  # experiments that change one thing of a run
AUTOENCODER = "autoencoder"  # the choice for a folder of an autoencoder alone
# What belongs to a prior: how it is run, and how a picture becomes its square.
BROUGHT = {
    "synthesizer": ("start", "strength", "steps", "guidance", "guide_until", "guide_scale", "guide_pool"),
    "encoder": ("resize",),
}
# Where the value is wrong, words; never used for values that a prior does not bring.
_CHECKED = {"synthesizer": SynthesizerConfig, "encoder": EncoderConfig}


def config_dir() -> Path:
    """The YAML groups: the copy inside an installed wheel, else the checkout's configs/."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "_configs", package.parent / "configs"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ValueError(f"no configuration files: expected them in {package / '_configs'} or {package.parent / 'configs'}")


@cache
def groups_of(cls: type) -> tuple[str, ...]:
    """The keys of a configuration whose value is a choice's name; an experiment chooses for a whole run."""
    fields = {f.name for f in dataclasses.fields(cls)} | ({"experiment"} if issubclass(cls, RunConfig) else set())
    return tuple(sorted(p.name for p in config_dir().iterdir() if p.is_dir() and p.name in fields))


@cache
def choices(group: str) -> tuple[str, ...]:
    """The names of a group's files; of those in a folder of it, such as experiment/ablation/, with the folder's."""
    folder = config_dir() / group
    names = (p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))
    return tuple(sorted(names, key=lambda name: ("/" in name, name)))


@cache
def preset_keys(group: str, name: str) -> dict[str, Any]:
    """The keys that a choice's file itself sets, dotted."""
    values = yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text()) or {}

    def leaves(part: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in part.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            elif key != "defaults":
                yield f"{prefix}{key}", value

    return dict(leaves(values, ""))


@cache
def prior_paths() -> dict[str, str]:
    """path -> name of each prior's preset."""
    found = {}
    for name in choices("prior"):
        chosen = yaml.safe_load((config_dir() / "prior" / f"{name}.yaml").read_text()) or {}
        path = chosen.get("prior", {}).get("path", PriorConfig.path)
        if path is not None:
            found[path] = name
    return found


def preset_of(path: str) -> str | None:
    """The preset of the prior at `path`: by its hub id (any revision), a copy of it under its own name, or its kind.

    >>> preset_of("facebook/DiT-XL-2-256@main"), preset_of("/models/DiT-XL-2-256/"), preset_of("my-prior")
    ('dit-xl-2-256', 'dit-xl-2-256', None)
    """
    known = prior_paths()
    if path in known:
        return known[path]
    parts = set(PurePosixPath(path.partition("@")[0]).parts)
    for hub_id, name in known.items():
        owner, slash, model = hub_id.partition("/")
        if slash and parts & {model, f"models--{owner}--{model}"}:
            return name
    return AUTOENCODER if _is_autoencoder(Path(plain_path(path))) else None


def _is_autoencoder(folder: Path) -> bool:
    if (folder / "model_index.json").exists():
        return False
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and str(config.get("_class_name")).startswith("Autoencoder")


def own_settings(path: str) -> dict[str, Any]:
    """What the folder of a prior says that it is run by: dotted keys and values; empty where it says nothing.

    Raises:
        ValueError: It says what no run can be given, naming the file.
    """
    file = Path(plain_path(path)) / PRIOR_JSON
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}  # a hub id, or a folder whose own loader has words for what is wrong
    found: dict[str, Any] = {}
    for group, allowed in BROUGHT.items():
        block = record.get(group) if isinstance(record, dict) else None
        if block is None:
            continue
        if not isinstance(block, dict) or set(block) - set(allowed):
            raise ValueError(f'{file}: expected "{group}" to hold some of {", ".join(allowed)}, got {block!r}')
        try:
            from_mapping(_CHECKED[group], block, f"{group}.")
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        found |= {f"{group}.{key}": value for key, value in block.items()}
    return found
