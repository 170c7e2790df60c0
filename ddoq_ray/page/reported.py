"""Figures that papers report, from ``reported.yaml`` beside this file; for a column of their own, with sources."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, TypedDict

import yaml

WHOLE = 0  # the ipc of the whole training set in the file


class Reported(TypedDict):
    """A published figure.

    Attributes:
        top1_pct: In percent.
        protocol: How the paper trained, in words.
        source: The paper.
    """

    top1_pct: float
    protocol: str
    source: str


@cache
def _entries() -> Sequence[Mapping[str, Any]]:
    text = resources.files("ddoq_ray.page").joinpath("reported.yaml").read_text(encoding="utf-8")
    return tuple(yaml.safe_load(text))


def reported(dataset: str, line: Mapping[str, Any]) -> list[Reported]:
    """What papers report of a line of a comparison: the same data, student, kind of labels, method and ipc.

    >>> [found["top1_pct"] for found in reported("CIFAR-10", {
    ...     "student": "convnet3", "labels": "soft", "method": "random", "ipc": 10})]
    [46.3]
    """
    ipc = WHOLE if line["ipc"] is None else line["ipc"]
    return [
        {"top1_pct": float(entry["top1_pct"][ipc]), "protocol": str(entry["protocol"]), "source": str(entry["source"])}
        for entry in _entries()
        if _plain(entry["dataset"]) == _plain(dataset)
        and all(entry[key] == line[key] for key in ("student", "labels", "method"))
        and ipc in entry["top1_pct"]
    ]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
