"""Readers, encoders and decoders that take a set time and make nothing: the stubs under `scale`.

All that schedules them is the project's own. They leave a line for each unit in a folder, a file a process: when it was
begun and ended (time.time), so that nothing is measured through the code that is measured.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.cloudpickle

from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.records import ChunkRecord, ClassCounts

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # whatever the workers' path

# A chunk's block: large enough to go through the object store as real ones do, small enough for one machine.
CHUNK_BYTES = 256 << 10


class Clock:
    """Takes a set time for a unit, one at a time as a device does, and notes when."""

    def __init__(self, marks: str, unit_s: float) -> None:
        self.unit_s, self.lock = unit_s, threading.Lock()
        self.file = Path(marks) / f"{os.getpid()}-{uuid.uuid4().hex}"
        self.file.touch()

    def unit(self) -> None:
        with self.lock:
            begin = time.time()
            time.sleep(self.unit_s)
            with self.file.open("a") as f:
                f.write(f"{begin} {time.time()}\n")


def worker_marks(marks: Path) -> list[tuple[int, list[tuple[float, float]]]]:
    """(process, (begin, end) of each of its units) of every worker."""
    found = []
    for file in marks.iterdir():
        lines = [line.split() for line in file.read_text().splitlines()]
        found.append((int(file.name.split("-")[0]), [(float(begin), float(end)) for begin, end in lines]))
    return found


def reader(samples: int, shards: int, classes: int) -> Callable[..., Iterator[pa.Table]]:
    """In the place of `read_tables`: a chunk a shard, in the order of classes, without a picture."""

    def read_tables(batch: dict[str, np.ndarray], **_: Any) -> Iterator[pa.Table]:
        for shard in batch["shard"].tolist():
            ids = np.arange(shard * samples, (shard + 1) * samples, dtype=np.int64) * classes // (shards * samples)
            row = {
                "shard": [shard],
                "chunk": [0],
                "last": [True],
                "refused": [0],
                "keys": [json.dumps([f"n{c:08d}_{i}" for i, c in enumerate(ids.tolist())])],
                "class_ids": [ids.astype(np.int32).tobytes()],
                "pixels": [bytes(CHUNK_BYTES)],
            }
            yield pa.table(row)

    return read_tables


def encoder(marks: str, unit_s: float) -> type:
    """In the place of `Encoder`."""

    class Encoder:
        def __init__(self, *_: Any) -> None:
            self.clock = Clock(marks, unit_s)

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
            self.clock.unit()
            shard, class_ids = int(batch["shard"][0]), np.frombuffer(batch["class_ids"][0], np.int32)
            name = f"{layout.shard_name(shard)}/{layout.chunk_file(0)}"
            record = ChunkRecord(name, len(class_ids), ClassCounts(Counter(class_ids.tolist())), digest_of(name))
            facts = {key: [batch[key][0]] for key in ("shard", "chunk", "last", "refused")}
            return facts | {"record": [json.dumps(record.to_json())]}

    return Encoder


def decoder(marks: str, unit_s: float) -> Any:
    """In the place of `Decoder`, an actor."""

    class Decoder:
        def __init__(self, *_: Any) -> None:
            self.clock = Clock(marks, unit_s)

        def run(self, job: Any) -> dict[str, Any]:
            self.clock.unit()
            made = {"name": job.unit.name, "images": len(job.unit), "bytes": 0, "sha256": digest_of(job.name)}
            return made | {"constant": 0, "first_constant": None, "retried": 0}

    return ray.remote(Decoder)
