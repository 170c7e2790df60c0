"""What a training worker holds of the row `full`, at its highest, as the number of real images grows.

    python -m benchmarks.train_memory --json benchmarks/results/train_memory.json

Shards of PNGs of one size are written; then a process of its own for each number of images decodes them as the stage
does (`Sets`, told that they do not fit in memory, so that they go to a file) and trains a small student on each of them
once. `peak_bytes` is the process's resident memory at its highest, libraries included; `start_bytes` what it had
before.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.provenance import finish, parser, peak_bytes
from ddoq_ray.config.compose import load_config
from ddoq_ray.data.pictures import encode_png
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.models.protocol_views import view_spec
from ddoq_ray.models.training.student import HardTargets, StudentTraining, build_student
from ddoq_ray.stages.train.memory import Room
from ddoq_ray.stages.train.ranks import Ranks
from ddoq_ray.stages.train.sets import Real, Sets
from ddoq_ray.storage.folder import Folder

CLASSES = 10
SHARD = 1000
COLUMNS = ["images", "size", "seconds", "start_bytes", "peak_bytes"]


def write_shards(folder: Path, images: int, size: int) -> Real:
    """Pictures of smooth noise, each of 50 some times over."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
    pictures = [encode_png(c.repeat(size // 4, 0).repeat(size // 4, 1)) for c in coarse]
    folder.mkdir()
    urls, counts = [], []
    for first in range(0, images, SHARD):
        rows = range(first, min(first + SHARD, images))
        members = [m for i in rows for m in ((f"i{i}.png", pictures[i % 50]), (f"i{i}.cls", str(i % CLASSES).encode()))]
        path = folder / f"{first:07d}.tar"
        path.write_bytes(write_tar(members))
        urls.append(str(path))
        counts.append(len(rows))
    return Real(tuple(urls), tuple(counts))


def train(folder: str, real: Real, size: int) -> dict[str, Any]:
    """Decode and train on each image once; in a process of its own."""
    torch.set_num_threads(1)
    config = load_config([f"student.image_size={size}", "student.arch=convnet3-w4", "protocol.batch=100"])
    start, begun = peak_bytes(field="VmRSS"), time.perf_counter()
    sets = Sets(Folder(folder), config, CLASSES, Ranks(0, 1, torch.device("cpu")), Room(host=1.0, scratch=folder))
    found = sets.get(None, real)
    model = build_student(config.student, CLASSES, seed=0)
    training = StudentTraining(
        model, model, found.images, torch.ones(len(found.class_ids)), config.protocol,
        view_spec(config.protocol, size), seed=0, view_seed=0,
    )  # fmt: skip
    training.train_epoch(1e-3, HardTargets(torch.from_numpy(found.class_ids), CLASSES))
    seconds = time.perf_counter() - begun
    sets.close()
    return {"seconds": seconds, "start_bytes": start, "peak_bytes": peak_bytes()}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, nargs="+", default=[5_000, 50_000])
    options.add_argument("--size", type=int, default=64, help="side of the images, in pixels, a multiple of 4")
    given = options.parse_args()
    rows = []
    for images in given.images:
        with tempfile.TemporaryDirectory() as folder:
            real = write_shards(Path(folder) / "shards", images, given.size)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                row = process.submit(train, folder, real, given.size).result()
        rows.append({"images": images, "size": given.size} | row)
    finish(rows, COLUMNS, given.json)


if __name__ == "__main__":
    main()
