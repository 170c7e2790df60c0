"""What the driver does before the first image is made: the image shards of a codebook of ImageNet-21K's size.

    python -m benchmarks.synthesize_layout --json benchmarks/results/synthesize_layout.json

21,841 classes of 50 centroids, written by the stage's own writer; centroids are of a few values, since the driver reads
none of them, in as many parts as those of a latent of 4,096 values (256 px) take. Then the layout alone, in a process
of its own: `seconds`, and `peak_bytes`, its resident memory at its highest, Python and its libraries included;
`start_bytes` is what it had before.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from benchmarks.provenance import finish, parser, peak_bytes
from ddoq_ray.execution.workers import say
from ddoq_ray.stages.synthesize.jobs import image_jobs
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.codebook import Account, part_classes, write_part
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import Place
from ddoq_ray.storage.records import Codebook

LATENT = 4096  # values of a latent at 256 px, which say how many classes a part holds
VALUES = 4  # of a centroid here
COLUMNS = ["classes", "ipc", "shard_images", "parts", "shards", "seconds", "start_bytes", "peak_bytes"]


def write_codebook(codebook: Folder, classes: int, ipc: int) -> int:
    """A finished codebook; the number of its parts."""
    counts, account = np.ones(ipc, np.int64), Account(dropped=[], algorithms={"clvq": 1}, warnings=[])
    parts = part_classes(classes, ipc, LATENT)
    for part, mine in enumerate(parts):
        books = [Codebook(c, np.zeros((ipc, VALUES), np.float32), counts, 0.0, counts) for c in mine]
        write_part(codebook, part, books, account, latent_shape=(VALUES, 1, 1), prior_id="prior")
    Artifact(codebook, "quantize").finish({}, centroids=classes * ipc)
    return len(parts)


def lay_out(place: str, shard_images: int) -> dict[str, Any]:
    before, start = peak_bytes(field="VmRSS"), time.perf_counter()
    jobs = image_jobs(Folder(place), "", shard_images)
    assert sum(len(job.unit) for job in jobs) == jobs.images
    seconds = time.perf_counter() - start
    return {"shards": len(jobs), "seconds": seconds, "start_bytes": before, "peak_bytes": peak_bytes()}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--classes", type=int, default=21_841)
    options.add_argument("--ipc", type=int, default=50)
    options.add_argument("--shard-images", type=int, default=50)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as place:
        parts = write_codebook(Folder(place) / Place().codebook, given.classes, given.ipc)
        say(f"a codebook of {parts} parts is written")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            row = process.submit(lay_out, place, given.shard_images).result()
    facts = {"classes": given.classes, "ipc": given.ipc, "shard_images": given.shard_images, "parts": parts}
    finish([facts | row], COLUMNS, given.json)


if __name__ == "__main__":
    main()
