"""A tiny run for tests of training: eight labelled pictures of two classes, soft labels, a validation shard."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ddoq_ray.config.compose import load_config
from ddoq_ray.core.labels import Codec, make_codec
from ddoq_ray.data.pictures import encode_png
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.stages.cells import Cell
from ddoq_ray.stages.evaluate.validation import Validation
from ddoq_ray.stages.train.ranks import Ranks
from ddoq_ray.stages.train.sets import Real
from ddoq_ray.stages.train.worker import Job
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.label_grid import LabelGrid
from ddoq_ray.storage.label_log import Answer, Making, write_labels
from ddoq_ray.storage.layout import Place

IMAGES, CLASSES, EPOCHS = 8, 2, 6


def _pictures(count: int, size: int, seed: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [encode_png(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def small_job(folder: Path, *keys: str, codec: str = "logits", size: int = 8) -> Job:
    """The run's files, and a job of one row that trains on them for `EPOCHS` epochs."""
    run = Folder(str(folder))
    members = []
    for i, png in enumerate(_pictures(IMAGES, size, 0)):
        facts = {"centroid_id": i % 4, "weight": 0.25}
        key = f"{i // 4:05d}-{i % 4:04d}"
        members += [
            (f"{key}.png", png),
            (f"{key}.cls", str(i // 4).encode()),
            (f"{key}.json", json.dumps(facts).encode()),
        ]
    run.publish("images/images-000000.tar", write_tar(members))
    val = []
    for i, png in enumerate(_pictures(6, size, 1)):
        val += [(f"v{i}.png", png), (f"v{i}.cls", str(i % 2).encode())]
    run.publish("val.tar", write_tar(val))
    _labels(run / "labels", codec)
    config = load_config(
        ["student.arch=convnet3-w4", f"student.image_size={size}", f"protocol.steps={2 * EPOCHS}", "protocol.batch=4",
         "protocol.eval_every=1", *keys]
    )  # fmt: skip
    row = Cell("ddoq", 4, "s", size, "t", "p", 0, "images", "labels", "uniform", Place())
    validation = Validation((run.path("val.tar"),), (6,), CLASSES, 1.0)
    return Job(run, config, ((row, {"row": 0}),), Real(), validation, tuple(range(CLASSES)), (4,) * CLASSES, CLASSES)


def _labels(labels: Folder, name: str) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(6, CLASSES)
    codec = make_codec(name, CLASSES, 6)
    values = torch.randn(EPOCHS, IMAGES, 6)

    def answer(epoch: int, first: int, end: int) -> tuple[Any, bytes]:
        mine = values[epoch, first:end]
        return codec.encode(mine if codec.packs_features else head(mine)), b""

    data = safetensors.torch.save(dict(head.state_dict()))
    labels.publish("head.safetensors", data)
    store_labels(labels, (IMAGES, EPOCHS), codec, answer, outputs=CLASSES, head=digest_of(data))


def store_labels(labels: Folder, counts: tuple[int, int], codec: Codec, answer: Answer, **facts: Any) -> LabelGrid:
    """Finished labels of (images, epochs), in files of two epochs."""
    bounds = {"batch": 1, "file_bytes": 1 << 20, "file_labels": 2 * counts[0]}
    grid = LabelGrid.of(counts, codec.nbytes, **bounds)
    made_from = digest_of({})
    for file in grid.all():
        write_labels(labels, file, Making(grid, codec.name, made_from, (counts[0], 8, 8)), answer)
    Artifact(labels, "label").finish({}, codec=codec.name, grid=asdict(grid), label_files=grid.files, **facts)
    return grid


class Apart(Ranks):
    """One of several ranks whose collectives are left out."""

    def most(self, value: int) -> int:
        return value

    def share_buffers(self, model: Any) -> None:
        pass
