"""The report of a comparison: its estimate before it starts; its lines, tables and page when students are scored."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from ddoq_ray.config.compare import HARD, CompareConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.execution.console import span
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.streams import emit
from ddoq_ray.execution.workers import say
from ddoq_ray.provenance import commit, hardware
from ddoq_ray.stages.cells import own_set
from ddoq_ray.stages.encode.step import quarantine_reasons
from ddoq_ray.stages.report import trackers
from ddoq_ray.stages.report.step import finite, set_images, stage_costs, student_curves
from ddoq_ray.stages.sizes import Sizes
from ddoq_ray.stages.step import Step
from ddoq_ray.stages.train.step import Train
from ddoq_ray.stages.work import estimate
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import FILES, Artifact, file_facts, with_check
from ddoq_ray.storage.evaluated import evaluated
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import Place
from ddoq_ray.storage.manifests import ResultRow

Part = tuple[Run, Sequence[Step]]
SHOWN_IPC = 10  # images a class of the sets that the page shows, at most where there are such


def say_estimate(parts: Sequence[Part]) -> None:
    """How many students and image sets there will be, and how long they take by the rates of `calibrate`."""
    total = 0.0
    unknown: set[str] = set()
    names = [step.name for run, steps in parts for step in steps if step.wanted(run.config)]
    for run, steps in parts:
        left = [s for s in steps if s.wanted(run.config) and not _done(run, s)]
        seconds, missing = estimate(run.config, left, Sizes(run.config, run.data, run.networks))
        total, unknown = total + seconds, unknown | missing
    sets = names.count("synthesize") + names.count("select")
    told = f"compare    {names.count('train')} students on {sets} image sets: "
    told += f"about {span(total)} are left" if total or not unknown else "how long they take is not known here yet"
    if unknown:
        left_out = f"without {', '.join(sorted(unknown))}; " if total else ""
        told += (
            f" ({left_out}`ddoq-ray calibrate` with the keys of a student and a teacher measures it in a minute; of "
            "students the first that is finished tells it)"
        )
    say(told)


def _done(run: Run, step: Step) -> bool:
    return step.artifact(run.dir).manifest() is not None


def run(parts: Sequence[Part], asked: CompareConfig) -> str:
    """Write ``report/``: results.json, the table as Markdown and CSV, and the page; return the page's path."""
    from ddoq_ray.page.comparison import csv_table, markdown_table, text_table
    from ddoq_ray.page.render import render_page

    start, first = time.time(), parts[0][0]
    report = first.dir / layout.REPORT
    _, rows = evaluated(report)
    results = _results(parts, asked, rows)
    costs = stage_costs(first.dir, [step for _, steps in parts for step in steps])
    seconds = round(time.time() - start, 3)
    costs.append({"stage": "report", "seconds": seconds, "items": len(rows), "unit": "students", "bytes": 0})
    results = finite(results | {"stages": costs})
    places = _shown(parts)
    images = set_images(first, places)
    report.publish(layout.PAGE, render_page(results, images).encode())
    report.publish(layout.TABLE, markdown_table(results).encode() if rows else b"")
    report.publish(layout.TABLE_CSV, csv_table(results).encode())
    files = file_facts(report, [layout.PAGE, layout.TABLE, layout.TABLE_CSV])
    report.publish_json(layout.RESULTS, with_check(results | {FILES: files}))
    if rows:
        emit(text_table(results), sys.stdout)
    if asked.tracking is not None:
        told = results | {"rows": results["students"], "curves": finite(_curves(parts))}
        say(f"report     {asked.tracking}: {trackers.hand_over(asked.tracking, report, told, images)}")
    path = report.path(layout.PAGE)
    say(f"report     {path}")
    return path


def _results(parts: Sequence[Part], asked: CompareConfig, rows: Sequence[ResultRow]) -> dict[str, Any]:
    """What ``results.json`` holds beside the costs."""
    first = parts[0][0]
    unscored = quarantine_reasons(first.dir, "val-*.jsonl")
    refused = quarantine_reasons(first.dir) + unscored
    return {
        "name": os.path.basename(first.dir.uri),
        "dataset": asked.dataset.title,
        "own_method": asked.own_method if asked.own_method in asked.methods else "",
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "ddoq-ray " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "hardware": hardware(),
        "versions": first.networks.environment | {"python": sys.version.split()[0]},
        "config": plain(asked),
        "counts": {
            "train_images": sum(s.samples for s in first.data.train),
            "classes": len(first.data.classes),
            "val_images": rows[0]["val_images"] if rows else sum(s.samples for s in first.data.val),
            "val_refused": rows[0]["val_refused"] if rows else sum(unscored.values()),
        },
        "comparison": {"reference": asked.reference, "lines": _lines(parts, asked, rows)},
        "students": [_labelled(row) for row in rows],
        "quarantine": {"samples": sum(refused.values()), "reasons": dict(refused)},
    }


