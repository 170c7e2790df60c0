"""train: one Ray Train run trains all students, row by row, by weighted KL against the teacher's soft labels.

Starting a Ray Train run costs seconds, so many (method, seed) rows share one. A row whose manifest is published is
never trained again. What a worker does is in train_worker.py.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.execution.networks import Networks, check_batches
from ddoq_ray.execution.workers import Events, Progress, say
from ddoq_ray.stages.evaluate.validation import Validation, teacher_columns
from ddoq_ray.stages.label.step import check_scored
from ddoq_ray.stages.prepare.step import Data
from ddoq_ray.stages.train.failures import own_words, worth_retrying
from ddoq_ray.stages.train.worker import Job, train_loop
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.records import StudentRow

MAX_DEATHS = 3  # of workers; an exception of the work itself is not tried again
RAY_TRAIN = "train"  # Ray Train's own folder in students/


def identity(config: RunConfig) -> dict[str, Any]:
    return {
        "student": plain(config.student),
        "resize": config.encoder.resize,
        "protocol": {k: v for k, v in plain(config.protocol).items() if k != "name"},
        "across_classes": config.weights.across_classes,
        "seed": config.seed,
        "workers": config.cluster.trainer.workers,
    }


class Inputs:
    """The digests of what students train on, each manifest read once: rows share image sets and labels."""

    def __init__(self, run_folder: Folder, data: Data, networks: Networks) -> None:
        self.run, self.data, self.networks = run_folder, data, networks
        self._read: dict[tuple[str, str], dict[str, Any]] = {}
        self._data_digest: str | None = None

    def manifest(self, folder: str, stage: str) -> dict[str, Any]:
        key = (folder, stage)
        if key not in self._read:
            self._read[key] = Artifact(self.run / folder, stage).require()
        return self._read[key]

    def images(self, row: StudentRow) -> str:
        if row.images != "data":
            return str(self.manifest(row.images, "synthesize")["digest"])
        if self._data_digest is None:
            self._data_digest = self.data.digest
        return self._data_digest

    def labels(self, row: StudentRow) -> str | None:
        return str(self.manifest(row.labels, "label")["digest"]) if row.labels else self.networks.teacher_id


def row_identity(config: RunConfig, row: StudentRow, inputs: Inputs) -> dict[str, Any]:
    """What a student depends on: more seeds or more baselines later leave the others as they are."""
    made_of = {"images": inputs.images(row), "labels": inputs.labels(row)}
    return identity(config) | made_of | {"scheme": row.scheme, "student_seed": row.seed}


def run(
    config: RunConfig, run_folder: Folder, rows: list[StudentRow], data: Data, events: Events, networks: Networks
) -> list[dict[str, Any]]:
    """Train every row that has no published result, in one Ray Train run; the rows' manifests come back.

    Raises:
        ValueError: What a worker found that the user can mend.
        ray.train errors, when our own code fails in a worker or the workers die too often.
    """
    inputs = Inputs(run_folder, data, networks)
    columns = teacher_columns(data)
    for folder in dict.fromkeys(row.labels for row in rows if row.labels):
        label = inputs.manifest(folder, "label")
        check_scored(config, run_folder, label)
        _check_labels(run_folder / folder, label, columns, networks)
    # As they were made: classes with fewer distinct images than centroids leave another last batch than was planned.
    made = {row.images: inputs.manifest(row.images, "synthesize")["items"] for row in rows if row.images != "data"}
    check_batches(made, config, networks)
    todo = []
    for row in rows:
        facts = row_identity(config, row, inputs)
        if Artifact(run_folder / row.folder, "train").begin(facts, overwrite=config.overwrite) != "done":
            todo.append((row, facts))
    if todo:
        counts = data.counts
        job = Job(
            run=run_folder,
            config=config,
            rows=tuple(todo),
            train_urls=tuple(data.train_urls),
            validation=Validation.of(config, data),
            teacher_index=columns,
            class_counts=tuple(counts[c.class_id] for c in data.classes),
            outputs=networks.teacher_outputs,
        )
        _fit(config, run_folder, job, events)
        events.add("stage finished", stage="train", students=len(todo))
    manifests = [Artifact(run_folder / r.folder, "train").require() for r in rows]
    _say_diverged([m for m in manifests if m.get("diverged")])
    return manifests


def _check_labels(folder: Folder, label: dict[str, Any], columns: Sequence[int], networks: Networks) -> None:
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


def _say_diverged(diverged: Sequence[dict[str, Any]]) -> None:
    for m in diverged:
        say(
            f"train      {m['method']} seed {m['seed']} diverged: its loss was not a finite number in epoch "
            f"{m['diverged_epoch']} of {m['epochs']}; it has no accuracy (a smaller protocol.lr is the usual mend)"
        )


def _fit(config: RunConfig, run_folder: Folder, job: Job, events: Events) -> None:
    students = run_folder / "students"
    with Progress("train", len(job.rows), "students") as progress:
        # fit() blocks; the published results are the progress that the driver can see without a channel of its own.
        stop = threading.Event()
        left = [row for row, _ in job.rows]

        def look() -> None:
            for row in [r for r in left if (run_folder / r.folder).exists("manifest.json")]:
                left.remove(row)
                progress.advance(1, note=row.method)

        def watch() -> None:
            while not stop.wait(1.0):
                look()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            _fit_through_deaths(config, students, job, events)
        finally:
            stop.set()
            watcher.join()
            look()
    # Its checkpoints are of rows that are published now; the next run's would stand beside them.
    (students / RAY_TRAIN).remove()


def _fit_through_deaths(config: RunConfig, students: Folder, job: Job, events: Events) -> None:
    """Fit; after a death once more, from the last checkpoint. Ray Train itself would try any exception again.

    Raises:
        ValueError: A worker's, in its own words.
    """
    for deaths in range(MAX_DEATHS + 1):
        try:
            _trainer(config, students, job).fit()
            return
        except ray.train.TrainingFailedError as error:
            told = own_words(error)
            if told is not None:
                raise ValueError(told) from None
            if deaths == MAX_DEATHS or not worth_retrying(error, config.cluster.trainer.workers):
                raise
            events.add("worker lost", stage="train", reason=type(error).__name__, deaths=deaths + 1)
            say(f"train      a worker was lost ({deaths + 1} of at most {MAX_DEATHS}); its students go on elsewhere")


def _trainer(config: RunConfig, students: Folder, job: Job) -> TorchTrainer:
    resources = config.cluster.trainer
    return TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.num_gpus > 0,
            resources_per_worker={"CPU": resources.num_cpus}
            | ({"GPU": resources.num_gpus} if resources.num_gpus else {}),
        ),
        run_config=ray.train.RunConfig(
            name=RAY_TRAIN,
            storage_path=students.uri,
            failure_config=ray.train.FailureConfig(max_failures=0),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
