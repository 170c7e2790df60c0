"""train: students by Ray Train, one after another in a run of it, or in several runs side by side.

Starting a Ray Train run costs seconds, so many cells share one; `cluster.trainer.groups` runs share the cluster. A cell
whose manifest is published is never trained again. What a worker does is in worker.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.execution.networks import Networks, check_batches
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import MAX_DEATHS, Progress, say
from ddoq_ray.stages.cells import Cell
from ddoq_ray.stages.evaluate.validation import Validation, teacher_columns
from ddoq_ray.stages.label.step import Label, check_scored
from ddoq_ray.stages.label.stored_check import check_stored
from ddoq_ray.stages.step import Ask, ImageSetStep, Step
from ddoq_ray.stages.train.ahead import Ahead, Load, group_of, planned_loads
from ddoq_ray.stages.train.dealing import Dealer, Dealing, Dealt, SharedDealer
from ddoq_ray.stages.train.fitting import RAY_TRAIN, fit
from ddoq_ray.stages.train.sets import Real
from ddoq_ray.stages.train.worker import Job, train_loop
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.manifests import LabelsManifest, StudentManifest

# Keys of cluster.trainer that change a student's bytes.
LOOK_SECONDS = 1.0  # between two looks for students that are published
ARITHMETIC = ("workers", "min_workers", "max_workers", "precision", "channels_last", "compile", "micro_batch")


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
    source: ImageSetStep | None
    labels: Label | None

    @property
    def place(self) -> str:
        return self.cell.folder

    def settings(self, config: RunConfig) -> dict[str, Any]:
        return {
            "student": plain(config.student),
            "resize": config.encoder.resize,
            "protocol": {k: v for k, v in plain(config.protocol).items() if k != "name"},
            "weights": {k: v for k, v in plain(config.weights).items() if k != "scheme"},
            "hard_labels": config.labels.mode == "hard",
            "seed": config.seed,
            "trainer": {key: getattr(config.cluster.trainer, key) for key in ARITHMETIC},
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
        trainer = config.cluster.trainer  # its controller asks for nothing
        least = trainer.min_workers or trainer.workers
        if trainer.groups == 1:
            return [Ask.of(config, "trainer", "trainer", least, "cluster.trainer.workers", least)]
        return [Ask.of(config, "trainer", "trainer", least * trainer.groups, "cluster.trainer.groups", least)]

    def checked(self, config: RunConfig) -> bool:
        return self.wanted(config)  # to score trained students, it does not matter how they would be trained now


Part = tuple[Run, Sequence[Train]]


def run(run: Run, steps: Sequence[Train]) -> None:
    """`train` of a single run."""
    train([(run, steps)])


def train(parts: Sequence[Part]) -> None:
    """Train every student that has no published result, those of all parts of a comparison in the same groups.

    Raises:
        ValueError: What a worker found that the user can mend.
        ray.train errors, when our own code fails in a worker or the workers die too often.
    """
    first, jobs, loads = parts[0][0], [], []
    learnt: dict[str, Train] = {}
    for run, steps in parts:
        counts = run.data.counts
        job, left = _job(run, steps, counts)
        jobs += [job] if job.rows else []
        loads += planned_loads(run.config, counts, [step.cell for step in steps])
        learnt |= {str(step.labels or step.source): step for step in left if step.source is not None}
    if jobs:
        check_stored(
            first,
            {s.source.place: s.source for s in learnt.values() if s.source is not None}.values(),
            {s.labels.place: s.labels for s in learnt.values() if s.labels is not None}.values(),
        )
        groups = first.config.cluster.trainer.groups
        ahead = Ahead(loads, groups, first.dir)
        if words := ahead.words():
            say(words)
        _fit(first, jobs, dealt(jobs, loads, groups), ahead)
        first.events.add("stage finished", stage="train", students=sum(len(job.rows) for job in jobs))
    manifests: list[StudentManifest] = [run.finished(step.artifact(run.dir)) for run, steps in parts for step in steps]
    _say_diverged([m for m in manifests if m.get("diverged")])


def _job(run: Run, steps: Sequence[Train], counts: Mapping[int, int]) -> tuple[Job, list[Train]]:
    """What is left to train of a run, and its steps.

    Args:
        counts: Images of each class.
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
    todo, left = [], []
    for step in steps:
        facts = step.identity(run)
        if step.artifact(run.dir).begin(facts, overwrite=config.overwrite) != "done":
            todo.append((step.cell, facts))
            left.append(step)
    job = Job(
        run=run.dir,
        config=config,
        rows=tuple(todo),
        real=Real(tuple(data.train_urls), tuple(s.expected for s in data.train), tuple(s.sha256 for s in data.train)),
        validation=Validation.of(config, data),
        teacher_index=columns,
        class_counts=tuple(counts[c.class_id] for c in data.classes),
        outputs=run.networks.teacher_outputs,
    )
    return job, left


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


