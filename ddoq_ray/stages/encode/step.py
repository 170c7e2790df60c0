"""encode: Ray Data streams shards through a pool of encoder actors into the latent log.

A reader task decodes shards and yields chunks of pixels. An encoder actor turns a chunk into one published file of
latents. When all chunks of a shard are there, a task joins them into few files, and the shard's done record follows.
Every step is a pure function of the shard, so running one twice, which Ray Data may do, changes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.config.cluster import ClusterConfig
from ddoq_ray.config.latents import EncoderConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.workers import Events, Progress, say
from ddoq_ray.stages.encode.reader import CHUNK_BYTES, READER_BYTES, chunk_rows, read_tables, reader_tasks
from ddoq_ray.stages.encode.worker import (
    NON_FINITE,
    PARTS,
    Encoder,
    EncoderSettings,
    join_chunks,
    search_batch,
    shard_name,
)
from ddoq_ray.stages.prepare.step import Data
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_index import done_records
from ddoq_ray.storage.latent_log import FILE_BYTES
from ddoq_ray.storage.quarantine import read_refusals, refused_kinds
from ddoq_ray.storage.records import ChunkRecord, ClassCounts, ShardDone

MAX_JOINS = 16  # shards that wait to be joined; more, and the stream waits for them
SEARCH_SECONDS = 0.3  # for each micro-batch that is tried

# No CPU of its own: it must find room while readers hold every one, and it mostly waits for files.
_join = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(join_chunks)


def file_rows(config: RunConfig, networks: Networks) -> int:
    """Samples in a file of the latent log, at most."""
    rows = FILE_BYTES // (2 * int(np.prod(networks.latent_shape)))
    return max(rows, chunk_rows(config, networks.image_size))


def identity(config: RunConfig, data: Data | None, networks: Networks) -> dict:
    """What the latents depend on. Without `data` (before prepare) the inputs are left out."""
    encoder = {k: v for k, v in plain(config.encoder).items() if k not in ("workers", "max_workers")}
    encoder["path"] = networks.encoder_id  # what the autoencoder is, not where
    facts: dict[str, Any] = {"encoder": encoder, "prior": networks.prior_id}
    if config.encoder.posterior == "sample":
        facts["seed"] = config.seed
    if data is not None:
        facts["data"] = data.digest
    return facts


def made_with(latents: Folder, encoder: EncoderConfig) -> EncoderConfig:
    """The settings that a log was encoded with; the workers, and where the autoencoder is, are the run's own."""
    made = Artifact(latents, "encode").require()["identity"]["encoder"]
    return dataclasses.replace(encoder, **{key: value for key, value in made.items() if key != "path"})


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
        if folder is not None and folder.exists("batch.json"):
            return int(folder.read_json("batch.json")["batch"])
    resources = config.cluster.encoder
    search = search_batch.options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)
    settings = EncoderSettings.of(config, networks, batch=1)
    try:
        found = ray.get(search.remote(settings, chunk_rows(config, networks.image_size), SEARCH_SECONDS))
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, ValueError) else error) from None
    log.publish_json("batch.json", found)
    return int(found["batch"])


def done_shards(latents: Folder) -> set[int]:
    """Shards whose done record is published."""
    return {int(name.split("/")[0].removeprefix("shard-")) for name in latents.names("shard-*/done.json")}


def run(
    config: RunConfig,
    run_folder: Folder,
    data: Data,
    events: Events,
    networks: Networks,
    on_shard: Callable[[int], None],
) -> dict:
    """Encode what is not yet encoded; call `on_shard` for each shard of the log, old and new, as it is complete.

    Raises:
        ValueError: When more than `max_bad_fraction` of the samples are refused; what is encoded stays.
    """
    start = time.time()
    latents = run_folder / "latents"
    artifact = Artifact(latents, "encode")
    facts = identity(config, data, networks)
    status = artifact.begin(facts, overwrite=config.overwrite)
    if status == "done":
        for shard in range(len(data.train)):
            on_shard(shard)
        return artifact.require()
    if status == "new":
        for name in (run_folder / "quarantine").names("shard-*.jsonl"):
            (run_folder / "quarantine").remove(name)  # what another encoding refused, now replaced
    finished = done_shards(latents)
    for shard in sorted(finished):
        on_shard(shard)
    batch = inner_batch(config, networks, latents)
    total = sum(s.samples for s in data.train)
    expected = sum(s.expected for s in data.train)
    with Progress("encode", total, "images") as progress:
        for done in done_records(latents, sorted(finished)):
            progress.advance(done.classes.total)
        refused = 0
        for record in _stream(config, run_folder, data, finished, networks, batch):
            latents.publish(f"{shard_name(record.shard)}/done.json", record.dumps())
            (latents / PARTS / shard_name(record.shard)).remove()
            refused += record.refused
            progress.advance(record.classes.total)
            if refused > config.max_bad_fraction * max(1, expected):
                break  # no need to spend the rest of the hours; the final check below says why
            on_shard(record.shard)
    encoded, refused, digests = 0, 0, []
    for done in done_records(latents, sorted(done_shards(latents))):
        encoded += done.classes.total
        refused += done.refused
        digests.append([c.sha256 for c in done.chunks])
    check_bad_fraction(config, run_folder, encoded, refused)
    if not encoded:
        raise ValueError(f"no usable sample in any shard; each refusal is listed in {run_folder.path('quarantine')}")
    (latents / PARTS).remove()  # of chunks that Ray Data ran once more after their shard was done
    reasons = quarantine_reasons(run_folder)
    manifest = artifact.finish(
        facts,
        seconds=round(time.time() - start, 3),
        items=encoded,
        batch=batch,
        unit="images",
        bytes=encoded * 2 * int(np.prod(networks.latent_shape)),
        refused=refused,
        refused_by_reason=dict(reasons.most_common()),
        digest=digest_of(digests),
        latent_shape=list(networks.latent_shape),
        environment=networks.environment,
        kept=True,
    )
    if refused:
        shown = ", ".join(f"{reason}: {n}" for reason, n in reasons.most_common())
        place = run_folder.path("quarantine")
        say(f"encode     {refused} of {encoded + refused} samples refused ({shown}); each is listed in {place}")
    events.add("stage finished", stage="encode", images=encoded, refused=manifest["refused"])
    return manifest


