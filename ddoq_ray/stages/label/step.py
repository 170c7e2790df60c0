"""label: a pool of teacher actors stores soft labels of seeded views (FKD), and the teacher is checked first.

The view of an image at an epoch is a pure function of (seed, epoch, image_id), so a label needs no stored crop, and
the student finds the same view whatever its batch. The unit is (image shard, range of epochs).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.core.labels import choose_codec, codec_class, make_codec
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.pool import Elastic, run_elastic
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Progress, say
from ddoq_ray.stages.evaluate.validation import check_refused, teacher_columns
from ddoq_ray.stages.label.teacher import LabelUnit, spawner
from ddoq_ray.stages.label.teacher_check import check_teacher
from ddoq_ray.stages.select.step import Select
from ddoq_ray.stages.step import Ask, Step
from ddoq_ray.stages.synthesize.step import Synthesize
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.label_log import published_labels
from ddoq_ray.storage.layout import LabelKey, Place
from ddoq_ray.storage.manifests import ImagesManifest, LabelsManifest


def codec_name(config: RunConfig, networks: Networks) -> str:
    if config.labels.mode == "auto":
        return choose_codec(networks.teacher_outputs, networks.feature_dim)
    return config.labels.mode


@dataclass(frozen=True)
class Label(Step):
    """The soft labels of an image set.

    Attributes:
        source: What makes the image set.
        at: Where the set is.
        key: What the labels are known by.
    """

    stage = name = "label"

    source: Synthesize | Select
    at: Place
    key: LabelKey

    @property
    def place(self) -> str:
        return self.at.labels(self.key)

    def settings(self, config: RunConfig) -> dict[str, Any]:
        views = {k: plain(config.protocol)[k] for k in ("epochs", "steps", "min_scale", "flip", "cutmix")}
        if config.protocol.steps is not None:
            views["batch"] = config.protocol.batch  # decides how many epochs the steps are
        size = config.student.image_size
        # A crop's pixels are those of the picture it is cut from; pictures of unlike sizes are kept at this one.
        views["stored"] = config.protocol.stored_side(size)
        return {"views": views, "size": size, "seed": config.seed, "teacher_batch": config.teacher.batch}

    def inputs(self, run: Run) -> dict[str, Any]:
        images = self.images(run)["digest"]
        return {"images": images, "teacher": run.networks.teacher_id, "codec": codec_name(run.config, run.networks)}

    def images(self, run: Run) -> ImagesManifest:
        manifest: ImagesManifest = run.finished(self.source.artifact(run.dir))
        return manifest

    def asks(self, config: RunConfig) -> list[Ask]:
        count = config.labels.workers if config.labels.stored else 1
        return [Ask.of(config, "teacher", "teacher", count, "labels.workers")]


def run(run: Run, steps: Sequence[Label], teacher: dict[str, Any] | None = None) -> None:
    """Check the teacher, then label every image set.

    With `labels.mode=online` or `hard` only the check is done: nothing is stored.

    Args:
        teacher: What the check of this run found, where it was done before.
    """
    start = time.time()
    facts = {step: step.identity(run) for step in steps}
    todo = [step for step in steps if not step.artifact(run.dir).done(facts[step])]
    if not todo:
        return
    # Before anything is begun: labels refused for one teacher must not be in the way of the next.
    teacher = teacher or check_teacher(run)
    for step in todo:
        step.artifact(run.dir).begin(facts[step], overwrite=run.config.overwrite)
    made = dict.fromkeys(todo, (0, 0))
    codec = codec_name(run.config, run.networks)
    if run.config.labels.stored:
        made |= _label(run, todo, codec)
    seconds = time.time() - start
    total = max(1, sum(n for n, _ in made.values()))
    for step in todo:
        views, size = made[step]
        step.artifact(run.dir).finish(
            facts[step],
            # The sets share the workers; a set's share of the time is its share of the views.
            seconds=round(seconds * views / total, 3),
            items=views,
            unit="views",
            bytes=size,
            codec=codec,
            outputs=run.networks.teacher_outputs,
            teacher_index=list(teacher_columns(run.data)),
            shards=[{"name": s["name"], "images": s["images"]} for s in step.images(run)["shards"]],
            teacher=teacher,
            digest=digest_of(facts[step]),
            environment=run.networks.environment,
        )
    run.events.add("stage finished", stage="label", views=total)


def check_scored(run: Run, label: LabelsManifest) -> None:
    """Before students train on labels that were made before: were enough validation images scored for this run?

    Raises:
        ValueError: More were refused than `max_bad_fraction` says now.
    """
    facts = label["teacher"]
    check_refused(run.config, run.dir, facts["images"], facts.get("refused", 0), facts.get("reasons", ""))


def _label(run: Run, steps: Sequence[Label], codec: str) -> dict[Label, tuple[int, int]]:
    """Label the sets on an elastic pool: step -> (labels, bytes)."""
    config = run.config
    nbytes = make_codec(codec, run.networks.teacher_outputs, run.networks.feature_dim).nbytes
    say(f"label      codec {codec}: {nbytes} bytes a label")
    spawn = spawner(config, run.dir, codec)
    if codec_class(codec).packs_features:
        actor = spawn()
        ray.get([actor.save_head.remote(step.place) for step in steps])
        ray.kill(actor)
    units = [unit for step in steps for unit in _units(config, run.dir, step, step.images(run))]
    of = {step.place: step for step in steps}
    made = dict.fromkeys(steps, (0, 0))
    with Progress("label", sum(u.images * (u.last - u.first) for u in units), "views") as progress:
        for unit, result in run_elastic(
            spawn,
            units,
            Elastic.of(config.cluster, "label", "teacher", max_workers=config.labels.workers),
            name=lambda u: f"{u.labels}/{u.name} epochs {u.first}-{u.last - 1}",
            on_event=lambda event, **f: run.events.add(event, stage="label", **f),
            progress=progress,
        ):
            labels, size = made[of[unit.labels]]
            made[of[unit.labels]] = (labels + result["labels"], size + result["bytes"])
            progress.advance(result["labels"])
    return made


def _units(config: RunConfig, run_dir: Folder, step: Label, manifest: ImagesManifest) -> list[LabelUnit]:
    """Units of the epochs that are not published yet, each known by its own file: a run may resume in other units."""
    units, offset = [], 0
    names = [shard["name"] for shard in manifest["shards"]]
    published = published_labels(run_dir / step.place, names, config.protocol.epochs_for(manifest["items"]))
    for shard, there in zip(manifest["shards"], published, strict=True):
        for first, last in _runs(np.flatnonzero(~there).tolist(), config.labels.epochs_per_unit):
            units.append(LabelUnit(step.at.images, step.place, shard["name"], offset, shard["images"], first, last))
        offset += shard["images"]
    return units


def _runs(numbers: list[int], longest: int) -> list[tuple[int, int]]:
    """Ascending numbers as runs first..last-1 without a gap, none longer than `longest`."""
    runs: list[tuple[int, int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n and n - runs[-1][0] < longest:
            runs[-1] = (runs[-1][0], n + 1)
        else:
            runs.append((n, n + 1))
    return runs