def dealt(jobs: Sequence[Job], loads: Sequence[Load], groups: int) -> list[list[Dealt]]:
    """The students of each group, in their order: neighbours stay together.

    Shares are of all students, finished or not, so that a run that goes on gives a group what it gave it before.
    """
    place, views = group_of(loads, groups), {load.folder: load.views for load in loads}
    shares: list[list[Dealt]] = [[] for _ in range(groups)]
    for i, job in enumerate(jobs):
        for k, (row, facts) in enumerate(job.rows):
            shares[place[row.folder]].append(Dealt(i, k, views[row.folder], digest_of(facts)))
    return shares


def _fit(run: Run, jobs: Sequence[Job], shares: Sequence[Sequence[Dealt]], ahead: Ahead | None = None) -> None:
    """Train the rows of the jobs in groups side by side, each its share first."""
    students = run.dir / layout.STUDENTS
    left = [row for job in jobs for row, _ in job.rows]
    # No more groups than students; one without a share has those of the others.
    groups = sorted(sorted(range(len(shares)), key=lambda group: not shares[group])[: len(left)])
    with Progress("train", len(left), "students") as progress:
        # fit() blocks; the published results are the progress that the driver can see without a channel of its own.
        stop = threading.Event()

        def look() -> None:
            for row in [r for r in left if (run.dir / r.folder).exists(layout.MANIFEST)]:
                left.remove(row)
                progress.advance(1, note=row.method)
                words = ahead.finished(row) if ahead is not None else ""
                if words:
                    say(words)

        def watch() -> None:
            seconds = LOOK_SECONDS
            while not stop.wait(seconds):
                begun = time.monotonic()
                look()
                seconds = max(LOOK_SECONDS, 10 * (time.monotonic() - begun))  # a store is asked once for each student

        def lost(reason: str, deaths: int) -> None:
            run.events.add("worker lost", stage="train", reason=reason, deaths=deaths)
            count = f"{deaths} of at most {MAX_DEATHS} before more is reached"
            say(f"train      a worker was lost ({count}); its students go on elsewhere")

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            _fit_groups(run, jobs, shares, groups, lost, lambda: len(left))
        finally:
            stop.set()
            watcher.join()
            look()
    # Its checkpoints are of rows that are published now; the next run's would stand beside them.
    for group in range(len(shares)):  # a run that was cut off may have had more groups at work
        (students / _own_folder(group)).remove()


def _fit_groups(
    run: Run,
    jobs: Sequence[Job],
    shares: Sequence[Sequence[Dealt]],
    groups: Sequence[int],
    lost: Callable[[str, int], None],
    reached: Callable[[], object],
) -> None:
    """Fit the groups side by side; one that fails lets the others finish all students but the one that it was at.

    Raises:
        What the first group that failed raised.
    """
    dealing: Dealing = Dealer(shares) if len(groups) == 1 else SharedDealer(shares)

    def fit_one(group: int) -> None:
        settings = {"jobs": tuple(replace(job, group=group) for job in jobs), "dealing": dealing}
        folder = run.dir / layout.STUDENTS / _own_folder(group)
        fit(train_loop, settings, run.config.cluster.trainer, folder, lost, reached=reached)

    if len(groups) == 1:  # in the main thread, where Ray Train also hears Ctrl-C
        fit_one(groups[0])
        return
    failed: list[BaseException] = []

    def try_one(group: int) -> None:
        try:
            fit_one(group)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=try_one, args=(group,), daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def _own_folder(group: int) -> str:
    """Ray Train's folder of a group, in students/."""
    return RAY_TRAIN if group == 0 else f"{RAY_TRAIN}-{group}"
