"""One file of every kind that a run directory holds, and the ways in which a disk damages a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def flipped(data: bytes) -> bytes:
    """One bit of the middle byte is another."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


WAYS: dict[str, Callable[[bytes], bytes] | None] = {"flipped": flipped, "cut": cut, "missing": None}

LABELS = "labels/digits-teacher-digits-16px"
STUDENT = "students/convnet3-w8-digits-teacher-digits-16px-seed0"
KINDS = {
    "packed shard": "data/train/train-000001.tar",
    "index": "data/shards.json",
    "class list": "data/source-classes.json",
    "latents": "latents/shard-000003/chunk-00000.parquet",
    "done record": "latents/shard-000003/done.json",
    "held-out latents": "heldout/shard-000000/chunk-00000.parquet",
    "codebook part": "codebook/part-00009.parquet",
    "part's record": "codebook/part-00009.json",
    "image shard": "images/images-000001.tar",
    "image shard's record": "images/.records/images-000001.json",
    "dataset card": "images/README.md",
    "chosen images": "compare/random-ipc2/draw-1/images/images-000000.tar",
    "labels": f"{LABELS}/labels-000000.parquet",
    "labels' record": f"{LABELS}/labels-000000.json",
    "student's weights": f"{STUDENT}/model.safetensors",
    "student's network": f"{STUDENT}/config.json",
    "student's curve": f"{STUDENT}/metrics.jsonl",
    "manifest": "images/manifest.json",
    "labels' manifest": f"{LABELS}/manifest.json",
    "student's manifest": f"{STUDENT}/manifest.json",
    "identity": "codebook/started.json",
    "rows": "report/rows.json",
    "rows' record": "report/evaluate.json",
    "results": "report/results.json",
    "page": "report/index.html",
    "configuration": "config.yaml",
}


def damage(file: Path, way: str) -> bytes:
    """Damage a file; what it held."""
    data, change = file.read_bytes(), WAYS[way]
    file.unlink()  # it may be a link to the undamaged one
    if change is not None:
        file.write_bytes(change(data))
    return data
