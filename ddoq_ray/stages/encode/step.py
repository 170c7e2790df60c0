"""encode: Ray Data streams shards through a pool of encoder actors into the latent log (`stream`)."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ddoq_ray.config import RunConfig
from ddoq_ray.config.latents import EncoderConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Events, Progress, say
from ddoq_ray.stages.encode.reader import READER_BYTES
from ddoq_ray.stages.encode.stream import done_records_of, inner_batch
from ddoq_ray.stages.encode.worker import NON_FINITE
from ddoq_ray.stages.step import Ask, Step
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_index import done_records
from ddoq_ray.storage.manifests import LatentsManifest
from ddoq_ray.storage.quarantine import read_refusals, refused_kinds


@dataclass(frozen=True)
class Encode(Step):
    """The latent log of the training images."""

    stage = name = "encode"

    @property
    def place(self) -> str:
        return layout.LATENTS

    def settings(self, config: RunConfig) -> dict[str, Any]:
        return encoder_settings(config.encoder, config.seed)

    def inputs(self, run: Run) -> dict[str, Any]:
        return network_facts(run) | {"data": run.data.digest}

    def asks(self, config: RunConfig) -> list[Ask]:
        reader = dataclasses.replace(Ask.of(config, "reader", "reader"), memory=READER_BYTES)
        return [Ask.of(config, "encoder", "encoder", config.encoder.workers, "encoder.workers"), reader]

    def wanted(self, config: RunConfig) -> bool:
        return super().wanted(config) and self.checked(config)

    def checked(self, config: RunConfig) -> bool:
        """Where its settings count: what is made of a log that is there does not look at them again."""
        return config.latents.path is None and bool({"encode", "quantize"} & set(config.stages))


def encoder_settings(encoder: EncoderConfig, seed: int) -> dict[str, Any]:
    """What latents depend on of the settings; not on the workers, and on the autoencoder by what it is, not where."""
    left_out = ("workers", "max_workers", "path")
    facts: dict[str, Any] = {"encoder": {k: v for k, v in plain(encoder).items() if k not in left_out}}
    return facts | ({"seed": seed} if encoder.posterior == "sample" else {})


def network_facts(run: Run) -> dict[str, Any]:
    """What latents depend on beside settings and images."""
    return {"encoder": {"path": run.networks.encoder_id}, "prior": run.networks.latents_id}


def log_identity(run: Run) -> dict[str, Any]:
    """The identity of the log that the run uses: another run's, which is finished, or its own, which may not be."""
    if run.config.latents.path:
        return dict(made_in(run.latents)["identity"])
    return Encode().identity(run)


def made_in(latents: Folder) -> LatentsManifest:
    """The manifest of a latent log.

    Raises:
        ValueError: It is not finished.
    """
    return cast(LatentsManifest, Artifact(latents, Encode.name).require())


def made_with(latents: Folder, encoder: EncoderConfig) -> EncoderConfig:
    """The settings that a log was encoded with; the workers, and where the autoencoder is, are the run's own."""
    made = made_in(latents)["identity"]["encoder"]
    return dataclasses.replace(encoder, **{key: value for key, value in made.items() if key != "path"})


def done_shards(latents: Folder) -> set[int]:
    """Shards whose done record is published."""
    return {layout.shard_index(name) for name in latents.names(layout.DONE_RECORDS)}


def run(run: Run, on_shard: Callable[[int], None]) -> LatentsManifest:
    """Encode what is not yet encoded; call `on_shard` for each shard of the log, old and new, as it is complete.

    Raises:
        ValueError: When more than `max_bad_fraction` of the samples are refused; what is encoded stays.
    """
    start = time.time()
    config, data = run.config, run.data
    artifact = Encode().artifact(run.dir)
    latents, quarantine = artifact.folder, run.dir / layout.QUARANTINE
    facts = Encode().identity(run)
    status = artifact.begin(facts, overwrite=config.overwrite)
    if status == "done":
        for shard in range(len(data.train)):
            on_shard(shard)
        return made_in(latents)
    if status == "new":
        for name in quarantine.names("shard-*.jsonl"):
            quarantine.remove(name)  # what another encoding refused, now replaced
    finished = done_shards(latents)
    for shard in sorted(finished):
        on_shard(shard)
    batch = inner_batch(config, run.networks, latents)
    total = sum(s.samples for s in data.train)
    expected = sum(s.expected for s in data.train)
    latent_bytes = 2 * int(np.prod(run.networks.latent_shape))
    with Progress("encode", total, "images") as progress:
        progress.already(sum(done.classes.total for done in done_records(latents, sorted(finished))))
        refused = 0
        for record in done_records_of(run, finished, batch):
            latents.publish(f"{layout.shard_name(record.shard)}/{layout.DONE}", record.dumps())
            finished.add(record.shard)
            (latents / layout.PARTS / layout.shard_name(record.shard)).remove()
            refused += record.refused
            encoded = record.classes.total
            progress.advance(encoded, bytes=encoded * latent_bytes, quarantined=record.refused)
            if refused > config.max_bad_fraction * max(1, expected):
                break  # no need to spend the rest of the hours; the final check below says why
            on_shard(record.shard)
    return _finish(run, artifact, facts, finished, batch, start)