def reuse(latents: Folder, data: Data, networks: Networks, on_shard: Callable[[int], None]) -> dict:
    """Take a finished latent log as it is (another run's, or this run's encode stage done before).

    Raises:
        ValueError: When it is unfinished, was not kept, or was made from other data or by another prior.
    """
    manifest = Artifact(latents, "encode").require()
    if not manifest.get("kept", True):
        raise ValueError(f"{latents.uri}: its latents were removed after their run (latents.keep=false); encode again")
    made = manifest["identity"]
    for what, there, here in (("prior", made["prior"], networks.prior_id), ("data", made["data"], data.digest)):
        if there != here:
            raise ValueError(f"{latents.uri} was encoded from another {what} (digest {there}, this run has {here})")
    for shard in range(len(data.train)):
        on_shard(shard)
    return manifest


def discard(latents: Folder, events: Events) -> None:
    """Remove the latents after a run with latents.keep=false; the manifest and the counts stay, marked."""
    artifact = Artifact(latents, "encode")
    manifest = artifact.manifest()
    if manifest is None or not manifest["kept"]:
        return
    latents.publish_json("manifest.json", manifest | {"kept": False})
    for name in latents.names("shard-*/chunk-*.parquet"):
        latents.remove(name)
    events.add("latents removed", reason="latents.keep=false")


def _stream(
    config: RunConfig, run_folder: Folder, data: Data, finished: set[int], networks: Networks, batch: int
) -> Iterator[ShardDone]:
    """The done record of each shard that is not finished, once its files are published."""
    todo = [
        {"shard": i, "url": data.url(shard), "bytes": shard.bytes, "samples": shard.expected}
        for i, shard in enumerate(data.train)
        if i not in finished
    ]
    if not todo:
        return
    latents = run_folder / "latents"
    chunks: dict[int, dict[int, ChunkRecord]] = {}
    bad: Counter[int] = Counter()  # shard -> refused samples, its reader's and its encoders'
    ends: dict[int, int] = {}
    joins: dict[ray.ObjectRef, tuple[int, int]] = {}  # -> shard, refused samples
    for row in chunk_records(config, todo, run_folder, len(data.classes), networks, batch):
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
                joins[_join.remote(latents, shard, [parts[i] for i in range(count)])] = shard, refused
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


def chunk_records(
    config: RunConfig,
    todo: list[dict[str, Any]],
    run_folder: Folder,
    num_classes: int,
    networks: Networks,
    batch: int,
) -> Iterator[dict[str, Any]]:
    """What the encoders say of each chunk of the shards `todo`, in any order."""
    arguments = (EncoderSettings.of(config, networks, batch), run_folder / "latents", run_folder / "quarantine")
    stream = chunk_stream(config, todo, run_folder, num_classes, networks.image_size, batch)
    return iter(encoded(stream, config.cluster, config.encoder.pool, Encoder, arguments).iter_rows())


def chunk_stream(
    config: RunConfig, todo: list[dict[str, Any]], run_folder: Folder, num_classes: int, image_size: int, batch: int
) -> ray.data.Dataset:
    """The chunks of the shards `todo` (shard, url, bytes), decoded by tasks on any node; a task takes several."""
    # Half a chunk, so that each one goes on at once and by itself; Ray Data would collect until a block is full.
    ray.data.DataContext.get_current().target_max_block_size = CHUNK_BYTES // 2
    readers = ray.cluster_resources().get("CPU", 1) / (config.cluster.reader.num_cpus or 1)
    tasks = reader_tasks([row["bytes"] for row in todo], readers)
    return ray.data.from_items(todo, override_num_blocks=tasks).map_batches(
        read_tables,
        batch_size=None,  # all shards of a task
        num_cpus=config.cluster.reader.num_cpus,
        fn_kwargs={
            "quarantine": run_folder / "quarantine",
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


def quarantine_reasons(run_folder: Folder, files: str = "shard-*.jsonl") -> Counter[str]:
    """Refused samples by reason, without the details that make each one unique; by default the training samples."""
    return refused_kinds(refusal for _, refusal in read_refusals(run_folder / "quarantine", files))


def check_bad_fraction(config: RunConfig, run_folder: Folder, encoded: int, refused: int) -> None:
    seen = encoded + refused
    if refused > config.max_bad_fraction * max(1, seen):
        counted = quarantine_reasons(run_folder)
        reasons = ", ".join(f"{reason}: {n}" for reason, n in counted.most_common(5))
        hint = ""
        if counted[NON_FINITE.split(":")[0]]:
            hint = (
                f" Latents that are not finite come from the prior's weights or scaling_factor, or from an "
                f"encoder.dtype that they do not bear (it is {config.encoder.dtype}; try float32 or bfloat16)."
            )
        raise ValueError(
            f"{refused} of {seen} samples refused, more than max_bad_fraction={config.max_bad_fraction} ({reasons}); "
            f"each is listed in {run_folder.path('quarantine')}.{hint} What is encoded stays: mend the shards, or "
            "raise max_bad_fraction and run again"
        )
