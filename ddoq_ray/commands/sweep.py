"""``--multirun``: a configuration for each combination of several values, each with a folder of its own."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any, get_origin

from ddoq_ray.commands.table import Command
from ddoq_ray.config.grammar import kind_of

_TOP_LEVEL = re.compile(r"""((?:[^,\[\](){}'"]|\[[^\]]*\]|\([^)]*\)|\{[^}]*\}|'[^']*'|"[^"]*")+)""")


def configurations(command: Command, overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """(what is special of it, configuration) of each run, all checked before the first one begins.

    A folder's name gets the swept keys and values that it does not show already: ipc is in a run's default name.

    Raises:
        ValueError: A configuration is wrong, or two would write to one folder.
    """
    texts = [_values(command, override) for override in overrides]
    found: list[tuple[str, Any]] = []
    for words in itertools.product(*texts):
        swept = [word for word, several in zip(words, texts, strict=True) if len(several) > 1]
        config = command.compose(words)
        hidden = {command.place, *(["ipc"] if getattr(config, command.place) is None else [])}
        parts = [w for w in swept if w.partition("=")[0].strip() not in hidden]
        if parts:
            name = "".join("-" + re.sub(r"[^\w.]+", "-", w.replace(" ", "")).strip("-") for w in parts)
            config = dataclasses.replace(config, **{command.place: config.folder.rstrip("/") + name})
        found.append((" ".join(swept), config))
    folders = [config.folder for _, config in found]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"two runs of this sweep would write to {folder}; sweep over {command.place} too, or less")
    return found


def _values(command: Command, override: str) -> list[str]:
    """`key=value` for each of several values; of a key that takes a list, each in brackets."""
    key, _, text = override.partition("=")
    listed = get_origin(kind_of(command.keys, key.strip().lstrip("+"))) is tuple
    if listed and not text.strip().startswith("["):
        return [override]
    parts = [p for p in _TOP_LEVEL.findall(text) if p.strip()]
    return [f"{key}={part}" for part in parts] if len(parts) > 1 else [override]
