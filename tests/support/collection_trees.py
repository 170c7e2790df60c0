"""Small collections on disk, and what a survey of them finds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.data.collections import open_source
from ddoq_ray.data.collections.listing import Survey


def picture(kind: str = "PNG", value: int = 90) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(out, kind)
    return out.getvalue()


def put(path: Path, data: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or picture())


def tree(root: Path, *names: str) -> Path:
    for name in names:
        put(root / name)
    return root


def survey(path: Path | str, **keys: Any) -> Survey:
    source = open_source(DatasetConfig(path=str(path), **keys))
    assert source is not None
    return source.survey()


def found(s: Survey) -> tuple[list[str], int, int | None]:
    return [c.name for c in s.classes], len(s.train.names), None if s.val is None else len(s.val.names)


def table(root: Path, rows: list[tuple[str, object]]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "metadata.csv").write_text("file_name,label\n" + "".join(f"{n},{v}\n" for n, v in rows))
    return root


def rows_of(labels: Any, extra: dict[str, Any] | None = None) -> pa.Table:
    pictures = [{"bytes": picture(), "path": f"{i}.png"} for i in range(len(labels))]
    return pa.table({"image": pictures, "label": labels, **(extra or {})})
