"""report: what the distilled sets are worth, as results.json, one HTML page, and a table on the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.execution.class_tasks import readings
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.streams import emit
from ddoq_ray.execution.workers import Progress, say
from ddoq_ray.provenance import commit
from ddoq_ray.stages.cells import Cell, cells, label_key, methods
from ddoq_ray.stages.encode.heldout import Heldout
from ddoq_ray.stages.encode.step import Encode, quarantine_reasons
from ddoq_ray.stages.evaluate.step import Evaluate
from ddoq_ray.stages.report import trackers
from ddoq_ray.stages.step import Ask, Step
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import FILES, Artifact, file_facts, with_check
from ddoq_ray.storage.class_latents import class_latents
from ddoq_ray.storage.codebook import ClassRows, parts_with_classes
from ddoq_ray.storage.evaluated import evaluated, read_record
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_index import latent_index
from ddoq_ray.storage.latent_log import noise_of
from ddoq_ray.storage.layout import Place
from ddoq_ray.storage.manifests import ImagesManifest, ResultRow, StageCost
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.records import binary_rows

BASELINE = "random"  # what every method is paired with

Log = tuple[Folder, npt.NDArray[np.int32]]  # a latent log, and the shards of it that hold what is wanted


@ray.remote(num_cpus=0.5)
def _distances(
    codebook: Folder, parts: dict[str, list[int]], latents: Log, heldout: Log | None
) -> list[dict[str, Any]]:
    """Distortion and exact W2 of each class of some codebook parts, by optimal transport on the class's latents."""
    os.environ["POT_BACKEND_DISABLE_PYTORCH"] = "1"  # else POT loads torch: seconds and 0.9 GB for nothing
    from ddoq_ray.core.distortion import distortion, scheme_weights, w2_squared

    wanted = [c for classes in parts.values() for c in classes]
    noise = noise_of(codebook)
    unseen = dict(class_latents(*heldout, wanted, noise)) if heldout is not None else {}
    books = ClassRows(codebook, parts)
    rows = []
    for c, x in class_latents(*latents, wanted, noise):
        table = books.of(c)
        mine = {name: table[name].to_numpy() for name in ("weight", "distortion", "stream_count")}
        centroids, weights = binary_rows(table["centroid"], "<f4"), mine["weight"]
        row = {
            "class_id": c,
            "n": len(x),
            "k": len(weights),
            "distortion": float(mine["distortion"][0]),
            "w2_voronoi": float(np.sqrt(w2_squared(x, centroids, weights))),
            "weight_min": float(weights.min()),
            "weight_max": float(weights.max()),
        }
        for scheme in ("uniform", "sqrt"):
            row[f"w2_{scheme}"] = float(np.sqrt(w2_squared(x, centroids, scheme_weights(weights, scheme))))
        if mine["stream_count"].any():
            row["w2_stream"] = float(np.sqrt(w2_squared(x, centroids, scheme_weights(mine["stream_count"]))))
        if c in unseen:
            row["heldout_n"] = len(unseen[c])
            row["heldout_distortion"] = distortion(unseen[c], centroids)
            row["heldout_w2_voronoi"] = float(np.sqrt(w2_squared(unseen[c], centroids, weights)))
        rows.append(row)
    return rows


def class_distances(
    run: Run, codebooks: Mapping[str, Place], heldout: tuple[Folder, int] | None
) -> list[dict[str, Any]]:
    """One row a class of every codebook.

    Each has method, ipc, class_id, name, n, k, distortion, the W2 of four weights (w2_voronoi, w2_uniform, w2_sqrt,
    and w2_stream where the algorithm kept counts), weight_min and weight_max; where the class has held-out latents
    also heldout_n, heldout_distortion and heldout_w2_voronoi (the codebook's own weights).

    Args:
        codebooks: method -> where its codebook is.
        heldout: The log of held-out latents, and how many shards it has.
    """
    latents = run.latents
    index = latent_index(latents, len(run.data.train))
    unseen = latent_index(*heldout) if heldout is not None else None
    jobs = []
    for method, place in codebooks.items():
        codebook = run.dir / place.codebook
        names, classes, dim = parts_with_classes(codebook)
        for reading in readings(index, classes, dim):
            mine = {names[part]: classes[part] for part in reading.parts}
            log = None
            if heldout is not None and unseen is not None:
                log = (heldout[0], unseen.holding([c for part in mine.values() for c in part]))
            task = _distances.options(**reading.options)
            jobs.append((method, len(mine), task.remote(codebook, mine, (latents, reading.shards), log)))
    rows = []
    with Progress("report", sum(parts for _, parts, _ in jobs), "codebook parts") as progress:
        for method, parts, ref in jobs:
            for row in ray.get(ref):
                name = run.data.classes[row["class_id"]].name
                rows.append({"method": method, "ipc": run.config.ipc, "name": name, **row})
            progress.advance(parts)
    return rows


