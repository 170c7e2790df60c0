"""evaluate: every student of the run on the real validation images, from its published checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Progress, device, pin_threads
from ddoq_ray.stages.cells import Cell
from ddoq_ray.stages.evaluate.validation import (
    Refused,
    Validation,
    check_refused,
    in_batches,
    say_refused,
    scored_images,
    teacher_columns,
)
from ddoq_ray.stages.step import Ask, Step
from ddoq_ray.stages.train.step import Train
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import FILES, Artifact, file_facts, with_check
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.manifests import ResultRow, Scored, StudentManifest

BATCH = 500  # images of a forward pass
HELD_BYTES = 4 << 30  # of students in one task, about: a comparison may have hundreds


@ray.remote
def _evaluate(
    run: Folder, folders: list[str], size: int, validation: Validation, columns: tuple[int, ...], threads: int
) -> tuple[list[tuple[float, float]], Scored]:
    """(top-1, top-5) of each student, and what was scored and refused; the refused ones are named in quarantine.

    In memory are the students and a batch of images, however many images there are.
    """
    import json

    import safetensors.torch
    import torch

    from ddoq_ray.core.metrics import top_pct
    from ddoq_ray.models.accuracy import correct_counts  # torch: only in the task
    from ddoq_ray.models.classifiers import classifier_of

    pin_threads(threads)
    where = device()
    models = []
    for name in folders:
        student = Artifact(run / name, Train.name)
        models.append(classifier_of(json.loads(student.read(layout.NETWORK))).to(where))
        models[-1].load_state_dict(safetensors.torch.load(student.read(layout.WEIGHTS)))
    outputs, refused, scored = torch.tensor(columns, device=where), Refused(), 0
    correct = torch.zeros(len(models), 2, dtype=torch.int64, device=where)
    for pixels, ids in in_batches(scored_images(validation, size, validation.crop, refused), BATCH):
        images, class_ids = torch.from_numpy(pixels).to(where), torch.tensor(ids, device=where)
        scored += len(ids)
        for row, model in enumerate(models):
            correct[row] += correct_counts(model, images, class_ids, outputs, BATCH)
    refused.publish(run)
    facts: Scored = {"images": scored, "refused": refused.total, "reasons": refused.reasons}
    scores = [(top_pct(top1, scored), top_pct(top5, scored)) for top1, top5 in correct.tolist()] if scored else []
    return scores, facts


@dataclass(frozen=True)
class Evaluate(Step):
    """The accuracy of every student; cheap, so always measured anew."""

    stage = name = "evaluate"

    @property
    def place(self) -> str:
        return layout.REPORT

    def settings(self, config: RunConfig) -> dict[str, Any]:
        del config
        return {}

    def asks(self, config: RunConfig) -> list[Ask]:
        return [Ask.of(config, "evaluator", "evaluation task")]


Part = tuple[Run, Sequence[Train]]


def run(run: Run, steps: Sequence[Train]) -> None:
    """`evaluate` of a single run."""
    evaluate([(run, steps)])


def evaluate(parts: Sequence[Part]) -> None:
    """Evaluate the students of all parts of a comparison, and publish ``report/rows.json``.

    A student that diverged has no weights and no accuracy: its row says so.

    Raises:
        ValueError: More of the validation images than `max_bad_fraction` cannot be scored.
    """
    start = time.time()
    first = parts[0][0]
    trained: dict[str, StudentManifest] = {
        s.place: run.finished(s.artifact(run.dir)) for run, steps in parts for s in steps
    }
    measured: dict[str, tuple[float, float]] = {}
    facts: dict[str, Scored] = {}
    with Progress("evaluate", len(trained), "students") as progress:
        # Students that see the same validation images in the same way are scored together.
        for seen in _alike(parts).values():
            run = seen[0][0]
            places = [s.place for _, steps in seen for s in steps]
            whole = [place for place in places if not trained[place].get("diverged")]
            progress.advance(len(places) - len(whole))
            tasks = tasks_for(len(whole), sum(trained[place]["bytes"] for place in whole))
            found, scored = _measure(run, whole, tasks, progress)
            measured |= found
            facts |= dict.fromkeys(places, scored)
    told = next(iter(facts.values()))
    say_refused("evaluate", first.dir, told)
    steps = [s for _, steps in parts for s in steps]
    ordered = [_row(s.cell, trained[s.place], measured.get(s.place), facts[s.place]) for s in steps]
    report = first.dir / layout.REPORT
    report.publish_json(layout.ROWS, ordered)
    report.publish_json(
        layout.EVALUATE,
        with_check(
            {
                "seconds": round(time.time() - start, 3),
                "unit": "images",
                "items": told["images"] * len(measured),
                "bytes": sum(s.bytes for s in first.data.val),
                FILES: file_facts(report, [layout.ROWS]),
            }
        ),
    )
    first.events.add("stage finished", stage="evaluate", students=len(steps), **told)


def _alike(parts: Sequence[Part]) -> dict[tuple[Any, ...], list[Part]]:
    """The parts whose students see the same pixels and have the same outputs."""
    found: dict[tuple[Any, ...], list[Part]] = {}
    for run, steps in parts:
        key = (run.config.student.image_size, run.config.protocol.val_crop, teacher_columns(run.data))
        found.setdefault(key, []).append((run, steps))
    return found


def tasks_for(students: int, nbytes: int) -> int:
    """Tasks that score students of so many bytes in all: two, and more where one would hold more than `HELD_BYTES`.

    Each of them reads all validation images.

    >>> tasks_for(0, 0), tasks_for(1, 10**6), tasks_for(30, 10**9), tasks_for(400, 40 * 10**9)
    (1, 1, 2, 10)
    """
    return max(1, min(students, max(2, -(-nbytes // HELD_BYTES))))


def _measure(
    run: Run, whole: list[str], tasks: int, progress: Progress
) -> tuple[dict[str, tuple[float, float]], Scored]:
    """(folder -> (top-1, top-5), what was scored) of the students that did not diverge, in so many tasks."""
    config = run.config
    resources = config.cluster.evaluator
    task = _evaluate.options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)
    validation = Validation.of(config, run.data)
    shared = (config.student.image_size, validation, teacher_columns(run.data), config.cluster.threads)
    refs = [task.remote(run.dir, whole[i::tasks], *shared) for i in range(tasks)]
    measured: dict[str, tuple[float, float]] = {}
    facts: Scored = {"images": 0, "refused": 0, "reasons": ""}
    for i, ref in enumerate(refs):
        scores, facts = ray.get(ref)
        check_refused(config, run.dir, facts["images"], facts["refused"], facts["reasons"])
        measured |= dict(zip(whole[i::tasks], scores, strict=True))
        progress.advance(len(scores))
    return measured, facts


def _row(cell: Cell, trained: StudentManifest, score: tuple[float, float] | None, facts: Scored) -> ResultRow:
    """What the student is, and its accuracy on the images that could be scored."""
    top1, top5 = score if score is not None else (None, None)
    return {
        "method": trained["method"],
        "ipc": trained["ipc"],
        "student": trained["student"],
        "size": cell.size,
        "teacher": cell.teacher,
        "protocol": cell.protocol,
        "seed": trained["seed"],
        "epochs": trained["epochs"],
        "train_images": trained["train_images"],
        "best_top1_pct": trained["best_top1_pct"],
        "best_epoch": trained["best_epoch"],
        "seconds": trained["seconds"],
        "top1_pct": top1,
        "top5_pct": top5,
        "val_images": facts["images"],
        "val_refused": facts["refused"],
        "diverged": bool(trained.get("diverged")),
    }
