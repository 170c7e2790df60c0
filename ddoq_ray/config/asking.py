"""What belongs to the digits stays with the digits: for other data, what must be given is asked for in one message.

The digits' prior, teacher, student, protocol and synthesizer are the experiment that runs when nothing is asked. A run
of other data takes none of them unawares: `experiment=digits` takes them by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddoq_ray.config.paths import plain_path
from ddoq_ray.config.run import RunConfig

# For a prior that brings no preset: D4M's noise strength and 50 steps; guidance by whether there is a null label.
GENERIC = {"start": "noised", "strength": 0.7, "steps": 50, "guidance": None}
ELSEWHERE = "[ddoq-sqrt,d4m,random]"  # baselines: `full` holds all real images in memory

_EXAMPLES = {
    "prior": "prior.path=FOLDER (a class-conditional prior in diffusers' format, a hub id, or what "
    "`ddoq-ray train-prior` wrote) or prior=dit-xl-2-256 for ImageNet's classes",
    "teacher": "teacher.path=FOLDER (what `ddoq-ray train-teacher` wrote), or teacher.path=torchvision:resnet18 for "
    "ImageNet's classes",
    "student": "student=resnet18 (or resnet18-small, convnet3, ... for small images)",
    "protocol": "protocol=ddoq-v1 (the paper's, for 224 px), protocol=d4m, or protocol=digits for small images",
}
_NEEDS = {
    "prior": ("encode", "quantize", "synthesize", "label", "train", "evaluate", "report"),
    "teacher": ("label", "train", "evaluate"),
    "student": ("label", "train", "evaluate"),
    "protocol": ("label", "train", "evaluate"),
}
_OWN_KEYS = {"prior": ("prior.path",), "teacher": ("teacher.path",), "student": ("student.arch", "student.image_size")}


def key_of(override: str) -> tuple[str, str]:
    """(key, value) of `key=value`."""
    key, _, value = override.lstrip("+").partition("=")
    return key, value


def own_data(overrides: Sequence[str]) -> bool:
    """Whether other data than the digits is asked for, and no experiment by name that brings its settings."""
    given = dict(map(key_of, overrides))
    if given.get("experiment", "null") != "null":
        return False
    kinds = {given.get("dataset", "digits"), given.get("dataset.source", "digits")}
    return bool(kinds - {"digits"}) or any(
        given.get(key, "null") != "null" for key in ("dataset.path", "dataset.torchvision")
    )


def implied(overrides: Sequence[str]) -> list[str]:
    """What comes before the user's own overrides when the data is not the digits."""
    if not own_data(overrides):
        return []
    given = dict(map(key_of, overrides))
    before = [] if "baselines" in given else [f"baselines={ELSEWHERE}"]
    if "prior" not in given:
        preset = GENERIC | _preset(plain_path(given.get("prior.path", "").strip("'\"")))
        before += [f"synthesizer.{key}={'null' if value is None else value}" for key, value in preset.items()]
    return before + [f"{group}.path=null" for group in ("prior", "teacher") if not _chosen(group, given)]


def ask(config: RunConfig, overrides: Sequence[str]) -> None:
    """Name all that the wanted stages need and that was not given.

    Raises:
        ValueError: Something is missing.
    """
    if not own_data(overrides):
        return
    given = dict(map(key_of, overrides))
    missing = [g for g, stages in _NEEDS.items() if set(stages) & set(config.stages) and not _chosen(g, given)]
    if missing:
        measured = [s for s in config.stages if s != "prepare"]
        lines = [f"{group}: {_EXAMPLES[group]}" for group in missing]
        raise ValueError(
            f"{', '.join(measured)} of this data need what only the digits have by default. Not given:\n  "
            + "\n  ".join(lines)
            + "\nGive them, ask for less (`ddoq-ray prepare ...`), or take the digits' own by name: experiment=digits"
        )


def _chosen(group: str, given: dict[str, str]) -> bool:
    return group in given or all(key in given for key in _OWN_KEYS.get(group, (group,)))


def _preset(path: str) -> dict[str, Any]:
    """The `synthesizer` block that a prior's own folder holds; empty without one."""
    try:
        block = json.loads((Path(path) / "ddoq_prior.json").read_text()).get("synthesizer", {}) if path else {}
    except (OSError, ValueError, AttributeError):
        return {}  # a hub id, or a folder whose own loader has words for what is wrong
    return {key: block[key] for key in GENERIC if key in block} if isinstance(block, dict) else {}
