"""What `ddoq-ray plan` takes on the index of a data set of ImageNet-21K's size: seconds and peak memory.

The index is generated: shards of random classes (mixed), or of neighbouring ones (sorted). The network is the shipped
digits prior's autoencoder, which takes any classes. `plan` runs in a process of its own, as users run it: twice with
a folder of caches of its own. The first time (`networks` new) a child process loads the networks to look at them, and
`peak_bytes` is the larger of the two processes'; the second time they are known.

    python -m benchmarks.plan --json benchmarks/results/plan.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.driver_records import class_counts
from benchmarks.provenance import finish, parser
from ddoq_ray.config.compose import load_config
from ddoq_ray.stages.prepare.step import Prepare
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.records import ClassInfo, ShardInfo, shard_lines

COLUMNS = ["order", "networks", "images", "shards", "classes", "seconds", "cpu_seconds", "peak_bytes", "index_bytes"]
BYTES_A_SAMPLE = 100_000


def write_index(run: Folder, order: str, shards: int, classes: int, samples: int) -> int:
    """Prepared data of given shards, as `prepare` leaves it; bytes of its index."""
    data = run / "data"
    listed = [ClassInfo(c, f"n{c:08d}", f"class number {c}") for c in range(classes)]
    data.publish_json("source-classes.json", [c.to_json() for c in listed])
    with data.writing("shards.json") as f:
        f.writelines(
            shard_lines(
                ShardInfo(f"/data/{i:06d}.tar", samples, samples * BYTES_A_SAMPLE, counts, digest_of(i)[:32])
                for i, counts in enumerate(class_counts(order, shards, classes, samples))
            )
        )
    data.publish("val-shards.json", b"[]\n")
    settings = Prepare().settings(load_config(words(run.uri)))
    Artifact(data, "prepare").finish(settings, shards=shards, classes=classes)
    return data.size("shards.json")


def words(run_dir: str) -> list[str]:
    """The keys of the run that is planned."""
    return [
        f"run_dir={run_dir}", "dataset.path=/data/*.tar", "prior.path=shipped:digits-prior",
        "prior.autoencoder_only=true", "synthesizer.strength=0", "small_class=cap", "baselines=[d4m]",
        "stages=[prepare,encode,quantize,synthesize]", "ipc=10", "quantizer.num_shards=8", "cluster.address=auto",
    ]  # fmt: skip


def measure(order: str, shards: int, classes: int, samples: int) -> list[dict[str, Any]]:
    """Write an index, and plan a run of it, of networks that are new and that are known."""
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as cache:
        # Apart: a process begins with the peak of the one that starts it, which stays small.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
            index_bytes = apart.submit(write_index, Folder(place), order, shards, classes, samples).result()
        about = {
            "order": order,
            "images": shards * samples,
            "shards": shards,
            "classes": classes,
            "index_bytes": index_bytes,
        }
        return [about | {"networks": networks} | planned(place, cache, about) for networks in ("new", "known")]


def planned(place: str, cache: str, about: dict[str, Any]) -> dict[str, Any]:
    """What one plan takes of time and memory."""
    start = time.monotonic()
    command = [sys.executable, "-m", "ddoq_ray", "plan", *words(place)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": cache},
    )
    assert process.stdout is not None
    told = process.stdout.read()
    _, _, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    assert f"{about['images']:,} images of {about['classes']:,} classes" in told, told
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_bytes": 1024 * used.ru_maxrss,
    }


def main() -> None:
    """Measure both orders."""
    arguments: argparse.ArgumentParser = parser(__doc__ or "")
    arguments.add_argument("--orders", nargs="+", default=["sorted", "mixed"])
    arguments.add_argument("--shards", type=int, default=14_200)
    arguments.add_argument("--classes", type=int, default=21_841)
    arguments.add_argument("--samples", type=int, default=1_000, help="of a shard")
    asked = arguments.parse_args()
    rows = [row for order in asked.orders for row in measure(order, asked.shards, asked.classes, asked.samples)]
    finish(rows, COLUMNS, asked.json)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    main()
