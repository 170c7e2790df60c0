"""evaluate: every student of the run on the real validation images, from its published checkpoint."""

from __future__ import annotations

import time
from typing import Any

import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.execution.workers import Events, Progress, device, pin_threads
from ddoq_ray.stages.evaluate.validation import (
    Refused,
    Validation,
    check_refused,
    load_scored,
    say_refused,
    teacher_columns,
)
from ddoq_ray.stages.prepare.step import Data
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.records import StudentRow


def accuracy(model: Any, images: Any, class_ids: Any, columns: Any, batch: int = 500) -> tuple[float, float]:
    """(top-1, top-5) in % of uint8 images [N, 3, S, S], over the outputs `columns` that mean the data's classes.

    With fewer than five classes, top-5 counts all of them.
    """
    import torch

    from ddoq_ray.core.metrics import top_pct, topk_correct

    model.eval()
    top1 = top5 = 0
    for first in range(0, len(images), batch):
        with torch.inference_mode():
            logits = model(images[first : first + batch].float() / 255)[:, columns]
        target = class_ids[first : first + batch]
        top1 += int(topk_correct(logits, target, 1))
        top5 += int(topk_correct(logits, target, min(5, len(columns))))
    return top_pct(top1, len(images)), top_pct(top5, len(images))


@ray.remote
def _evaluate(
    run: Folder, folders: list[str], size: int, validation: Validation, columns: tuple[int, ...], threads: int
) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """(top-1, top-5) of each student, and what was scored and refused; the refused ones are named in quarantine."""
    import json

    import safetensors.torch
    import torch

    from ddoq_ray.models.classifiers import build_classifier

    pin_threads(threads)
    where = device()
    refused = Refused()
    pixels, ids = load_scored(validation, size, refused)
    refused.publish(run)
    facts = {"images": len(ids), "refused": refused.total, "reasons": refused.reasons}
    if not len(ids):
        return [], facts
    images, class_ids = torch.from_numpy(pixels).to(where), torch.from_numpy(ids).to(where)
    outputs = torch.tensor(columns, device=where)
    scores = []
    for name in folders:
        folder = run / name
        settings = json.loads(folder.read("config.json"))
        model = build_classifier(
            settings["arch"], settings["num_classes"], settings["image_size"], settings["mean"], settings["std"]
        ).to(where)
        model.load_state_dict(safetensors.torch.load(folder.read("model.safetensors")))
        scores.append(accuracy(model, images, class_ids, outputs))
    return scores, facts


def run(
    config: RunConfig, run_folder: Folder, rows: list[StudentRow], data: Data, events: Events
) -> list[dict[str, Any]]:
    """Evaluate the rows and publish ``report/rows.json``; cheap, so always done anew.

    A student that diverged has no weights and no accuracy: its row says so.

    Raises:
        ValueError: More of the validation images than `max_bad_fraction` cannot be scored.
    """
    start = time.time()
    trained = {row.folder: Artifact(run_folder / row.folder, "train").require() for row in rows}
    whole = [row.folder for row in rows if not trained[row.folder].get("diverged")]
    tasks = max(1, min(len(whole), 2))
    resources = config.cluster.teacher
    task = _evaluate.options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)
    shared = (config.student.image_size, Validation.of(config, data), teacher_columns(data), config.cluster.threads)
    refs = [task.remote(run_folder, whole[i::tasks], *shared) for i in range(tasks)]
    measured: dict[str, tuple[float, float]] = {}
    facts: dict[str, Any] = {}
    with Progress("evaluate", len(rows), "students") as progress:
        progress.advance(len(rows) - len(whole))
        for i, ref in enumerate(refs):
            scores, facts = ray.get(ref)
            check_refused(config, run_folder, facts["images"], facts["refused"], facts["reasons"])
            measured |= dict(zip(whole[i::tasks], scores, strict=True))
            progress.advance(len(scores))
    say_refused("evaluate", run_folder, facts)
    ordered = [_row(trained[r.folder], measured.get(r.folder), facts) for r in rows]
    report = run_folder / "report"
    report.publish_json("rows.json", ordered)
    report.publish_json(
        "evaluate.json",
        {
            "seconds": round(time.time() - start, 3),
            "unit": "images",
            "items": facts["images"] * len(whole),
            "bytes": sum(s.bytes for s in data.val),
        },
    )
    events.add("stage finished", stage="evaluate", students=len(rows), **facts)
    return ordered


TOLD = ("method", "ipc", "student", "seed", "epochs", "train_images", "best_top1_pct", "best_epoch", "seconds")


def _row(trained: dict[str, Any], score: tuple[float, float] | None, facts: dict[str, Any]) -> dict[str, Any]:
    """A line of ``rows.json``: what the student is, and its accuracy on the images that could be scored."""
    top1, top5 = score if score is not None else (None, None)
    return {k: trained[k] for k in TOLD} | {
        "top1_pct": top1,
        "top5_pct": top5,
        "val_images": facts["images"],
        "val_refused": facts["refused"],
        "diverged": bool(trained.get("diverged")),
    }
