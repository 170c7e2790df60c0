"""train: one Ray Train run trains all students, one after another, by weighted KL against the teacher's soft labels.

Starting a Ray Train run costs seconds, so many cells share one. One whose manifest is published is
never trained again. What a worker does is in worker.py.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.execution.networks import Networks, check_batches
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Progress, say
from ddoq_ray.stages.cells import Cell
from ddoq_ray.stages.evaluate.validation import Validation, teacher_columns
from ddoq_ray.stages.label.step import Label, check_scored
from ddoq_ray.stages.select.step import Select
from ddoq_ray.stages.step import Ask, Step
from ddoq_ray.stages.synthesize.step import Synthesize
from ddoq_ray.stages.train.fitting import MAX_DEATHS, RAY_TRAIN, fit
from ddoq_ray.stages.train.worker import Job, train_loop
from ddoq_ray.storage import layout
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.manifests import LabelsManifest, StudentManifest


@dataclass(frozen=True)
class Train(Step):
    """One trained student. More seeds or more baselines later leave the others as they are.

    Attributes:
        cell: Which student.
        source: The step whose images it sees; None for all the real ones.
        labels: The step whose labels it learns; None when the teacher labels while it trains.
    """

    stage = name = "train"

    cell: Cell
    source: Synthesize | Select | None
    labels: Label | None

    @property
    def place(self) -> str:
        return self.cell.folder

    def settings(self, config: RunConfig) -> dict[str, Any]:
        return {
            "student": plain(config.student),
            "resize": config.encoder.resize,
            "protocol": {k: v for k, v in plain(config.protocol).items() if k != "name"},
            "across_classes": config.weights.across_classes,
            "seed": config.seed,
            "workers": config.cluster.trainer.workers,
            "scheme": self.cell.scheme,
            "student_seed": self.cell.seed,
        }

    def inputs(self, run: Run) -> dict[str, Any]:
        images = run.finished(self.source.artifact(run.dir)) if self.source is not None else None
        labels = run.finished(self.labels.artifact(run.dir)) if self.labels is not None else None
        return {
            "images": images["digest"] if images is not None else run.data.digest,
            "labels": labels["digest"] if labels is not None else run.networks.teacher_id,
        }

    def asks(self, config: RunConfig) -> list[Ask]:
        workers = config.cluster.trainer.workers  # its controller asks for nothing
        return [Ask.of(config, "trainer", "trainer", workers, "cluster.trainer.workers", workers)]

    def checked(self, config: RunConfig) -> bool:
        return self.wanted(config)  # to score trained students, it does not matter how they would be trained now


def run(run: Run, steps: Sequence[Train]) -> None:
    """Train every student that has no published result, in one Ray Train run.

    Raises:
        ValueError: What a worker found that the user can mend.
        ray.train errors, when our own code fails in a worker or the workers die too often.
    """
    config, data = run.config, run.data
    columns = teacher_columns(data)
    for place, labels in {s.labels.place: s.labels for s in steps if s.labels is not None}.items():
        made_by = run.finished(labels.artifact(run.dir))
        check_scored(run, made_by)
        _check_labels(run.dir / place, made_by, columns, run.networks)
    # As they were made: classes with fewer distinct images than centroids leave another last batch than was planned.
    made = {s.source.place: run.finished(s.source.artifact(run.dir))["items"] for s in steps if s.source is not None}
    check_batches(made, config, run.networks)
    todo = []
    for step in steps:
        facts = step.identity(run)
        if step.artifact(run.dir).begin(facts, overwrite=config.overwrite) != "done":
            todo.append((step.cell, facts))
    if todo:
        counts = data.counts
        job = Job(
            run=run.dir,
            config=config,
            rows=tuple(todo),
            train_urls=tuple(data.train_urls),
            validation=Validation.of(config, data),
            teacher_index=columns,
            class_counts=tuple(counts[c.class_id] for c in data.classes),
            outputs=run.networks.teacher_outputs,
        )
        _fit(run, job)
        run.events.add("stage finished", stage="train", students=len(todo))
    manifests: list[StudentManifest] = [run.finished(step.artifact(run.dir)) for step in steps]
    _say_diverged([m for m in manifests if m.get("diverged")])


def _check_labels(folder: Folder, label: LabelsManifest, columns: Sequence[int], networks: Networks) -> None:
    """Stored labels need no teacher, but their outputs must mean what the run takes them for.

    Raises:
        ValueError: Another teacher made them, whose outputs mean other classes than those of `teacher.path` now.
    """
    if label["identity"]["teacher"] == networks.teacher_id:
        return  # an index that was mended since counts, too: what a student is scored on follows it
    if (label["outputs"], label["teacher_index"]) != (networks.teacher_outputs, list(columns)):
        raise ValueError(
            f"{folder.uri} was labelled by another teacher than teacher.path, whose outputs mean other classes "
            f"({label['outputs']} outputs there, {networks.teacher_outputs} here): give the teacher that made the "
            "labels, or overwrite=true with the stages label and train"
        )


def _say_diverged(diverged: Sequence[StudentManifest]) -> None:
    for m in diverged:
        say(
            f"train      {m['method']} seed {m['seed']} diverged: its loss was not a finite number in epoch "
            f"{m['diverged_epoch']} of {m['epochs']}; it has no accuracy (a smaller protocol.lr is the usual mend)"
        )


def _fit(run: Run, job: Job) -> None:
    students = run.dir / layout.STUDENTS
    with Progress("train", len(job.rows), "students") as progress:
        # fit() blocks; the published results are the progress that the driver can see without a channel of its own.
        stop = threading.Event()
        left = [row for row, _ in job.rows]

        def look() -> None:
            for row in [r for r in left if (run.dir / r.folder).exists(layout.MANIFEST)]:
                left.remove(row)
                progress.advance(1, note=row.method)

        def watch() -> None:
            while not stop.wait(1.0):
                look()

        def lost(reason: str, deaths: int) -> None:
            run.events.add("worker lost", stage="train", reason=reason, deaths=deaths)
            say(f"train      a worker was lost ({deaths} of at most {MAX_DEATHS}); its students go on elsewhere")

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            fit(train_loop, {"job": job}, run.config.cluster.trainer, students.uri, lost)
        finally:
            stop.set()
            watcher.join()
            look()
    # Its checkpoints are of rows that are published now; the next run's would stand beside them.
    (students / RAY_TRAIN).remove()
