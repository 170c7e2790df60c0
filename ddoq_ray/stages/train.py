"""train: one Ray Train run trains all students, row by row, by weighted KL against the teacher's soft labels.

Starting a Ray Train run costs seconds, so many (method, seed) rows share one. A row whose manifest is published is
never trained again. What a worker does is in train_worker.py.
"""

from __future__ import annotations

import threading
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from ddoq_ray.artifacts import Artifact, Folder
from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.records import StudentRow
from ddoq_ray.runtime import Events, Progress
from ddoq_ray.stages.networks import Networks
from ddoq_ray.stages.prepare import Data
from ddoq_ray.stages.train_worker import Job, train_loop


def identity(config: RunConfig) -> dict[str, Any]:
    return {
        "student": plain(config.student),
        "resize": config.encoder.resize,
        "protocol": {k: v for k, v in plain(config.protocol).items() if k != "name"},
        "across_classes": config.weights.across_classes,
        "seed": config.seed,
        "workers": config.cluster.trainer.workers,
    }


def row_identity(
    config: RunConfig, run_folder: Folder, row: StudentRow, data: Data, networks: Networks
) -> dict[str, Any]:
    """What a student depends on: more seeds or more baselines later leave the others as they are."""
    if row.images == "data":
        source = data.digest
    else:
        source = Artifact(run_folder / row.images, "synthesize").require()["digest"]
    labels = Artifact(run_folder / row.labels, "label").require()["digest"] if row.labels else networks.teacher_id
    return identity(config) | {"images": source, "labels": labels, "scheme": row.scheme, "student_seed": row.seed}


def run(
    config: RunConfig, run_folder: Folder, rows: list[StudentRow], data: Data, events: Events, networks: Networks
) -> list[dict[str, Any]]:
    """Train every row that has no published result, in one Ray Train run; the rows' manifests come back.

    Raises:
        ray.train errors, when our own code fails in a worker or the workers fail too often.
    """
    todo = []
    for row in rows:
        facts = row_identity(config, run_folder, row, data, networks)
        if Artifact(run_folder / row.folder, "train").begin(facts, overwrite=config.overwrite) != "done":
            todo.append((row, facts))
    if todo:
        stored = {row.labels for row, _ in todo if row.labels}
        codecs = {Artifact(run_folder / f, "label").require()["codec"] for f in stored}
        job = Job(
            run=run_folder,
            config=config,
            rows=tuple(todo),
            train_urls=tuple(data.train_urls),
            val_urls=tuple(data.val_urls),
            teacher_index=tuple(int(c.teacher_index) for c in data.classes if c.teacher_index is not None),
            class_counts=tuple(data.counts.values()),
            outputs=networks.teacher_outputs,
            codec=next(iter(codecs), "logits"),
        )
        _fit(config, run_folder, job)
        events.add("stage finished", stage="train", students=len(todo))
    return [Artifact(run_folder / r.folder, "train").require() for r in rows]


def _fit(config: RunConfig, run_folder: Folder, job: Job) -> None:
    resources = config.cluster.trainer
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.num_gpus > 0,
            resources_per_worker={"CPU": resources.num_cpus}
            | ({"GPU": resources.num_gpus} if resources.num_gpus else {}),
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=(run_folder / "students").uri,
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    with Progress("train", len(job.rows), "students") as progress:
        # fit() blocks; the published results are the progress that the driver can see without a channel of its own.
        stop = threading.Event()

        def watch() -> None:
            shown = 0
            while not stop.wait(1.0):
                done = sum((run_folder / r.folder).exists("manifest.json") for r, _ in job.rows)
                if done > shown:
                    progress.advance(done - shown, note=job.rows[done - 1][0].method)
                    shown = done

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            trainer.fit()
        finally:
            stop.set()
            watcher.join()
            progress.advance(len(job.rows) - progress.done)
