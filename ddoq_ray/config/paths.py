"""Paths as people write them: ``file:///data``, ``~/data``. Both are this machine's files, and nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

_PATHS = ("run_dir", "path", "val_path", "classes", "out", "calibration", "scratch", "source", "perceptual", "judge",
          "through")  # fmt: skip
_FILE = re.compile(r"(?:file|local):(?://(?:localhost)?(?=/)|(?=/(?!/)))(?P<path>/.*)", re.DOTALL | re.IGNORECASE)


def plain_path(text: str) -> str:
    """A file URL as the path it means, and ``~`` as the home folder; anything else (s3://, a hub id) unchanged.

    >>> plain_path("file:///data/run"), plain_path("file://localhost/data"), plain_path("s3://bucket/run")
    ('/data/run', '/data', 's3://bucket/run')
    """
    match = _FILE.fullmatch(text)
    if match:
        return "/" + match["path"].lstrip("/")
    if text.lower().startswith(("file:", "local:")):
        raise ValueError(f"{text}: a file URL needs a whole path, such as file:///data/run; or give the path alone")
    home = os.path.expanduser(text)
    if home.startswith("~"):
        raise ValueError(f"{text}: no home folder is known for {text.partition('/')[0]}; give the whole path")
    return home


def plain_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values of a configuration, the keys that hold paths, or lists of them, in plain form."""
    made: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            made[key] = plain_paths(value)
        elif key in _PATHS and isinstance(value, (list, tuple)):
            made[key] = [plain_path(each) if isinstance(each, str) else each for each in value]
        else:
            made[key] = plain_path(value) if key in _PATHS and isinstance(value, str) else value
    return made