def _finish(
    run: Run, artifact: Artifact, facts: dict[str, Any], finished: set[int], batch: int, start: float
) -> LatentsManifest:
    """Count what the done records say, and publish the manifest.

    Args:
        finished: The shards that have one; a listing may lack folders that other machines have just made (NFS).

    Raises:
        ValueError: More than `max_bad_fraction` of the samples are refused, or all.
    """
    latents, quarantine = artifact.folder, run.dir / layout.QUARANTINE
    encoded, refused, digests = 0, 0, []
    for done in done_records(latents, sorted(finished)):
        encoded += done.classes.total
        refused += done.refused
        digests.append([c.sha256 for c in done.chunks])
    check_bad_fraction(run.config, run.dir, encoded, refused)
    if not encoded:
        raise ValueError(f"no usable sample in any shard; each refusal is listed in {quarantine.uri}")
    (latents / layout.PARTS).remove()  # of chunks that Ray Data ran once more after their shard was done
    reasons = quarantine_reasons(run.dir)
    manifest = artifact.finish(
        facts,
        seconds=round(time.time() - start, 3),
        items=encoded,
        batch=batch,
        unit="images",
        bytes=encoded * 2 * int(np.prod(run.networks.latent_shape)),
        shards=len(digests),
        refused=refused,
        refused_by_reason=dict(reasons.most_common()),
        digest=digest_of(digests),
        latent_shape=list(run.networks.latent_shape),
        environment=run.networks.environment,
        kept=True,
    )
    if refused:
        shown = ", ".join(f"{reason}: {n}" for reason, n in reasons.most_common())
        where = f"each is listed in {quarantine.uri}"
        say(f"encode     {refused} of {encoded + refused} samples refused ({shown}); {where}")
    run.events.add("stage finished", stage="encode", images=encoded, refused=refused)
    return cast(LatentsManifest, manifest)


def reuse(run: Run, on_shard: Callable[[int], None]) -> LatentsManifest:
    """Take a finished latent log as it is (another run's, or this run's encode stage done before).

    Raises:
        ValueError: When it is unfinished, was not kept, or was made from other data or by another prior.
    """
    latents = run.latents
    manifest = made_in(latents)
    if not manifest.get("kept", True):
        raise ValueError(f"{latents.uri}: its latents were removed after their run (latents.keep=false); encode again")
    made = manifest["identity"]
    for what, now in (("prior", run.networks.latents_id), ("data", run.data.digest)):
        if made[what] != now:
            raise ValueError(f"{latents.uri} was encoded from another {what} (digest {made[what]}, this run has {now})")
    for shard in range(len(run.data.train)):
        on_shard(shard)
    return manifest


def discard(latents: Folder, events: Events) -> None:
    """Remove the latents after a run with latents.keep=false; the manifest and the counts stay, marked."""
    artifact = Artifact(latents, Encode.name)
    manifest = artifact.manifest()
    if manifest is None or not manifest["kept"]:
        return
    artifact.amend(kept=False)
    for name in latents.names(layout.CHUNKS):
        latents.remove(name)
    events.add("latents removed", reason="latents.keep=false")


def quarantine_reasons(run_dir: Folder, files: str = "shard-*.jsonl") -> Counter[str]:
    """Refused samples by reason, without the details that make each one unique; by default the training samples."""
    return refused_kinds(refusal for _, refusal in read_refusals(run_dir / layout.QUARANTINE, files))


def check_bad_fraction(config: RunConfig, run_dir: Folder, encoded: int, refused: int) -> None:
    seen = encoded + refused
    if refused > config.max_bad_fraction * max(1, seen):
        counted = quarantine_reasons(run_dir)
        reasons = ", ".join(f"{reason}: {n}" for reason, n in counted.most_common(5))
        hint = ""
        if counted[NON_FINITE.split(":")[0]]:
            hint = (
                f" Latents that are not finite come from the prior's weights or scaling_factor, or from an "
                f"encoder.dtype that they do not bear (it is {config.encoder.dtype}; try float32 or bfloat16)."
            )
        raise ValueError(
            f"{refused} of {seen} samples refused, more than max_bad_fraction={config.max_bad_fraction} ({reasons}); "
            f"each is listed in {run_dir.path(layout.QUARANTINE)}.{hint} What is encoded stays: mend the shards, or "
            "raise max_bad_fraction and run again"
        )
