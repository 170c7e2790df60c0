"""report: what the distilled sets are worth, as results.json, one HTML page, and a table on the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.execution.class_tasks import readings
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.streams import emit
from ddoq_ray.execution.workers import Events, Progress, commit, say
from ddoq_ray.stages.encode.heldout import Heldout
from ddoq_ray.stages.encode.step import quarantine_reasons
from ddoq_ray.stages.prepare.step import Data
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.class_latents import class_latents
from ddoq_ray.storage.codebook import ClassRows, parts_with_classes
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_index import latent_index
from ddoq_ray.storage.latent_log import noise_of
from ddoq_ray.storage.records import StudentRow, binary_rows

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
    run: Folder,
    folders: dict[str, str],
    latents: tuple[Folder, int],
    heldout: tuple[Folder, int] | None,
    data: Data,
    ipc: int,
) -> list[dict[str, Any]]:
    """One row a class of every codebook in `folders`.

    Each has method, ipc, class_id, name, n, k, distortion, the W2 of four weights (w2_voronoi, w2_uniform, w2_sqrt,
    and w2_stream where the algorithm kept counts), weight_min and weight_max; where the class has held-out latents
    also heldout_n, heldout_distortion and heldout_w2_voronoi (the codebook's own weights).

    Args:
        latents: A latent log and how many shards it has.
        heldout: The same of the held-out latents.
    """
    index = latent_index(*latents)
    unseen = latent_index(*heldout) if heldout is not None else None
    jobs = []
    for method, f in folders.items():
        codebook = run / f / "codebook"
        names, classes, dim = parts_with_classes(codebook)
        for reading in readings(index, classes, dim):
            mine = {names[part]: classes[part] for part in reading.parts}
            log = None
            if heldout is not None and unseen is not None:
                log = (heldout[0], unseen.holding([c for part in mine.values() for c in part]))
            task = _distances.options(**reading.options)
            jobs.append((method, len(mine), task.remote(codebook, mine, (latents[0], reading.shards), log)))
    rows = []
    with Progress("report", sum(parts for _, parts, _ in jobs), "codebook parts") as progress:
        for method, parts, ref in jobs:
            for row in ray.get(ref):
                rows.append({"method": method, "ipc": ipc, "name": data.classes[row["class_id"]].name, **row})
            progress.advance(parts)
    return rows


def paired(rows: Sequence[dict[str, Any]], ipc: int) -> list[dict[str, Any]]:
    """Each method against `random`, seed by seed: mean and std of the top-1 difference, in points.

    A method of which a student diverged is not compared, nor is anything with `random` if one of its did: the mean of
    the seeds that went well is not the method's.
    """
    from ddoq_ray.core.metrics import paired_difference

    by_method: dict[str, dict[int, float]] = {}
    diverged = {row["method"] for row in rows if row["top1_pct"] is None or row.get("diverged")}
    for row in rows:
        if row["method"] not in diverged:
            by_method.setdefault(row["method"], {})[row["seed"]] = row["top1_pct"]
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


def stage_costs(run: Folder, folders: Sequence[str], trained: Sequence[StudentRow]) -> list[dict[str, Any]]:
    """Seconds, items and bytes of each stage, from the manifests; a stage of several sets is their sum."""
    places: list[tuple[str, Folder]] = [
        ("prepare", run / "data"),
        ("encode", run / "latents"),
        ("heldout", run / "heldout"),
    ]
    for folder in folders:
        made = run / folder
        places += [("quantize", made / "codebook"), ("synthesize", made / "images"), ("label", made / "labels")]
    places += [("train", run / row.folder) for row in trained]
    costs: dict[str, dict[str, Any]] = {}
    for stage, place in places:
        manifest = Artifact(place, stage).manifest()
        if manifest is None or manifest["stage"] != stage:
            continue
        if stage == "synthesize" and "synthesizer" not in manifest["identity"]:
            stage = "select"  # real images, in the same format
        none = {"stage": stage, "seconds": 0.0, "items": 0, "unit": manifest["unit"], "bytes": 0}
        total = costs.setdefault(stage, none)
        for key in ("seconds", "items", "bytes"):
            total[key] += manifest[key]
    if (run / "report").exists("evaluate.json"):
        costs["evaluate"] = {"stage": "evaluate", **(run / "report").read_json("evaluate.json")}
    return list(costs.values())


def _curves(run: Folder, trained: Sequence[StudentRow]) -> list[dict[str, Any]]:
    curves = []
    for row in trained:
        if not (run / row.folder).exists("metrics.jsonl"):
            continue
        points = [json.loads(line) for line in (run / row.folder).read("metrics.jsonl").splitlines()]
        curves.append(
            {
                "method": row.method,
                "seed": row.seed,
                "epochs": [p["epoch"] for p in points],
                "train_loss": [p["train_loss"] for p in points],
                "top1_pct": [p["top1_pct"] for p in points],
            }
        )
    return curves


def _images(run: Folder, folders: dict[str, str], data: Data, limit: int = 600) -> list[dict[str, Any]]:
    """The first `limit` distilled images of each method, for the page."""
    from ddoq_ray.data.image_set import read_images

    found = []
    for method, folder in folders.items():
        images = run / folder / "images"
        for count, item in enumerate(read_images([images.path(n) for n in images.names("images-*.tar")])):
            if count == limit:
                break
            width, height = item.picture.size
            found.append(
                {
                    "method": method,
                    "class_id": item.class_id,
                    "class_name": data.classes[item.class_id].name,
                    "centroid_id": item.centroid_id,
                    "weight": item.weight,
                    "png": item.data,
                    "width": width,
                    "height": height,
                }
            )
    return found


def _counts(data: Data, images: dict[str, Any] | None, rows: Sequence[dict[str, Any]], unscored: int) -> dict[str, int]:
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


def run(
    config: RunConfig,
    run_folder: Folder,
    data: Data,
    networks: Networks,
    latents: Folder,
    heldout: Heldout,
    codebooks: dict[str, str],
    image_sets: dict[str, str],
    label_folders: Sequence[str],
    rows: Sequence[StudentRow],
    events: Events,
) -> str:
    """Gather everything, write ``report/results.json`` and ``report/index.html``; return the page's path.

    Args:
        heldout: Held-out latents on their way; waited for here.
        codebooks: method -> folder of those that have a codebook.
        image_sets: method -> folder of those whose images the page shows.
        label_folders: All image sets, for the costs.
        rows: Students whose results are wanted; those that are not trained are left out.
    """
    from ddoq_ray.page import accuracy_table, render_page

    start = time.time()
    report = run_folder / "report"
    measured = report.read_json("rows.json") if report.exists("rows.json") else []
    have_latents = latents.exists("manifest.json") and latents.read_json("manifest.json").get("kept", True)
    made = {m: f for m, f in codebooks.items() if (run_folder / f / "codebook").exists("manifest.json")}
    drawn = {m: f for m, f in image_sets.items() if (run_folder / f / "images").exists("manifest.json")}
    unseen = heldout.wait(events)
    if have_latents:
        log = None if heldout.missing else (heldout.folder, heldout.shards)
        classes = class_distances(run_folder, made, (latents, len(data.train)), log, data, config.ipc)
    else:  # latents.keep=false: measured when the latents were still there
        before = report.read_json("results.json") if report.exists("results.json") else {}
        classes, unseen = before.get("classes", []), before.get("heldout", unseen)
    trained = [r for r in rows if (run_folder / r.folder).exists("manifest.json")]
    labels = run_folder / "labels"
    images = Artifact(run_folder / "images", "synthesize").manifest()
    checked = Artifact(labels, "label").manifest()
    unscored = quarantine_reasons(run_folder, "val-*.jsonl")
    refused = quarantine_reasons(run_folder) + unscored
    results: dict[str, Any] = {
        "name": os.path.basename(run_folder.uri),
        "dataset": config.dataset.title,
        "ipc": config.ipc,
        "own_method": config.own_method,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "ddoq-ray " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "versions": networks.environment | {"python": sys.version.split()[0]},
        "config": plain(config),
        "counts": _counts(data, images, measured, sum(unscored.values())),
        "teacher": checked["teacher"] | {"split": "val"} if checked else None,
        "rows": measured,
        "paired": paired(measured, config.ipc),
        "classes": classes,
        "heldout": unseen,
        "curves": _curves(run_folder, trained),
        "quarantine": {"samples": sum(refused.values()), "reasons": dict(refused)},
    }
    costs = stage_costs(run_folder, label_folders, trained)
    seconds = round(time.time() - start, 3)
    costs.append({"stage": "report", "seconds": seconds, "items": len(classes), "unit": "classes", "bytes": 0})
    results["stages"] = costs
    results = finite(results)
    report.publish_json("results.json", results)
    report.publish("index.html", render_page(results, _images(run_folder, drawn, data)).encode())
    if measured:
        emit(accuracy_table(results), sys.stdout)
    path = report.path("index.html")
    say(f"report     {path}")
    return path
