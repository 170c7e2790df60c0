"""label: a pool of teacher actors stores soft labels of seeded views (FKD), and the teacher is checked first.

The view of an image at an epoch is a pure function of (seed, epoch, image_id), so a label needs no stored crop, and
the student finds the same view whatever its batch. The unit is a file: a range of epochs of a range of images.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.core.labels import choose_codec, codec_class, make_codec
from ddoq_ray.core.sizing import in_bytes
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.pool import Elastic, run_elastic
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Progress, say
from ddoq_ray.models.protocol_views import view_spec
from ddoq_ray.stages.evaluate.validation import check_refused, teacher_columns
from ddoq_ray.stages.label.images import shared_images
from ddoq_ray.stages.label.teacher import LabelUnit, spawner
from ddoq_ray.stages.label.teacher_check import check_teacher
from ddoq_ray.stages.select.step import Select
from ddoq_ray.stages.step import Ask, Step
from ddoq_ray.stages.synthesize.step import Synthesize
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.label_grid import LabelGrid
from ddoq_ray.storage.label_log import finished_files
from ddoq_ray.storage.layout import HEAD, LabelKey, Place
from ddoq_ray.storage.manifests import ImagesManifest, LabelsManifest

FILES = "files"  # in an identity: how labels lie in files


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
        files = {"mb": config.labels.file_mb, "labels": config.labels.file_labels}
        return {"views": views, "size": size, "seed": config.seed, "teacher_batch": config.teacher.batch, FILES: files}

    def inputs(self, run: Run) -> dict[str, Any]:
        images = self.images(run)["digest"]
        return {"images": images, "teacher": run.networks.teacher_id, "codec": codec_name(run.config, run.networks)}

    def grid(self, run: Run, codec: str) -> LabelGrid:
        """The files of its labels."""
        config = run.config
        images = sum(shard["images"] for shard in self.images(run)["shards"])
        return LabelGrid.of(
            (images, config.protocol.epochs_for(images)),
            make_codec(codec, run.networks.teacher_outputs, run.networks.feature_dim).nbytes,
            batch=config.teacher.batch,
            file_bytes=config.labels.file_mb << 20,
            file_labels=config.labels.file_labels,
        )

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
    codec = codec_name(run.config, run.networks)
    grids = {step: step.grid(run, codec) for step in todo} if run.config.labels.stored else {}
    made = _label(run, grids, codec) if grids else dict.fromkeys(todo, 0)
    seconds = time.time() - start
    total = max(1, sum(made.values()))
    for step in todo:
        step.artifact(run.dir).finish(
            facts[step],
            # The sets share the workers; a set's share of the time is its share of the views.
            seconds=round(seconds * made[step] / total, 3),
            items=made[step],
            unit="views",
            codec=codec,
            outputs=run.networks.teacher_outputs,
            teacher_index=list(teacher_columns(run.data)),
            teacher=teacher,
            # Not of how they lie in files: the labels are the same.
            digest=digest_of({k: v for k, v in facts[step].items() if k != FILES}),
            environment=run.networks.environment,
            **(_stored(run, step, grids[step]) if grids else {"bytes": 0}),
        )
    run.events.add("stage finished", stage="label", views=total)


def _stored(run: Run, step: Label, grid: LabelGrid) -> dict[str, Any]:
    """What a manifest says of stored labels: all that a reader needs."""
    labels = run.dir / step.place
    records = finished_files(labels, grid, digest_of(step.identity(run)))
    missing = [file.name for file in grid.all() if file.index not in records]
    if missing:
        raise RuntimeError(f"{len(missing)} label files of {step.place} are gone after they were made: {missing[:3]}")
    spec = view_spec(run.config.protocol, run.config.student.image_size)
    return {
        **({"head": labels.digest(HEAD)[0]} if labels.exists(HEAD) else {}),
        "bytes": sum(record.bytes for record in records.values()),
        "files": grid.files,
        "grid": asdict(grid),
        "views": asdict(spec) | {"seed": run.config.seed, "stored": records[0].stored},
    }


def check_scored(run: Run, label: LabelsManifest) -> None:
    """Before students train on labels that were made before: were enough validation images scored for this run?

    Raises:
        ValueError: More were refused than `max_bad_fraction` says now.
    """
    facts = label["teacher"]
    check_refused(run.config, run.dir, facts["images"], facts.get("refused", 0), facts.get("reasons", ""))


def _label(run: Run, grids: Mapping[Label, LabelGrid], codec: str) -> dict[Label, int]:
    """Label the sets on an elastic pool: step -> labels that were made."""
    config = run.config
    _say_size(grids.values(), codec)
    spawn = spawner(config, run.dir, codec)
    if codec_class(codec).packs_features:
        actor = spawn()
        ray.get([actor.save_head.remote(step.place) for step in grids])
        ray.kill(actor)
    units = [unit for step, grid in grids.items() for unit in _units(run, step, grid)]
    of = {step.place: step for step in grids}
    left = Counter(unit.labels for unit in units)
    made = dict.fromkeys(grids, 0)
    with Progress("label", sum(u.file.labels for u in units), "views") as progress:
        for unit, result in run_elastic(
            spawn,
            units,
            Elastic.of(config.cluster, "label", "teacher", max_workers=config.labels.workers),
            name=lambda u: str(u.name),
            on_event=lambda event, **f: run.events.add(event, stage="label", **f),
            progress=progress,
        ):
            made[of[unit.labels]] += result["labels"]
            progress.advance(result["labels"])
            left[unit.labels] -= 1
            if not left[unit.labels]:
                unit.images.release()
    return made


def _say_size(grids: Collection[LabelGrid], codec: str) -> None:
    """What will be stored, before it is made."""
    total, files, labels = (sum(getattr(grid, what) for grid in grids) for what in ("bytes", "files", "labels"))
    sets = f"{len(grids)} image sets" if len(grids) > 1 else "the image set"
    say(
        f"label      codec {codec}: {next(iter(grids)).nbytes} bytes a label, {labels:,} labels of {sets} are "
        f"{in_bytes(total)} in {files:,} file{'s' * (files != 1)}"
    )


def _units(run: Run, step: Label, grid: LabelGrid) -> list[LabelUnit]:
    """The files that are not there yet."""
    config, made_from = run.config, digest_of(step.identity(run))
    there = finished_files(run.dir / step.place, grid, made_from)
    size = config.student.image_size
    images = shared_images(
        run.dir / step.at.images, step.images(run)["shards"], size, config.protocol.stored_side(size)
    )
    return [LabelUnit(step.place, file, grid, made_from, images) for file in grid.all() if file.index not in there]