def _curves(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Of every student, for a tracker, which knows it by its method, IPC, architecture, labels and seed."""
    curves = []
    for run, steps in parts:
        for cell in (step.cell for step in steps if isinstance(step, Train)):
            setting = os.path.basename(cell.folder).removesuffix(f"-seed{cell.seed}")
            name = f"{cell.method}-ipc{cell.ipc}-{setting}"
            curves += [curve | {"method": name} for curve in student_curves(run.dir, [cell])]
    return curves


def _labelled(row: ResultRow) -> dict[str, Any]:
    """A student's row, with the kind of labels that it learnt in place of a mark behind its protocol's name."""
    hard = row["protocol"].endswith(HARD)
    return {**row, "labels": "hard" if hard else "soft", "protocol": row["protocol"].removesuffix(HARD)}


def _lines(parts: Sequence[Part], asked: CompareConfig, rows: Sequence[ResultRow]) -> list[dict[str, Any]]:
    """A line a setting, ipc and method, with its costs and what papers report of it."""
    from ddoq_ray.core.comparison import SETTING, lines_of, settings_of
    from ddoq_ray.page.reported import reported

    told = [_labelled(row) | ({"labels": "hard"} if asked.labels.mode == "hard" else {}) for row in rows]
    lines = lines_of(told, asked.reference)
    costs = _costs(parts)
    order, methods = settings_of(lines), list(dict.fromkeys((*asked.methods, *(line["method"] for line in lines))))

    def place(line: Mapping[str, Any]) -> tuple[float, ...]:
        ipc = math.inf if line["ipc"] is None else line["ipc"]
        return order.index(tuple(line[k] for k in SETTING)), ipc, methods.index(line["method"])

    for line in lines:
        hard = HARD if line["labels"] == "hard" and asked.labels.mode != "hard" else ""
        key = (line["student"], line["size"], line["teacher"], line["protocol"] + hard, line["ipc"], line["method"])
        line |= costs[key] | {"reported": reported(asked.reported_as, line)}
    return sorted(lines, key=place)


def _costs(parts: Sequence[Part]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Bytes and seconds of each line, by (student, size, teacher, protocol, ipc, method); means over its students."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run, steps in parts:
        for step in (s for s in steps if isinstance(s, Train) and _done(run, s)):
            cell = step.cell
            ipc = None if step.source is None else cell.ipc
            key = (cell.student, cell.size, cell.teacher, cell.protocol, ipc, cell.method)
            found.setdefault(key, []).append(_cost(run, step))
    means: dict[tuple[Any, ...], dict[str, Any]] = {}
    for key, each in found.items():
        figures = [name for name in each[0] if name != "device"]
        means[key] = {name: fmean(cost[name] for cost in each) for name in figures} | {"device": each[0]["device"]}
    return means


def _cost(run: Run, step: Train) -> dict[str, Any]:
    """Of one student: bytes of its images and labels; seconds of the clock of what made them, and of its training.

    Images that were made through latents have the encoder's seconds too, whole, though all methods share them.
    """
    images: dict[str, Any] = {"bytes": sum(s.bytes for s in run.data.train), "seconds": 0.0}
    seconds = 0.0
    if step.source is not None:
        images = run.finished(step.source.artifact(run.dir))
        seconds = images["seconds"]
        method = step.source.method
        if method.quantizer is not None or {"latents", "codebook"} & set(method.reads):
            seconds += run.finished(Artifact(run.latents, "encode"))["seconds"]
        of_its_own = method.quantizer is not None
        at = step.source.at if of_its_own else own_set(run.config) if "codebook" in method.reads else None
        book = Artifact(run.dir / at.codebook, "quantize").manifest() if at is not None else None
        seconds += book["seconds"] if book is not None else 0.0
    labels = run.finished(step.labels.artifact(run.dir)) if step.labels is not None else {"bytes": 0, "seconds": 0.0}
    trained = run.finished(step.artifact(run.dir))
    how = run.config.cluster.trainer
    device = how.num_gpus or how.num_cpus
    return {
        "images_bytes": images["bytes"],
        "labels_bytes": labels["bytes"],
        "images_s": round(seconds, 3),
        "labels_s": labels["seconds"],
        "train_s": trained["seconds"],
        "train_device_s": round(trained["seconds"] * device * how.workers, 3),
        "device": "gpu" if how.num_gpus else "cpu",
    }


def _shown(parts: Sequence[Part]) -> dict[str, Place]:
    """method -> the image set that the page shows of it: at the largest ipc up to 10, else at the smallest."""
    ipcs = sorted({run.config.ipc for run, _ in parts})
    shown = max((k for k in ipcs if k <= SHOWN_IPC), default=ipcs[0])
    places: dict[str, Place] = {}
    for run, steps in parts:
        for step in (s for s in steps if isinstance(s, Train)):
            at = step.source.at if step.source is not None and run.config.ipc == shown else None
            if at is None:
                continue
            if step.cell.method not in places and at not in places.values() and _made(run.dir, at):
                places[step.cell.method] = at
    return places


def _made(run_dir: Folder, at: Place) -> bool:
    return (run_dir / at.images).exists(layout.MANIFEST)
