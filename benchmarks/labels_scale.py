"""Labels at scale: those of 0.1 M and 1 M image ids in 20 epochs are written by the pool and replayed, without pixels.

    python -m benchmarks.labels_scale --json FILE

The teacher is a stub that answers at once; all else is what a run does: files planned from counts, two actors of the
elastic pool, views drawn and digested, records, digests checked, an epoch read ahead, rows taken in random order and
decoded. Replayed labels are compared with what the stub said. Peaks are VmHWM of a process; each size runs in processes
of its own.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.provenance import finish, parser, peak_bytes
from ddoq_ray.core.views.params import ViewSpec, view_params
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.label_grid import LabelFile, LabelGrid
from ddoq_ray.storage.label_log import Making, finished_files, write_labels

CLASSES, POOL, BATCH = 50, 4096, 1000
SPEC = ViewSpec(size=64)
IDENTITY = {"labels": "synthetic"}


class Stub:
    """Answers for any image: one of `POOL` labels, chosen by image and epoch."""

    def __init__(self) -> None:
        import torch

        from ddoq_ray.core.labels import LogitsCodec  # torch: not in the driver

        self.codec = LogitsCodec(CLASSES)
        self.logits = torch.from_numpy(np.random.default_rng(0).standard_normal((POOL, CLASSES), np.float32))
        self.packed = self.codec.encode(self.logits)

    def of(self, epoch: int, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return (ids * 7919 + epoch * 104_729) % POOL


class Writer(Stub):
    """A worker of the pool."""

    def __init__(self, labels: Folder, grid: LabelGrid) -> None:
        super().__init__()
        self.labels, self.grid = labels, grid

    def run(self, file: LabelFile) -> dict[str, int]:
        stored = (self.grid.images, 64, 64)

        def answer(epoch: int, first: int, end: int) -> tuple[npt.NDArray[np.uint8], bytes]:
            ids = np.arange(first, end)
            return self.packed[self.of(epoch, ids)], view_params(SPEC, 0, epoch, ids, stored).packed()

        making = Making(self.grid, self.codec.name, digest_of(IDENTITY), stored)
        size = write_labels(self.labels, file, making, answer)
        return {"labels": file.labels, "bytes": size, "peak": peak_bytes()}


class Reader(Stub):
    """A worker that trains on nothing: it reads every label once, in batches of random images."""

    def replay(self, labels: Folder) -> dict[str, float]:
        from ddoq_ray.data.soft_labels import SoftLabels

        stored = SoftLabels(labels)
        grid, start = stored.store.grid, time.monotonic()
        for epoch in range(grid.epochs):
            packed = stored.epoch(epoch)
            order = np.random.default_rng(epoch).permutation(grid.images)
            for first in range(0, len(order), BATCH):
                index = order[first : first + BATCH]
                logits = stored.decode(packed[index])
                if first == 0:
                    assert (logits - self.logits[self.of(epoch, index)]).abs().max() < 2e-3, (
                        "another label than was made"
                    )
        return {"seconds": time.monotonic() - start, "peak": peak_bytes()}


def measure(images: int, epochs: int, folder: str, workers: int) -> dict[str, Any]:
    import ray

    from ddoq_ray.core.labels import make_codec
    from ddoq_ray.execution.pool import Elastic, run_elastic

    ray.init(
        address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    labels = Folder(folder)
    nbytes = make_codec("logits", CLASSES, None).nbytes
    grid = LabelGrid.of((images, epochs), nbytes, batch=BATCH, file_bytes=128 << 20, file_labels=1 << 18)
    writer = ray.remote(num_cpus=1)(Writer)
    start = time.monotonic()
    peaks: list[int] = []
    for _, made in run_elastic(
        lambda: writer.remote(labels, grid), list(grid.all()), Elastic("labels", workers, workers), name=str
    ):
        peaks.append(made["peak"])
    records = finished_files(labels, grid, digest_of(IDENTITY))
    assert len(records) == grid.files
    facts = {"codec": "logits", "outputs": CLASSES, "files": grid.files, "grid": dataclasses.asdict(grid)}
    Artifact(labels, "label").finish(IDENTITY, **facts)
    seconds = time.monotonic() - start
    reader: Any = ray.remote(num_cpus=1)(Reader).remote()
    read = ray.get(reader.replay.remote(labels))
    return {
        "images": images,
        "epochs": epochs,
        "label_bytes": nbytes,
        "files": grid.files,
        "bytes": sum(record.bytes for record in records.values()),
        "driver_peak_bytes": peak_bytes(),
        "worker_peak_bytes": max(*peaks, read["peak"]),
        "writer_peak_bytes": max(peaks),
        "replay_peak_bytes": read["peak"],
        "workers": workers,
        "write_labels_per_s": grid.labels / seconds,
        "replay_labels_per_s": grid.labels / read["seconds"],
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, nargs="*", default=[100_000, 1_000_000])
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--one", nargs=2, help="for the benchmark itself: images, folder")
    given = options.parse_args()
    if given.one:
        print(json.dumps(measure(int(given.one[0]), given.epochs, given.one[1], given.workers)))
        return
    rows = []
    for images in given.images:
        scratch = tempfile.mkdtemp()
        try:
            words = ["--epochs", str(given.epochs), "--workers", str(given.workers), "--one", str(images), scratch]
            out = subprocess.run(
                [sys.executable, "-m", "benchmarks.labels_scale", *words],
                env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            rows.append(json.loads(out.stdout.splitlines()[-1]))
        finally:
            shutil.rmtree(scratch)
    columns = ["images", "files", "driver_peak_bytes", "worker_peak_bytes", "write_labels_per_s", "replay_labels_per_s"]
    finish(rows, columns, given.json)


if __name__ == "__main__":
    main()
