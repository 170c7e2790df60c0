"""evaluate: every student of the run on the real validation images, from its published checkpoint."""

from __future__ import annotations

import time
from typing import Any

import ray

from ddoq_ray.artifacts import Artifact, Folder
from ddoq_ray.config import RunConfig
from ddoq_ray.pictures import Resize
from ddoq_ray.records import StudentRow
from ddoq_ray.runtime import Events, Progress, device, pin_threads
from ddoq_ray.stages.prepare import Data


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
    run: Folder,
    folders: list[str],
    size: int,
    resize: Resize,
    val_urls: list[str],
    teacher_index: list[int],
    threads: int,
) -> list[dict[str, Any]]:
    import json

    import safetensors.torch
    import torch

    from ddoq_ray.models.classifiers import build_classifier
    from ddoq_ray.samples import load_arrays

    pin_threads(threads)
    where = device()
    pixels, ids, _ = load_arrays(val_urls, size, len(teacher_index), resize=resize)
    images, class_ids = torch.from_numpy(pixels).to(where), torch.from_numpy(ids).to(where)
    columns = torch.tensor(teacher_index, device=where)
    rows = []
    for name in folders:
        folder = run / name
        settings = json.loads(folder.read("config.json"))
        model = build_classifier(
            settings["arch"], settings["num_classes"], settings["image_size"], settings["mean"], settings["std"]
        ).to(where)
        model.load_state_dict(safetensors.torch.load(folder.read("model.safetensors")))
        top1, top5 = accuracy(model, images, class_ids, columns)
        rows.append({"top1_pct": top1, "top5_pct": top5, "val_images": len(ids)})
    return rows


def run(
    config: RunConfig, run_folder: Folder, rows: list[StudentRow], data: Data, events: Events
) -> list[dict[str, Any]]:
    """Evaluate the rows and publish ``report/rows.json``; cheap, so always done anew."""
    start = time.time()
    trained = [Artifact(run_folder / row.folder, "train").require() for row in rows]
    tasks = min(len(rows), 2)
    resources = config.cluster.teacher
    indices = [int(c.teacher_index) for c in data.classes if c.teacher_index is not None]
    refs = [
        _evaluate.options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus).remote(
            run_folder,
            [r.folder for r in rows[i::tasks]],
            config.student.image_size,
            config.encoder.resize,
            data.val_urls,
            indices,
            config.cluster.threads,
        )
        for i in range(tasks)
    ]
    measured = {}
    with Progress("evaluate", len(rows), "students") as progress:
        for i, ref in enumerate(refs):
            part = ray.get(ref)
            measured |= dict(zip((r.folder for r in rows[i::tasks]), part, strict=True))
            progress.advance(len(part))
    told = ("method", "ipc", "student", "seed", "epochs", "train_images", "best_top1_pct", "best_epoch", "seconds")
    ordered = [{k: t[k] for k in told} | measured[r.folder] for r, t in zip(rows, trained, strict=True)]
    report = run_folder / "report"
    report.publish_json("rows.json", ordered)
    report.publish_json(
        "evaluate.json",
        {
            "seconds": round(time.time() - start, 3),
            "unit": "images",
            "items": sum(r["val_images"] for r in ordered),
            "bytes": sum(s.bytes for s in data.val),
        },
    )
    events.add("stage finished", stage="evaluate", students=len(rows))
    return ordered