def paired(rows: Sequence[ResultRow], ipc: int) -> list[dict[str, Any]]:
    """Each method against `random`, seed by seed: mean and std of the top-1 difference, in points.

    A method of which a student diverged is not compared, nor is anything with `random` if one of its did: the mean of
    the seeds that went well is not the method's.
    """
    from ddoq_ray.core.metrics import paired_difference

    by_method: dict[str, dict[int, float]] = {}
    diverged = {row["method"] for row in rows if row["top1_pct"] is None or row.get("diverged")}
    for row in rows:
        top1 = row["top1_pct"]
        if row["method"] not in diverged and top1 is not None:
            by_method.setdefault(row["method"], {})[row["seed"]] = top1
    base = by_method.get(BASELINE, {})
    lines = []
    for method, values in by_method.items():
        seeds = sorted(set(values) & set(base))
        if method == BASELINE or not seeds:
            continue
        d = paired_difference([values[s] for s in seeds], [base[s] for s in seeds])
        std = None if np.isnan(d.std) else d.std
        lines.append(
            {"method": method, "baseline": BASELINE, "ipc": ipc, "n": d.n, "mean_diff_pct": d.mean, "std_diff_pct": std}
        )
    return lines


def stage_costs(run_dir: Folder, steps: Sequence[Step]) -> list[StageCost]:
    """Seconds, items and bytes of each kind of step, from the manifests; the sum of its steps."""
    costs: dict[str, StageCost] = {}
    for step in steps:
        manifest = None if step.name == Evaluate.name else step.artifact(run_dir).manifest()
        if manifest is None or manifest["stage"] != step.name:
            continue
        none: StageCost = {"stage": step.name, "seconds": 0.0, "items": 0, "unit": manifest["unit"], "bytes": 0}
        total = costs.setdefault(step.name, none)
        total["seconds"] += manifest["seconds"]
        total["items"] += manifest["items"]
        total["bytes"] += manifest["bytes"]
    made, _ = evaluated(run_dir / layout.REPORT)
    if made is not None:
        costs["evaluate"] = cast(
            StageCost, {"stage": "evaluate"} | {key: made[key] for key in ("seconds", "items", "unit", "bytes")}
        )
    return list(costs.values())


def student_curves(run_dir: Folder, trained: Sequence[Cell]) -> list[dict[str, Any]]:
    """Of each student that has them: its epochs, and the loss and the top-1 at each."""
    curves = []
    for cell in trained:
        student = run_dir / cell.folder
        artifact = Artifact(student, "train")
        if layout.METRICS in (artifact.manifest() or {}).get(FILES, {}):
            lines = artifact.read(layout.METRICS)
        elif student.exists(layout.METRICS):  # it is at work
            lines = student.read(layout.METRICS)
        else:
            continue
        points = [json.loads(line) for line in lines.splitlines()]
        curves.append(
            {
                "method": cell.method,
                "seed": cell.seed,
                "epochs": [p["epoch"] for p in points],
                "train_loss": [p["train_loss"] for p in points],
                "top1_pct": [p["top1_pct"] for p in points],
            }
        )
    return curves


def set_images(run: Run, places: Mapping[str, Place]) -> list[dict[str, Any]]:
    """The first distilled images of each method, as many as the page takes."""
    from ddoq_ray.data.image_set import read_images
    from ddoq_ray.page.render import MAX_IMAGES

    found = []
    for method, place in places.items():
        images = run.dir / place.images
        for count, item in enumerate(read_images([images.path(n) for n in images.names(layout.IMAGE_SHARDS)])):
            if count == MAX_IMAGES:
                break
            width, height = item.picture.size
            found.append(
                {
                    "method": method,
                    "class_id": item.class_id,
                    "class_name": run.data.classes[item.class_id].name,
                    "centroid_id": item.centroid_id,
                    "weight": item.weight,
                    "png": item.data,
                    "width": width,
                    "height": height,
                }
            )
    return found


def _counts(data: Data, images: ImagesManifest | None, rows: Sequence[ResultRow], unscored: int) -> dict[str, int]:
    """Figures of the page's head; the validation images are those that were scored, where students were."""
    indexed = sum(s.samples for s in data.val)
    return {
        "train_images": sum(s.samples for s in data.train),
        "classes": len(data.classes),
        "distilled_images": images["items"] if images else 0,
        "constant_images": images.get("constant", 0) if images else 0,
        "val_images": rows[0]["val_images"] if rows else indexed,
        "val_refused": rows[0].get("val_refused", 0) if rows else unscored,
    }


