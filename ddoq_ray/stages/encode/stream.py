"""The stream of the encode stage: shards, chunks of pixels, files of latents, done records.

A reader task decodes shards and yields chunks of pixels. An encoder actor turns a chunk into one published file of
latents. When all chunks of a shard are there, a task joins them into few files, and the shard's done record follows.
Every step is a pure function of the shard, so running one twice, which Ray Data may do, changes nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.config.cluster import ClusterConfig
from ddoq_ray.execution.errors import plain_error
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import on_a_working_node
from ddoq_ray.stages.encode.reader import CHUNK_BYTES, READER_BYTES, chunk_rows, read_tables, reader_tasks
from ddoq_ray.stages.encode.worker import Encoder, EncoderSettings, join_chunks, search_batch
from ddoq_ray.storage import layout
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_log import FILE_BYTES
from ddoq_ray.storage.records import ChunkRecord, ClassCounts, ShardDone

MAX_JOINS = 16  # shards that wait to be joined; more, and the stream waits for them
SEARCH_SECONDS = 0.3  # for each micro-batch that is tried

# No CPU of its own: it must find room while readers hold every one, and it mostly waits for files.
_join = ray.remote(num_cpus=0)(join_chunks)


def file_rows(config: RunConfig, networks: Networks) -> int:
    """Samples in a file of the latent log, at most."""
    rows = FILE_BYTES // (2 * int(np.prod(networks.latent_shape)))
    return max(rows, chunk_rows(config, networks.image_size))


def inner_batch(config: RunConfig, networks: Networks, log: Folder, other: Folder | None = None) -> int:
    """The micro-batch of a log: as configured, or found by trying once, and recorded so that a resumed run has it.

    Args:
        log: Where it is recorded.
        other: Another log of this run, whose record is taken if there is one.

    Raises:
        ValueError: When not even one image fits the encoder's memory.
    """
    if config.encoder.batch:
        return config.encoder.batch
    for folder in (log, other):
        if folder is not None and folder.exists(layout.BATCH):
            return int(folder.read_json(layout.BATCH)["batch"])
    resources = config.cluster.encoder
    search = search_batch.options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)
    settings = EncoderSettings.of(config, networks, batch=1)
    try:
        found = ray.get(search.remote(settings, chunk_rows(config, networks.image_size), SEARCH_SECONDS))
    except ray.exceptions.RayTaskError as error:
        raise plain_error(error) from None
    log.publish_json(layout.BATCH, found)
    return int(found["batch"])


def done_records_of(run: Run, finished: set[int], batch: int) -> Iterator[ShardDone]:
    """The done record of each shard that is not finished, once its files are published."""
    data = run.data
    todo = [
        {
            "shard": i,
            "url": data.url(shard),
            "bytes": shard.bytes,
            "samples": shard.expected,
            "sha256": shard.sha256,
        }
        for i, shard in enumerate(data.train)
        if i not in finished
    ]
    if not todo:
        return
    latents = run.dir / layout.LATENTS
    chunks: dict[int, dict[int, ChunkRecord]] = {}
    bad: Counter[int] = Counter()  # shard -> refused samples, its reader's and its encoders'
    ends: dict[int, int] = {}
    joins: dict[ray.ObjectRef, tuple[int, int]] = {}  # -> shard, refused samples
    stream = chunk_records(run, todo, batch)
    del todo  # Ray has it
    for row in stream:
        shard = int(row["shard"])
        chunks.setdefault(shard, {})[int(row["chunk"])] = ChunkRecord.from_json(json.loads(row["record"]))
        bad[shard] += int(row["refused"])
        if row["last"]:
            ends[shard] = int(row["chunk"]) + 1
        if shard in ends and len(chunks[shard]) == ends[shard]:
            parts, count, refused = chunks.pop(shard), ends.pop(shard), bad.pop(shard)
            if count == 1:
                yield shard_done(shard, [parts[0]], refused)
            else:
                join = _join.options(**on_a_working_node())
                joins[join.remote(latents, shard, [parts[i] for i in range(count)])] = shard, refused
        yield from _joined(joins, wait=len(joins) > MAX_JOINS)
    while joins:
        yield from _joined(joins, wait=True)


def _joined(joins: dict[ray.ObjectRef, tuple[int, int]], *, wait: bool) -> Iterator[ShardDone]:
    """Done records of the shards whose files are joined by now; `wait` for one at least."""
    if joins:
        for ref in ray.wait(list(joins), num_returns=1 if wait else len(joins), timeout=None if wait else 0)[0]:
            shard, refused = joins.pop(ref)
            yield shard_done(shard, ray.get(ref), refused)


def shard_done(shard: int, files: Sequence[ChunkRecord], refused: int) -> ShardDone:
    """The done record of a shard with these files."""
    total: Counter[int] = Counter()
    for file in files:
        total.update(file.classes)
    return ShardDone(shard, tuple(files), ClassCounts(total), refused)


def chunk_records(run: Run, todo: list[dict[str, Any]], batch: int) -> Iterator[dict[str, Any]]:
    """What the encoders say of each chunk of the shards `todo`, in any order."""
    config, size = run.config, run.networks.image_size
    arguments = (
        EncoderSettings.of(config, run.networks, batch),
        run.dir / layout.LATENTS,
        run.dir / layout.QUARANTINE,
    )
    stream = chunk_stream(config, todo, run.dir, len(run.data.classes), size, batch)
    return iter(encoded(stream, config.cluster, config.encoder.pool, Encoder, arguments).iter_rows())


def chunk_stream(
    config: RunConfig, todo: list[dict[str, Any]], run_dir: Folder, num_classes: int, image_size: int, batch: int
) -> ray.data.Dataset:
    """The chunks of the shards `todo` (shard, url, bytes), decoded by tasks on any node; a task takes several."""
    # Half a chunk, so that each one goes on at once and by itself; Ray Data would collect until a block is full.
    # A dataset keeps the context in which it is made: other datasets of this process have their own.
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = CHUNK_BYTES // 2
    context.raise_original_map_exception = True  # else a worker's words reach the driver as text alone
    readers = ray.cluster_resources().get("CPU", 1) / (config.cluster.reader.num_cpus or 1)
    tasks = reader_tasks([row["bytes"] for row in todo], readers)
    with ray.data.DataContext.current(context):
        shards = ray.data.from_items(todo, override_num_blocks=tasks)
    return shards.map_batches(
        read_tables,
        batch_size=None,  # all shards of a task
        num_cpus=config.cluster.reader.num_cpus,
        fn_kwargs={
            "quarantine": run_dir / layout.QUARANTINE,
            "num_classes": num_classes,
            "image_size": image_size,
            "chunk_samples": chunk_rows(config, image_size, batch),
            "resize": config.encoder.resize,
        },
        memory=READER_BYTES,
    )


def encoded(
    chunks: ray.data.Dataset, cluster: ClusterConfig, pool: tuple[int, int], encoder: type, arguments: tuple[Any, ...]
) -> ray.data.Dataset:
    """The chunks through a pool of encoder actors.

    Ray Data would fuse the readers into the actors if both asked for the same resources; decoding would then wait for
    encoding, and could not go to nodes without a GPU. The memory that only readers ask for keeps them apart.
    """
    return chunks.map_batches(
        encoder,
        batch_size=1,
        fn_constructor_args=arguments,
        # Two calls at once: one computes while the other is fetched, uploaded or published.
        compute=ray.data.ActorPoolStrategy(
            min_size=pool[0], max_size=pool[1], max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        ),
        num_cpus=cluster.encoder.num_cpus,
        num_gpus=cluster.encoder.num_gpus or None,
    )
