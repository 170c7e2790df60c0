"""label: a pool of teacher actors stores soft labels of seeded views (FKD), and the teacher is checked first.

The view of an image at an epoch is a pure function of (seed, epoch, image_id), so a label needs no stored crop, and
the student finds the same view whatever its batch. The unit is a file: a range of epochs of a range of images.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.core.labels import choose_codec, codec_class, codec_sizes, make_codec
from ddoq_ray.core.sizing import in_bytes
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.pool import Elastic, run_elastic
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Progress, on_actor, say
from ddoq_ray.models.protocol_views import view_spec
from ddoq_ray.stages.evaluate.validation import check_refused, teacher_columns
from ddoq_ray.stages.label.images import SharedImages, shared_images
from ddoq_ray.stages.label.teacher import LabelUnit, spawner
from ddoq_ray.stages.label.teacher_check import check_teacher
from ddoq_ray.stages.step import Ask, ImageSetStep, Step
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.label_grid import LabelGrid
from ddoq_ray.storage.label_log import finished_file, finished_files
from ddoq_ray.storage.layout import HEAD, LabelKey, Place
from ddoq_ray.storage.manifests import ImagesManifest, LabelsManifest

FILES = "files"  # in an identity: how labels lie in files


def codec_name(config: RunConfig, networks: Networks, images: int) -> str:
    """The codec of the labels of a set of `images`: a function of counts, so that no teacher is needed to know it.

    Raises:
        ValueError: No codec is as small as `labels.budget` asks for.
    """
    mode, budget = config.labels.mode, config.labels.budget_bytes
    outputs, features = networks.teacher_outputs, networks.feature_dim
    if mode != "auto":
        if config.labels.stored and mode not in codec_sizes(outputs, features):
            raise ValueError(
                f"labels.mode={mode}: the teachers of an ensemble share no linear head; use logits or logits_int8"
            )
        return mode
    if budget is None:
        return choose_codec(outputs, features)
    labels = images * config.labels.labelled(config.protocol.epochs_for(images))
    try:
        return choose_codec(outputs, features, budget / labels)
    except ValueError:
        sizes = {name: in_bytes(n * labels) for name, n in codec_sizes(outputs, features).items()}
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"labels.budget={config.labels.budget} is too small for {labels:,} labels of {images:,} images ({told}): "
            "raise it, label fewer epochs (labels.epochs), or let the teacher label while students train "
            "(labels.mode=online)"
        ) from None


# Keys of the protocol that views follow from.
VIEWS = ("epochs", "steps", "min_scale", "flip", "cutmix", "mixup", "shuffle_patches", "cutout")


@dataclass(frozen=True)
class Label(Step):
    """The soft labels of an image set.

    Attributes:
        source: What makes the image set.
        at: Where the set is.
        key: What the labels are known by.
    """

    stage = name = "label"

    source: ImageSetStep
    at: Place
    key: LabelKey

    @property
    def place(self) -> str:
        return self.at.labels(self.key)

    def settings(self, config: RunConfig) -> dict[str, Any]:
        views = {k: plain(config.protocol)[k] for k in VIEWS}
        if config.protocol.steps is not None:
            views["batch"] = config.protocol.batch  # decides how many epochs the steps are
        size = config.student.image_size
        # A crop's pixels are those of the picture it is cut from; pictures of unlike sizes are kept at this one.
        views["stored"] = config.protocol.stored_side(size)
        if config.labels.epochs is not None:
            views["labelled"] = config.labels.epochs
        if len(config.teacher.paths) > 1:
            views["temperature"] = config.protocol.temperature  # at which an ensemble's probabilities are taken
        files = {"mb": config.labels.file_mb, "labels": config.labels.file_labels}
        return {"views": views, "size": size, "seed": config.seed, "teacher_batch": config.teacher.batch, FILES: files}

    def inputs(self, run: Run) -> dict[str, Any]:
        images = self.images(run)["digest"]
        return {"images": images, "teacher": run.networks.teacher_id, "codec": self.codec(run)}

    def codec(self, run: Run) -> str:
        return codec_name(run.config, run.networks, self.count(run))

    def count(self, run: Run) -> int:
        """Images of the set."""
        return sum(shard["images"] for shard in self.images(run)["shards"])

    def grid(self, run: Run) -> LabelGrid:
        """The files of its labels."""
        config, images = run.config, self.count(run)
        return LabelGrid.of(
            (images, config.labels.labelled(config.protocol.epochs_for(images))),
            make_codec(self.codec(run), run.networks.teacher_outputs, run.networks.feature_dim).nbytes,
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
    grids = {step: step.grid(run) for step in todo} if run.config.labels.stored else {}
    cost = _say_codecs(run, grids) if grids else {}
    made = _label(run, grids) if grids else dict.fromkeys(todo, 0)
    seconds = time.time() - start
    total = max(1, sum(made.values()))
    for step in todo:
        step.artifact(run.dir).finish(
            facts[step],
            # The sets share the workers; a set's share of the time is its share of the views.
            seconds=round(seconds * made[step] / total, 3),
            items=made[step],
            unit="views",
            codec=step.codec(run),
            outputs=run.networks.teacher_outputs,
            teacher_index=list(teacher_columns(run.data)),
            teacher=teacher,
            # Not of how they lie in files: the labels are the same.
            digest=digest_of({k: v for k, v in facts[step].items() if k != FILES}),
            environment=run.networks.environment,
            **(_stored(run, step, grids[step]) | cost if grids else {"bytes": 0}),
        )
    run.events.add("stage finished", stage="label", views=total)


def label(parts: Sequence[tuple[Run, Sequence[Label]]], teachers: Mapping[str | None, dict[str, Any] | None]) -> None:
    """`run` of all parts of a comparison; of parts that differ in their images alone, together.

    Args:
        teachers: What the check of each teacher found, by its digest.
    """
    alike: dict[str, tuple[Run, list[Label]]] = {}
    for part, steps in parts:
        c = part.config
        key = repr((part.networks.teacher_id, c.teacher, c.protocol, c.student.image_size, c.labels))
        alike.setdefault(key, (part, []))[1].extend(steps)
    for part, steps in alike.values():
        run(part, steps, teachers.get(part.networks.teacher_id))


def _stored(run: Run, step: Label, grid: LabelGrid) -> dict[str, Any]:
    """What a manifest says of stored labels: all that a reader needs."""
    labels = run.dir / step.place
    made_from = digest_of(step.identity(run))
    records = finished_files(labels, grid, made_from)
    for file in grid.all():  # what other machines have published since the disk was listed
        if file.index not in records and (record := finished_file(labels, file, made_from)) is not None:
            records[file.index] = record
    missing = [file.name for file in grid.all() if file.index not in records]
    if missing:
        raise RuntimeError(f"{len(missing)} label files of {step.place} are gone after they were made: {missing[:3]}")
    spec = view_spec(run.config.protocol, run.config.student.image_size)
    return {
        **({"head": labels.digest(HEAD)[0]} if labels.exists(HEAD) else {}),
        "bytes": sum(record.bytes for record in records.values()),
        "label_files": grid.files,
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


def _say_codecs(run: Run, grids: Mapping[Label, LabelGrid]) -> dict[str, Any]:
    """What will be stored, before it is made, and what that costs; the cost of codecs that round, for manifests."""
    codecs = sorted({step.codec(run) for step in grids})
    total, files, labels = (
        sum(getattr(grid, what) for grid in grids.values()) for what in ("bytes", "files", "labels")
    )
    sizes = codec_sizes(run.networks.teacher_outputs, run.networks.feature_dim)
    told = ", ".join(f"{name} {nbytes}" for name, nbytes in sizes.items())
    say(
        f"label      codec {' and '.join(codecs)} (bytes a label: {told}): {labels:,} labels of {len(grids)} image "
        f"set{'s' * (len(grids) > 1)} are {in_bytes(total)} in {files:,} file{'s' * (files != 1)}"
    )
    if codecs == ["logits"]:
        return {}  # fp16: nothing to measure
    images, spawn = _images(run, next(iter(grids))), spawner(run.config, run.dir)
    costs: dict[str, dict[str, float]] = on_actor(
        spawn, lambda actor: ray.get(actor.codec_costs.remote(images)), partial(run.events.add, stage="label")
    )
    words = "; ".join(f"{name} {cost['kl']:.2g} nats, {cost['relative']:.2g} of it" for name, cost in costs.items())
    say(f"label      KL of labels as stored to the teacher's, and as a share of what they tell: {words}")
    return {"codec_costs": costs}


def _label(run: Run, grids: Mapping[Label, LabelGrid]) -> dict[Label, int]:
    """Label the sets on an elastic pool: step -> labels that were made."""
    config = run.config
    spawn = spawner(config, run.dir)
    with_heads = [step.place for step in grids if codec_class(step.codec(run)).packs_features]
    if with_heads:
        save = lambda actor: ray.get([actor.save_head.remote(place) for place in with_heads])
        on_actor(spawn, save, partial(run.events.add, stage="label"))
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
            progress.advance(result["labels"], bytes=result["bytes"])
            left[unit.labels] -= 1
            if not left[unit.labels]:
                unit.images.release()
    return made


def _images(run: Run, step: Label) -> SharedImages:
    size = run.config.student.image_size
    shards, side = step.images(run)["shards"], run.config.protocol.stored_side(size)
    return shared_images(run.dir / step.at.images, shards, size, side)


def _units(run: Run, step: Label, grid: LabelGrid) -> list[LabelUnit]:
    """The files that are not there yet."""
    made_from, codec, images = digest_of(step.identity(run)), step.codec(run), _images(run, step)
    there = finished_files(run.dir / step.place, grid, made_from)
    left = (file for file in grid.all() if file.index not in there)
    return [LabelUnit(step.place, codec, file, grid, made_from, images) for file in left]