def finite(value: Any) -> Any:
    """A nested value for JSON: what is not a finite number is null, since JSON has no word for it."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


@dataclass(frozen=True)
class Report(Step):
    """The page and ``results.json``, made anew from what is there."""

    stage = name = "report"

    @property
    def place(self) -> str:
        return layout.REPORT

    def settings(self, config: RunConfig) -> dict[str, Any]:
        del config
        return {}

    def asks(self, config: RunConfig) -> list[Ask]:
        return [Ask("task that measures codebooks", 1, 0.5)]


def run(run: Run, asked: RunConfig, heldout: Heldout, steps: Sequence[Step]) -> str:
    """Gather everything, write ``report/results.json`` and ``report/index.html``; return the page's path.

    Args:
        asked: The configuration as it was given.
        heldout: Held-out latents on their way; waited for here.
        steps: All of the run, for the costs.
    """
    from ddoq_ray.page import accuracy_table, render_page

    start = time.time()
    report = run.dir / layout.REPORT
    classes, unseen = _measured_classes(run, heldout)
    results = _results(run, asked, [c for c in cells(asked) if _made(run.dir, c.folder)])
    results |= {"classes": classes, "heldout": unseen}
    costs = stage_costs(run.dir, steps)
    seconds = round(time.time() - start, 3)
    costs.append({"stage": "report", "seconds": seconds, "items": len(classes), "unit": "classes", "bytes": 0})
    results = finite(results | {"stages": costs})
    images = set_images(run, _shown(run))
    report.publish(layout.PAGE, render_page(results, images).encode())
    report.publish_json(layout.RESULTS, with_check(results | {FILES: file_facts(report, [layout.PAGE])}))
    if results["rows"]:
        emit(accuracy_table(results), sys.stdout)
    if run.config.tracking is not None:
        say(f"report     {run.config.tracking}: {trackers.hand_over(run.config.tracking, report, results, images)}")
    path = report.path(layout.PAGE)
    say(f"report     {path}")
    return path


def _made(run_dir: Folder, place: str) -> bool:
    return (run_dir / place).exists(layout.MANIFEST)


def _shown(run: Run) -> dict[str, Place]:
    """method -> the image set that the page shows of it: each set once, though methods of other weights share it."""
    shown: dict[str, Place] = {}
    for method in methods(run.config):
        if method.sets and method.sets[0] not in shown.values() and _made(run.dir, method.sets[0].images):
            shown[method.name] = method.sets[0]
    return shown


def _measured_classes(run: Run, heldout: Heldout) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row a class of every codebook, and the facts of the held-out latents."""
    codebooks: dict[str, Place] = {}
    for method in methods(run.config):
        place = method.codebook
        if place is not None and place not in codebooks.values() and _made(run.dir, place.codebook):
            codebooks[method.name] = place
    unseen = heldout.wait()
    encoded = Artifact(run.latents, Encode.name).manifest()
    if encoded is not None and encoded.get("kept", True):
        log = None if heldout.missing else (heldout.folder, heldout.shards)
        return class_distances(run, codebooks, log), unseen
    # latents.keep=false: measured when the latents were still there
    report = run.dir / layout.REPORT
    before = read_record(report, layout.RESULTS, "report") or {}
    return before.get("classes", []), before.get("heldout", unseen)


def _results(run: Run, asked: RunConfig, trained: Sequence[Cell]) -> dict[str, Any]:
    """What ``results.json`` holds beside codebooks and costs."""
    _, measured = evaluated(run.dir / layout.REPORT)
    images = cast("ImagesManifest | None", Artifact(run.dir / Place().images, "synthesize").manifest())
    checked = Artifact(run.dir / Place().labels(label_key(asked)), "label").manifest()
    unscored = quarantine_reasons(run.dir, "val-*.jsonl")
    refused = quarantine_reasons(run.dir) + unscored
    return {
        "name": os.path.basename(run.dir.uri),
        "dataset": asked.dataset.title,
        "ipc": asked.ipc,
        "own_method": asked.own_method,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "ddoq-ray " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "versions": run.networks.environment | {"python": sys.version.split()[0]},
        "config": plain(asked),
        "counts": _counts(run.data, images, measured, sum(unscored.values())),
        "teacher": checked["teacher"] | {"split": "val"} if checked else None,
        "rows": measured,
        "paired": paired(measured, asked.ipc),
        "curves": student_curves(run.dir, trained),
        "quarantine": {"samples": sum(refused.values()), "reasons": dict(refused)},
    }
