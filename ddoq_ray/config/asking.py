"""What belongs to the digits stays with the digits: for other data, what must be given is asked for in one message.

The digits' prior, teacher, student, protocol and synthesizer are the experiment that runs when nothing is asked. A run
of other data takes none of them unawares: `experiment=digits` takes them by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddoq_ray.config.presets import ABLATION, AUTOENCODER, OWN, own_settings, preset_keys, preset_of
from ddoq_ray.config.run import RunConfig

ELSEWHERE = ("ddoq-sqrt", "d4m", "random")  # baselines: `full` holds all real images in memory

Given = Mapping[str, Any]  # key -> value as given; the last one where a key is given twice

_EXAMPLES = {
    "prior": "prior.path=FOLDER (a prior in diffusers' format, a hub id, or what "
    "`ddoq-ray train-prior` wrote), prior=dit-xl-2-256 for ImageNet's classes, or prior=sd-1-5, asked by their names",
    "teacher": "teacher.path=FOLDER (what `ddoq-ray train-teacher` wrote), or teacher.path=torchvision:resnet18 for "
    "ImageNet's classes",
    "student": "student=resnet18 (or resnet18-small, convnet3, ... for small images)",
    "protocol": "protocol=ddoq-v1 (the paper's, for 224 px), protocol=d4m, or protocol=digits for small images",
}
_MEASURING = ("label", "train", "evaluate", "report")
_NEEDS = {
    "prior": ("encode", "quantize", "synthesize", *_MEASURING),
    "teacher": _MEASURING,
    "student": _MEASURING,
    "protocol": _MEASURING,
}
_OWN_KEYS = {"prior": ("prior.path",), "teacher": ("teacher.path",), "student": ("student.arch", "student.image_size")}


def own_data(given: Given) -> bool:
    """Whether other data than the digits is asked for, and no experiment by name that brings its settings."""
    if given.get("experiment") is not None and ablation_of(given) is None:
        return False
    kinds = {given.get("dataset", "digits"), given.get("dataset.source", "digits")}
    return bool(kinds - {"digits"}) or any(
        given.get(key) is not None for key in ("dataset.path", "dataset.torchvision")
    )


def ablation_of(given: Given) -> Mapping[str, Any] | None:
    """The keys that an ablation changes, dotted; None where no ablation is asked for.

    An ablation changes one thing of a run, on whatever data and with whatever networks: it brings neither.
    """
    name = str(given.get("experiment") or "")
    return preset_keys("experiment", name) if name.startswith(ABLATION) else None


def implied(given: Given) -> list[tuple[str, Any]]:
    """What comes before the user's own overrides: what a prior brings, and nothing of the digits for other data.

    Raises:
        ValueError: The folder of a prior says something that no run can be given.
    """
    ablated = ablation_of(given) or {}  # what an ablation changes comes after what a prior brings
    before = [(key, value) for key, value in _of_prior(given) if key not in ablated]
    if own_data(given):
        if "baselines" not in {*given, *ablated}:
            before.append(("baselines", ELSEWHERE))
        if "prior" not in given and given.get("prior.path") is None:
            before.append(("prior", OWN))
        if given.get("teachers") or not _chosen("teacher", given):
            before.append(("teacher.path", None))
    return before


def _of_prior(given: Given) -> list[tuple[str, Any]]:
    """What belongs to the prior that `prior.path` names, where no preset is named with it.

    An experiment's own prior may lie elsewhere, such as a copy of a hub's: what it says then holds, unless the folder
    or its name says more. The digits' experiment says nothing of other priors.
    """
    path, named = given.get("prior.path"), given.get("prior")
    if path is None or named not in (None, OWN):
        return []
    own, preset = own_settings(path), preset_of(path)
    if not own and preset is None and given.get("experiment") not in (None, "digits"):
        return []
    choice = OWN if preset is None or (own and preset != AUTOENCODER) else preset
    return [*([("prior", choice)] if named is None else []), *own.items()]


def ask(config: RunConfig, given: Given) -> None:
    """Name all that the wanted stages need and that was not given.

    Raises:
        ValueError: Something is missing.
    """
    if not own_data(given):
        return
    missing = [g for g, stages in _NEEDS.items() if set(stages) & set(config.stages) and not _chosen(g, given)]
    if missing:
        measured = [s for s in config.stages if s != "prepare"]
        lines = [f"{group}: {_EXAMPLES[group]}" for group in missing]
        raise ValueError(
            f"{', '.join(measured)} of this data need what only the digits have by default. Not given:\n  "
            + "\n  ".join(lines)
            + "\nGive them, ask for less (`ddoq-ray prepare ...`), or take the digits' own by name: experiment=digits"
        )


def _chosen(group: str, given: Given) -> bool:
    if given.get(f"{group}s"):  # of a comparison, which lists them
        return True
    if group in given and (group, given[group]) != ("prior", OWN):
        return True
    return all(given.get(key) is not None for key in _OWN_KEYS.get(group, (group,)))
