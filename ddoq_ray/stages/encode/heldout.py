"""heldout: latents of validation images, on which the report measures the codebooks that were fitted to others.

``<run>/heldout/`` has the form of the latent log: a folder a validation shard, with at most `report.heldout_images`
images of each class over all of them (the first ones, in the order of the shards), encoded with the settings of the
training images' log. It is an artifact of its own, so a second report finds it done. Encoding needs nothing of the
stages between, so it goes on in tasks while students train; the report waits for it. Each task keeps the prior for its
share of the shards; one that dies is retried by Ray and skips the shards that are published.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Progress
from ddoq_ray.stages.encode import step as encode
from ddoq_ray.stages.encode.reader import chunk_rows, read_chunks
from ddoq_ray.stages.encode.stream import inner_batch, shard_done
from ddoq_ray.stages.encode.worker import Encoder, EncoderSettings
from ddoq_ray.stages.step import Ask, Step, merged
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_index import done_records
from ddoq_ray.storage.layout import shard_name
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.records import ChunkRecord

Share = tuple[int, str, dict[int, int]]  # validation shard, its URL, class_id -> images to take


def shares(data: Data, limit: int) -> list[Share]:
    """What each validation shard contributes, so that no class has more than `limit` images in all."""
    left = {c.class_id: limit for c in data.classes}
    found = []
    for shard, (info, url) in enumerate(zip(data.val, data.val_urls, strict=True)):
        mine = {c: min(n, left[c]) for c, n in info.images.items() if left.get(c, 0) > 0}
        for c, n in mine.items():
            left[c] -= n
        found.append((shard, url, mine))
    return found


@dataclass(frozen=True)
class EncodeHeldout(Step):
    """The latents of validation images that the report measures codebooks on."""

    stage = "report"
    name = "heldout"

    @property
    def place(self) -> str:
        return layout.HELDOUT

    def settings(self, config: RunConfig) -> dict[str, Any]:
        return {"heldout_images": config.report.heldout_images}

    def inputs(self, run: Run) -> dict[str, Any]:
        """They are encoded as the training images' log was, whatever the configuration says now."""
        as_log = encode.made_with(run.latents, run.config.encoder)
        settings = encode.encoder_settings(as_log, run.config.seed)
        return merged(settings, encode.network_facts(run)) | {
            "val": digest_of([s.digest for s in run.data.val])[:32],
            "classes": len(run.data.classes),
        }

    def asks(self, config: RunConfig) -> list[Ask]:
        return [Ask.of(config, "encoder", "encoder")]

    def wanted(self, config: RunConfig) -> bool:
        return super().wanted(config) and config.report.heldout_images > 0

    def checked(self, config: RunConfig) -> bool:
        return self.wanted(config)


