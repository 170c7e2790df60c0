"""Reader tasks: a shard becomes chunks of decoded pixels.

A task decodes its shards sample by sample and yields chunks, each ONE row of the stream (Ray Data merges and re-cuts
rows that come in batches). The same shard gives the same chunks, however often and wherever it is read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ddoq_ray.config import RunConfig
from ddoq_ray.data.pictures import Resize
from ddoq_ray.data.samples import Sample, read_samples, to_square
from ddoq_ray.data.tar_samples import DAMAGE
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import shard_name
from ddoq_ray.storage.quarantine import Refusal, publish_refusals

# Of pixels: small enough that several wait in memory, large enough to hide a call's cost (with half of it readers lose
# a sixth of their rate, with twice as much they gain nothing).
CHUNK_BYTES = 48 << 20
MOST_BYTES = 2**31 - 1  # of pixels in a value of a table, whose ends are int32
TASK_BYTES = 512 << 20  # of shards: ten seconds and more, beside the 0.2 s until Ray Data follows a task up
READER_BYTES = 4 * CHUNK_BYTES  # a chunk is collected while the one before is put into a block and stored


def chunk_rows(config: RunConfig, image_size: int, batch: int = 1) -> int:
    """Samples in a chunk, at most; whole micro-batches where it holds more than one."""
    rows = config.encoder.chunk_samples or max(1, CHUNK_BYTES // (3 * image_size**2))
    return rows if config.encoder.chunk_samples or rows < batch else rows - rows % batch


def reader_tasks(shard_bytes: Sequence[int], readers: float) -> int:
    """Tasks that read shards of these sizes: long ones, but four for each reader that the cluster has room for."""
    return max(1, min(len(shard_bytes), max(sum(shard_bytes) // TASK_BYTES, int(4 * readers))))


def read_chunks(
    batch: dict[str, np.ndarray],
    *,
    quarantine: Folder,
    num_classes: int,
    image_size: int,
    chunk_samples: int,
    resize: Resize = "squash",
) -> Iterator[dict[str, list[Any]]]:
    """One shard in, its chunks out, each as one row; refused samples go to ``quarantine/<shard>.jsonl``.

    The last chunk of a shard (possibly without samples) carries the number of refused samples.
    """
    count = len(batch["shard"])
    told = (batch["shard"], batch["url"], batch.get("samples", np.zeros(count, int)), batch.get("sha256", [""] * count))
    for shard, url, samples_there, sha256 in zip(*(np.asarray(column).tolist() for column in told), strict=True):
        bad: list[Refusal] = []
        usable = 0
        samples = read_samples(url, num_classes, bad.append, sha256)
        for number, (chunk, last) in enumerate(_in_chunks(samples, chunk_samples, image_size, resize)):
            usable += len(chunk.keys)
            if last:
                bad = with_lost(bad, samples_there - usable)
            if last:
                publish_refusals(quarantine, f"{shard_name(shard)}.jsonl", bad, "key")
            yield {
                "shard": [shard],
                "chunk": [number],
                "last": [last],
                "refused": [sum(b.samples for b in bad) if last else 0],
                "keys": [json.dumps(chunk.keys)],
                "class_ids": [np.asarray(chunk.class_ids, np.int32).tobytes()],
                "pixels": [chunk.pixels[: len(chunk.keys)].reshape(-1)],
            }


def with_lost(bad: list[Refusal], missing: int) -> list[Refusal]:
    """The refusals of a shard in its order, so that as many are counted as the index says are `missing`.

    Damage is one refusal, whatever it took: it counts for all that did not come.
    """
    more = missing - len(bad)
    bad = sorted(bad, key=lambda b: b.offset or 0)
    if more <= 0:
        return bad
    for i, b in enumerate(bad):
        if b.reason.startswith(DAMAGE):
            counted = dataclasses.replace(b, samples=b.samples + more, reason=f"{b.reason}; {more + 1:,} samples lost")
            return [*bad[:i], counted, *bad[i + 1 :]]
    reason = f"the shard has changed: {more:,} samples that its index names are not there any more"
    return [*bad, Refusal("", reason, more, bad[-1].offset if bad else 0)]


def read_tables(batch: dict[str, np.ndarray], **reading: Any) -> Iterator[pa.Table]:
    """Ray Data UDF: the rows of `read_chunks` as Arrow tables; their pixels are not copied once more on the way.

    Raises:
        ValueError: A chunk of as many samples as were asked for is too large for a table.
    """
    for row in read_chunks(batch, **reading):
        pixels = row.pop("pixels")[0]
        if len(pixels) > MOST_BYTES:
            raise ValueError(
                f"encoder.chunk_samples: a chunk of {len(json.loads(row['keys'][0])):,} images has {len(pixels):,} "
                f"bytes of pixels, and can have at most {MOST_BYTES:,}; give fewer, or leave the key out"
            )
        ends = np.array([0, len(pixels)], np.int32)
        column = pa.Array.from_buffers(pa.binary(), 1, [None, pa.py_buffer(ends), pa.py_buffer(pixels)])
        yield pa.table({**row, "pixels": column})


class _Chunk:
    """Samples of a shard; their pixels uint8 [n, S, S, 3] in memory that is taken once, at its full size."""

    def __init__(self, samples: int, image_size: int) -> None:
        self.keys: list[str] = []
        self.class_ids: list[int] = []
        self.pixels = np.empty((samples, image_size, image_size, 3), np.uint8)

    def add(self, sample: Sample, resize: Resize) -> None:
        # Resized one by one: a chunk of large photographs, as they were decoded, would be gigabytes.
        self.pixels[len(self.keys)] = to_square(sample.image, self.pixels.shape[1], resize)
        self.keys.append(sample.key)
        self.class_ids.append(sample.class_id)


def _in_chunks(samples: Iterable[Sample], size: int, image_size: int, resize: Resize) -> Iterator[tuple[_Chunk, bool]]:
    """(chunk, whether it is the last); at least one, possibly without samples."""
    chunk = _Chunk(size, image_size)
    for sample in samples:
        if len(chunk.keys) == size:  # one sample ahead, so that the last chunk is known to be the last
            yield chunk, False
            chunk = _Chunk(size, image_size)
        chunk.add(sample, resize)
    yield chunk, True
