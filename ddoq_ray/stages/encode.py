"""encode: Ray Data streams shards through a pool of encoder actors into the latent log.

A reader task decodes a shard sample by sample and yields chunks, each ONE row of the stream (Ray Data merges and
re-cuts rows that come in batches). An encoder actor turns a chunk into one published file of latents. The shard's
done record follows when all its chunks are there. Every step is a pure function of the shard, so running one twice,
which Ray Data may do, changes nothing.
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ddoq_ray.artifacts import Artifact, Folder, digest_of
from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.records import ChunkRecord, ClassCounts, ShardDone, fixed_binary, latent_schema
from ddoq_ray.runtime import Events, Progress, device, pin_threads
from ddoq_ray.samples import BadSample, Sample, read_samples, to_square
from ddoq_ray.stages.networks import Networks
from ddoq_ray.stages.prepare import Data

CHUNK_BYTES = 32 << 20  # of pixels: small enough that several wait in memory, large enough to hide a call's cost


def chunk_rows(config: RunConfig, image_size: int) -> int:
    """Samples in a chunk, at most."""
    return config.encoder.chunk_samples or max(1, CHUNK_BYTES // (3 * image_size**2))


def shard_name(index: int) -> str:
    return f"shard-{index:06d}"


def read_chunks(
    batch: dict[str, np.ndarray], *, quarantine: Folder, num_classes: int, image_size: int, chunk_samples: int
) -> Iterator[dict[str, list[Any]]]:
    """Ray Data UDF: one shard in, its chunks out, each as one row; refused samples go to ``quarantine/<shard>.jsonl``.

    The last chunk of a shard (possibly without samples) carries the number of refused samples.
    """
    for shard, url in zip(batch["shard"].tolist(), batch["url"].tolist(), strict=True):
        bad: list[BadSample] = []
        chunks = _in_chunks(read_samples(url, num_classes, bad.append), chunk_samples)
        for number, (samples, last) in enumerate(chunks):
            if last and bad:
                lines = [json.dumps({"key": b.key, "offset": b.offset, "reason": b.reason}) for b in bad]
                quarantine.publish(f"{shard_name(shard)}.jsonl", ("\n".join(lines) + "\n").encode())
            yield {
                "shard": [shard],
                "chunk": [number],
                "last": [last],
                "refused": [len(bad) if last else 0],
                "keys": [json.dumps([s.key for s in samples])],
                "class_ids": [np.asarray([s.class_id for s in samples], np.int32).tobytes()],
                "pixels": [b"".join(to_square(s.image, image_size).tobytes() for s in samples)],
            }


def _in_chunks(samples: Iterator[Sample], size: int) -> Iterator[tuple[list[Sample], bool]]:
    """(samples, whether these are the last); at least once, possibly without samples."""
    chunk: list[Sample] = []
    for sample in samples:
        if len(chunk) == size:  # one sample ahead, so that the last chunk is known to be the last
            yield chunk, False
            chunk = []
        chunk.append(sample)
    yield chunk, True


class Encoder:
    """Ray Data actor: a chunk of pixels becomes one file of latents; only its record goes back."""

    def __init__(self, prior_path: str, latents: Folder, batch: int, threads: int) -> None:
        from ddoq_ray.models.prior import load_prior

        pin_threads(threads)
        self.prior = load_prior(prior_path, device=device())
        self.latents = latents
        self.batch = batch

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        import torch

        keys = json.loads(batch["keys"][0])
        class_ids = np.frombuffer(batch["class_ids"][0], np.int32)
        size = self.prior.image_size
        pixels = np.frombuffer(batch["pixels"][0], np.uint8).reshape(len(keys), size, size, 3)
        parts = []
        for first in range(0, len(keys), self.batch):
            inner = torch.from_numpy(pixels[first : first + self.batch].copy()).to(self.prior.device)
            images = inner.permute(0, 3, 1, 2).float() / 127.5 - 1
            parts.append(self.prior.encode(images).flatten(1).to(torch.float16).cpu().numpy())
        dim = int(np.prod(self.prior.latent_shape))
        latents = np.concatenate(parts) if parts else np.empty((0, dim), np.float16)
        if not np.isfinite(latents).all():
            row = int(np.flatnonzero(~np.isfinite(latents).all(1))[0])
            raise ValueError(
                f"the prior gave a non-finite latent for sample {keys[row]} of {shard_name(int(batch['shard'][0]))}; "
                "check its weights and scaling_factor"
            )
        shard, chunk = int(batch["shard"][0]), int(batch["chunk"][0])
        record = self._publish(shard, chunk, keys, class_ids, latents)
        return {
            "shard": [shard],
            "chunk": [chunk],
            "last": [bool(batch["last"][0])],
            "refused": [int(batch["refused"][0])],
            "record": [json.dumps(record.to_json())],
        }

    def _publish(
        self, shard: int, chunk: int, keys: list[str], class_ids: np.ndarray, latents: np.ndarray
    ) -> ChunkRecord:
        order = np.argsort(class_ids, kind="stable")  # a class's rows lie together, in the shard's order
        table = pa.Table.from_arrays(
            [pa.array([keys[i] for i in order], pa.string()), pa.array(class_ids[order]), fixed_binary(latents[order])],
            schema=latent_schema(self.prior.latent_shape, self.prior.id),
        )
        out = io.BytesIO()
        pq.write_table(table, out, compression="NONE", use_dictionary=False, write_statistics=False)
        data = out.getvalue()
        name = f"{shard_name(shard)}/chunk-{chunk:05d}.parquet"
        self.latents.publish(name, data)
        counts = Counter(class_ids.tolist())
        return ChunkRecord(name, len(keys), ClassCounts(counts), digest_of(data))


def identity(config: RunConfig, data: Data | None, prior_id: str) -> dict:
    """What the latents depend on. Without `data` (before prepare) the inputs are left out."""
    encoder = {k: v for k, v in plain(config.encoder).items() if k != "workers"}
    facts: dict[str, Any] = {"encoder": encoder, "prior": prior_id}
    if data is not None:
        facts["data"] = data.digest
    return facts


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
    facts = identity(config, data, networks.prior_id)
    status = artifact.begin(facts, overwrite=config.overwrite)
    if status == "done":
        for shard in range(len(data.train)):
            on_shard(shard)
        return artifact.require()
    if status == "new":
        (run_folder / "quarantine").remove()  # what another encoding refused, now replaced
    finished = done_shards(latents)
    for shard in sorted(finished):
        on_shard(shard)
    total = sum(s.samples for s in data.train)
    with Progress("encode", total, "images") as progress:
        for shard in finished:
            progress.advance(ShardDone.loads(latents.read(f"{shard_name(shard)}/done.json")).classes.total)
        refused = 0
        for record in _stream(config, run_folder, data, finished, networks.image_size):
            latents.publish(f"{shard_name(record.shard)}/done.json", record.dumps())
            refused += record.refused
            progress.advance(record.classes.total)
            if refused > config.max_bad_fraction * max(1, total):
                break  # no need to spend the rest of the hours; the final check below says why
            on_shard(record.shard)
    encoded, refused, digests = 0, 0, []
    for shard in sorted(done_shards(latents)):
        done = ShardDone.loads(latents.read(f"{shard_name(shard)}/done.json"))
        encoded += done.classes.total
        refused += done.refused
        digests.append([c.sha256 for c in done.chunks])
    check_bad_fraction(config, run_folder, encoded, refused)
    if not encoded:
        raise ValueError(f"no usable sample in any shard; each refusal is listed in {run_folder.path('quarantine')}")
    manifest = artifact.finish(
        facts,
        seconds=round(time.time() - start, 3),
        items=encoded,
        unit="images",
        bytes=encoded * 2 * int(np.prod(networks.latent_shape)),
        refused=refused,
        digest=digest_of(digests),
        latent_shape=list(networks.latent_shape),
        environment=networks.environment,
        kept=True,
    )
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
    config: RunConfig, run_folder: Folder, data: Data, finished: set[int], image_size: int
) -> Iterator[ShardDone]:
    """The done record of each shard that is not finished, as its last chunk arrives."""
    todo = [{"shard": i, "url": url} for i, url in enumerate(data.train_urls) if i not in finished]
    if not todo:
        return
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = CHUNK_BYTES  # chunks go on one by one, not a shard at a time
    cluster = config.cluster
    rows = (
        ray.data.from_items(todo, override_num_blocks=len(todo))
        .map_batches(
            read_chunks,
            batch_size=1,
            num_cpus=cluster.reader.num_cpus,
            fn_kwargs={
                "quarantine": run_folder / "quarantine",
                "num_classes": len(data.classes),
                "image_size": image_size,
                "chunk_samples": chunk_rows(config, image_size),
            },
        )
        .map_batches(
            Encoder,
            batch_size=1,
            fn_constructor_kwargs={
                "prior_path": config.prior.path,
                "latents": run_folder / "latents",
                "batch": config.encoder.batch,
                "threads": cluster.threads,
            },
            compute=ray.data.ActorPoolStrategy(size=config.encoder.workers),
            num_cpus=cluster.encoder.num_cpus,
            num_gpus=cluster.encoder.num_gpus or None,
        )
        .iter_rows()
    )
    chunks: dict[int, dict[int, ChunkRecord]] = {}
    ends: dict[int, tuple[int, int]] = {}
    for row in rows:
        shard = int(row["shard"])
        chunks.setdefault(shard, {})[int(row["chunk"])] = ChunkRecord.from_json(json.loads(row["record"]))
        if row["last"]:
            ends[shard] = (int(row["chunk"]) + 1, int(row["refused"]))
        if shard in ends and len(chunks[shard]) == ends[shard][0]:
            ordered = tuple(chunks[shard][i] for i in range(ends[shard][0]))
            total: Counter[int] = Counter()
            for chunk in ordered:
                total.update(chunk.classes)
            yield ShardDone(shard, ordered, ClassCounts(total), ends[shard][1])
            del chunks[shard]


def quarantine_reasons(run_folder: Folder) -> Counter[str]:
    """Refused samples by reason, without the details that make each one unique."""
    reasons: Counter[str] = Counter()
    for name in (run_folder / "quarantine").names("*.jsonl"):
        for line in (run_folder / "quarantine").read(name).splitlines():
            reasons[json.loads(line)["reason"].split(":")[0]] += 1
    return reasons


def check_bad_fraction(config: RunConfig, run_folder: Folder, encoded: int, refused: int) -> None:
    seen = encoded + refused
    if refused > config.max_bad_fraction * max(1, seen):
        reasons = ", ".join(f"{reason}: {n}" for reason, n in quarantine_reasons(run_folder).most_common(5))
        raise ValueError(
            f"{refused} of {seen} samples refused, more than max_bad_fraction={config.max_bad_fraction} ({reasons}); "
            f"each is listed in {run_folder.path('quarantine')}. What is encoded stays: mend the shards, or raise "
            "max_bad_fraction and run again"
        )