class Heldout:
    """The driver's handle: encoding starts with `start`, `wait` ends it.

    Attributes:
        folder: The log of held-out latents.
        missing: Why there is none; empty when there is one.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._artifact = EncodeHeldout().artifact(run.dir)
        self.folder = self._artifact.folder
        self.shards = len(run.data.val)
        self._facts: dict[str, Any] = {}
        self._refs: list[Any] = []
        self.missing = ""

    def start(self) -> None:
        """Begin to encode what is not there yet, if anything can be."""
        self.missing = self._why_not()
        if self.missing:
            return
        run = self.run
        self._facts = EncodeHeldout().identity(run)
        if self._artifact.begin(self._facts, overwrite=run.config.overwrite) == "done":
            if self._artifact.require()["kept"]:
                return
            self.folder.remove()  # the latents of a run with latents.keep=false went with it
            self._artifact.begin(self._facts)
        config = dataclasses.replace(run.config, encoder=encode.made_with(run.latents, run.config.encoder))
        finished = encode.done_shards(self.folder)
        limit = config.report.heldout_images
        todo = [share for share in shares(run.data, limit) if share[0] not in finished]
        tasks = max(1, min(config.encoder.workers, len(todo)))  # none to do is a log without its manifest
        resources = config.cluster.encoder
        batch = inner_batch(config, run.networks, self.folder, run.latents)
        settings = EncoderSettings.of(config, run.networks, batch)
        reading = {
            "num_classes": len(run.data.classes),
            "image_size": run.networks.image_size,
            "chunk_samples": chunk_rows(config, run.networks.image_size, batch),
            "resize": config.encoder.resize,
        }
        task = _encode.options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)
        self._refs = [task.remote(self.folder, todo[i::tasks], settings, reading) for i in range(tasks)]

    def left_alone(self) -> Heldout:
        """Encode nothing, since another run is at work here: what it has finished is there."""
        self.missing = "" if self._artifact.manifest() is not None else "the run is still at work"
        return self

    def _why_not(self) -> str:
        networks = self.run.networks
        if self.run.config.report.heldout_images == 0:
            return "report.heldout_images is 0"
        if not any(s.samples for s in self.run.data.val):
            return "the data has no held-out split (dataset.val_path)"
        encoded = Artifact(self.run.latents, encode.Encode.name).manifest()
        if encoded is None or not encoded.get("kept", True):
            return "the latents of the training images are not stored"
        if encoded["identity"]["prior"] != networks.latents_id:
            return "the latents were made by another prior than this one"
        if encoded["identity"]["encoder"]["path"] != networks.encoder_id:
            return "the latents were made by another autoencoder than this one (encoder.path)"
        return ""

    def wait(self) -> dict[str, Any]:
        """The facts of the held-out latents for ``results.json``, once they are all there.

        Raises:
            RayTaskError: When our own code fails in a task.
        """
        limit = self.run.config.report.heldout_images
        facts: dict[str, Any] = {"images_per_class": limit, "images": 0, "missing": self.missing}
        if self._refs:
            with Progress("heldout", len(self._refs), "encoders") as progress:
                seconds = 0.0
                for ref in self._refs:
                    seconds = max(seconds, ray.get(ref))
                    progress.advance()
            images = refused = 0
            digests = []
            # By their numbers: other machines have made their folders, and a listing of NFS may be from before.
            for done in done_records(self.folder, range(self.shards)):
                images += done.classes.total
                refused += done.refused
                digests.append([c.sha256 for c in done.chunks])
            self._artifact.finish(
                self._facts,
                seconds=round(seconds, 3),
                items=images,
                unit="images",
                bytes=images * 2 * int(np.prod(self.run.networks.latent_shape)),
                shards=len(digests),
                refused=refused,
                digest=digest_of(digests),
                kept=True,
            )
            self.run.events.add("stage finished", stage="heldout", images=images)
        if not self.missing:
            facts["images"] = self._artifact.require()["items"]
        return facts


@ray.remote
def _encode(log: Folder, todo: list[Share], settings: EncoderSettings, reading: dict[str, Any]) -> float:
    """Encode one task's share of the validation shards; the seconds it took."""
    start = time.monotonic()
    encoder = None
    for shard, url, left in todo:
        if log.exists(f"{shard_name(shard)}/{layout.DONE}"):  # by this task, before it was retried
            continue
        if encoder is None:
            encoder = Encoder(settings, log)
        chunks: list[ChunkRecord] = []
        refused = not_finite = 0
        rows = read_chunks(
            {"shard": np.array([shard]), "url": np.array([url])},
            quarantine=log / layout.QUARANTINE,
            **reading,
        )
        for row in rows:
            refused = row["refused"][0]
            if _keep(row, left):
                record, lost = encoder.publish(row, f"{shard_name(shard)}/{layout.chunk_file(len(chunks))}")
                chunks.append(record)
                not_finite += len(lost)
            if not any(left.values()):
                break
        log.publish(f"{shard_name(shard)}/{layout.DONE}", shard_done(shard, chunks, refused + not_finite).dumps())
    return time.monotonic() - start


def _keep(row: dict[str, list[Any]], left: dict[int, int]) -> int:
    """Cut a chunk of `read_chunks` down to the images that are `left` to take of each class; how many it holds now."""
    class_ids = np.frombuffer(row["class_ids"][0], np.int32)
    kept = []
    for i, c in enumerate(class_ids.tolist()):
        if left.get(c, 0) > 0:
            left[c] -= 1
            kept.append(i)
    keys = json.loads(row["keys"][0])
    pixels = np.frombuffer(row["pixels"][0], np.uint8).reshape(len(class_ids), -1)
    row["keys"] = [json.dumps([keys[i] for i in kept])]
    row["class_ids"] = [class_ids[kept].tobytes()]
    row["pixels"] = [pixels[kept].tobytes()]
    return len(kept)
