"""The report page: one self-contained HTML file from the results dictionary and the distilled images.

`render_page` is pure: no Ray, no network, no file but its own template. The report stage gathers what it shows.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from statistics import fmean, stdev
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from ddoq_ray.core.sizing import in_bytes
from ddoq_ray.page.charts import Series, dot_whisker, legend_sample, line_chart
from ddoq_ray.page.codebook import codebook_section
from ddoq_ray.page.comparison import comparison_section
from ddoq_ray.page.tables import METHODS, AccuracyLine, accuracy_lines, count, method_order, method_slots, number

SHOWN_SIDE = 128  # CSS pixels; larger images are shown at most this large
ENLARGED_SIDE = 64  # smaller images are enlarged by a whole factor to about this
EMBEDDED_SIDE = 256  # what is larger is scaled down before it goes into the page (sharp on a 2x display)
MAX_IMAGES = 600  # images a method may put in the page, in whole classes


def render_page(results: Mapping[str, Any], images: Sequence[Mapping[str, Any]]) -> str:
    """Render the report.

    Args:
        results: what the report stage writes as results.json (rows, paired, classes, heldout, curves, stages,
            quarantine, teacher, counts, config, versions). Any part may be missing or empty; its section then says so.
            With `comparison` (lines, reference) these stand in the place of accuracy, curves and codebooks.
        images: distilled images, each with method, class_id, class_name, centroid_id, weight, png (encoded bytes),
            width, height.

    Returns:
        The whole HTML document. It refers to nothing outside itself.
    """
    own = str(results.get("own_method") or "")
    named = [str(part.get("method", "")) for key in ("rows", "classes", "curves") for part in results.get(key) or []]
    named += [str(line["method"]) for line in (results.get("comparison") or {}).get("lines", [])]
    methods = method_order(named + [str(image.get("method", "")) for image in images], own)
    slots = method_slots(methods, own)
    lines = accuracy_lines(results)
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(resources.files("ddoq_ray.page").joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        r=results,
        own=own,
        slots=slots,
        descriptions=METHODS,
        headline=_headline(results, lines, own),
        accuracy=_accuracy(lines, slots),
        galleries=_galleries(images, methods),
        curves=_curves(results, slots, own),
        codebook=codebook_section(results, methods, own),
        stages=_stages(results.get("stages") or []),
        quarantine=_quarantine(results.get("quarantine"), results.get("counts") or {}),
        teacher=_teacher(results.get("teacher")),
        config=list(_flatten(results.get("config") or {})),
        comparison=comparison_section(results, slots),
    )


def _headline(results: Mapping[str, Any], lines: list[AccuracyLine], own: str) -> dict[str, Any]:
    counts = results.get("counts") or {}
    real, made = number(counts.get("train_images")), number(counts.get("distilled_images"))
    ipc = results.get("ipc")
    own_line = next((li for li in lines if li.method == own and li.ipc == ipc and li.top1), None)
    own_line = own_line or next((li for li in lines if li.method == own and li.top1), None)

    def beside(method: str) -> AccuracyLine | None:
        for line in lines:
            if line.method != method or line.top1 is None:
                continue
            if own_line is None or (line.student == own_line.student and line.ipc in (own_line.ipc, None)):
                return line
        return None

    figures = []
    for line, word in (
        (own_line, "distilled"),
        (beside("random") if own != "random" else None, "random real images"),
        (beside("full") if own != "full" else None, "full training set"),
    ):
        if line is not None and line.top1 is not None:
            figures.append({"line": line, "word": word, "mean": f"{line.top1.mean:.1f}", "std": line.top1.std})
    return {
        "real": count(real),
        "made": count(made),
        "constant": count(counts.get("constant_images") or None),
        "classes": count(counts.get("classes")),
        "val": count(counts.get("val_images")),
        "val_refused": count(counts.get("val_refused") or None),
        "fewer": f"{real / made:,.0f}" if real and made and real > made else "",
        "share": f"{100 * made / real:.4f}" if real and made and real >= made else "",
        "share_text": f"{100 * made / real:.2g}" if real and made and real >= made else "",
        "figures": figures,
        "own": own_line,
    }


def _accuracy(lines: list[AccuracyLine], slots: Mapping[str, str]) -> dict[str, Any]:
    # `full` lies far above and would squeeze the others together: it has no dot.
    dotted = [li for li in lines if li.top1 and li.method != "full"]
    ends = [li.top1.mean + sign * (li.top1.std or 0.0) for li in dotted if li.top1 for sign in (-1, 1)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    groups: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    # `full` has no ipc: with one student and one ipc it stands in that ipc's table, else in its own group.
    ipcs = {li.ipc for li in lines if li.ipc is not None}
    for li in lines:
        ipc = next(iter(ipcs)) if len(ipcs) == 1 else li.ipc
        strip = Markup("")
        if li.top1 and li.method != "full":
            strip = dot_whisker(li.top1.mean, li.top1.std, low, high, slots[li.method])
        paired = number((li.paired or {}).get("mean_diff_pct"))
        groups.setdefault((li.student, ipc), []).append(
            {
                "line": li,
                "strip": strip,
                "images": count(li.images),
                "sign": "" if paired is None else "up" if paired > 0 else "down" if paired < 0 else "",
                "pairs": count((li.paired or {}).get("n")),
            }
        )
    return {
        "groups": [{"student": s, "ipc": i, "lines": g} for (s, i), g in groups.items()],
        "axis": f"{low:.1f} to {high:.1f} %" if dotted else "",
        "one_seed": any(li.seeds == 1 for li in lines),
        "diverged": any(li.diverged for li in lines),
    }


def _data_uri(image: Mapping[str, Any]) -> str:
    data = bytes(image["png"])
    if max(int(image["width"]), int(image["height"])) > EMBEDDED_SIDE:
        with Image.open(io.BytesIO(data)) as picture:
            small = picture.convert("RGB")
        small.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, format="JPEG", quality=88)
        data = buffer.getvalue()
    kind = "png"
    if data[:3] == b"\xff\xd8\xff":
        kind = "jpeg"
    elif data[8:12] == b"WEBP":
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _shown_size(width: int, height: int) -> tuple[int, int, bool]:
    """Size on the page and whether the image is enlarged: whole factors keep the pixels square."""
    side = max(width, height, 1)
    if side < ENLARGED_SIDE:
        factor = max(1, round(ENLARGED_SIDE / side))
        return width * factor, height * factor, factor > 1
    scale = min(1.0, SHOWN_SIDE / side)
    return max(1, round(width * scale)), max(1, round(height * scale)), False


def _galleries(images: Sequence[Mapping[str, Any]], methods: list[str]) -> list[dict[str, Any]]:
    galleries = []
    for method in methods:
        by_class: dict[int, list[Mapping[str, Any]]] = {}
        for image in images:
            if str(image.get("method", "")) == method:
                by_class.setdefault(int(image["class_id"]), []).append(image)
        if not by_class:
            continue
        top = max(number(i.get("weight")) or 0.0 for group in by_class.values() for i in group) or 1.0
        rows: list[dict[str, Any]] = []
        shown = 0
        for class_id in sorted(by_class):
            group = sorted(by_class[class_id], key=lambda i: (-(number(i.get("weight")) or 0.0), int(i["centroid_id"])))
            if rows and shown + len(group) > MAX_IMAGES:
                break
            shown += len(group)
            cells = []
            for image in group:
                width, height, enlarged = _shown_size(int(image["width"]), int(image["height"]))
                weight = number(image.get("weight"))
                cells.append(
                    {
                        "uri": _data_uri(image),
                        "width": width,
                        "height": height,
                        "enlarged": enlarged,
                        "centroid_id": image["centroid_id"],
                        "weight": "" if weight is None else f"{weight:.3f}",
                        "bar": f"{100 * max(weight or 0.0, 0.0) / top:.1f}",
                    }
                )
            rows.append({"class_id": class_id, "name": str(group[0].get("class_name") or class_id), "cells": cells})
        galleries.append({"method": method, "rows": rows, "shown": shown, "classes": len(by_class)})
    return galleries


def _curves(results: Mapping[str, Any], slots: Mapping[str, str], own: str) -> dict[str, Any] | None:
    ipc = results.get("ipc")
    # A curve may name its ipc; those of another ipc are left out, and `full` has none.
    curves = [c for c in results.get("curves") or [] if c.get("epochs") and c.get("ipc", ipc) in (ipc, None)]
    if not curves:
        return None
    charts = {}
    for key in ("top1_pct", "train_loss"):
        series = []
        for method in method_order((str(c.get("method", "")) for c in curves), own):
            at: dict[float, list[float]] = {}
            for curve in (c for c in curves if str(c.get("method", "")) == method):
                # Epochs that were not evaluated have no value; lists cut short by an interruption are kept.
                for epoch, value in zip(curve["epochs"], curve.get(key) or [], strict=False):
                    if (kept := number(value)) is not None:
                        at.setdefault(float(epoch), []).append(kept)
            xs = sorted(at)
            mean = [fmean(at[x]) for x in xs]
            half = [stdev(at[x]) if len(at[x]) > 1 else 0.0 for x in xs]
            low = [m - h for m, h in zip(mean, half, strict=True)]
            high = [m + h for m, h in zip(mean, half, strict=True)]
            series.append(Series(method, slots[method], xs, mean, low, high))
        charts[key] = series
    return {
        "legend": [
            {
                "method": s.label,
                "sample": legend_sample(s.slot),
                "last": f"{s.mean[-1]:.1f}" if s.mean else "",
                "last_loss": f"{loss.mean[-1]:.3g}" if loss.mean else "",
            }
            for s, loss in zip(charts["top1_pct"], charts["train_loss"], strict=True)
        ],
        "top1": line_chart(charts["top1_pct"], title="Top-1 accuracy by epoch", unit=" %", floor=0.0, ceiling=100.0),
        "loss": line_chart(charts["train_loss"], title="Training loss by epoch", floor=0.0),
    }


def _bytes(value: Any) -> str:
    kept = number(value)
    return "" if kept is None else in_bytes(kept)


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _stages(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not stages:
        return None
    seconds = [number(s.get("seconds")) or 0.0 for s in stages]
    top = max(seconds) or 1.0
    rows = []
    for stage, took in zip(stages, seconds, strict=True):
        items = number(stage.get("items"))
        rate = items / took if items and took > 0 else None
        unit = str(stage.get("unit") or "items")
        rows.append(
            {
                "stage": str(stage.get("stage", "")),
                "seconds": _seconds(took),
                "bar": f"{100 * took / top:.1f}",
                "items": f"{count(items)} {unit}" if items is not None else "",
                "bytes": _bytes(stage.get("bytes")),
                "rate": "" if rate is None else f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s",
            }
        )
    return {"rows": rows, "total": _seconds(sum(seconds))}


def _quarantine(quarantine: Mapping[str, Any] | None, counts: Mapping[str, Any]) -> dict[str, Any] | None:
    if not quarantine:
        return None
    reasons = sorted((quarantine.get("reasons") or {}).items(), key=lambda item: (-item[1], item[0]))
    samples = number(quarantine.get("samples")) or 0
    validation = count(counts.get("val_refused") or None)
    told = [(r, count(n)) for r, n in reasons]
    return {"samples": int(samples), "text": count(samples), "reasons": told, "validation": validation}


def _teacher(teacher: Mapping[str, Any] | None) -> dict[str, str] | None:
    if not teacher:
        return None
    top1 = number(teacher.get("top1_pct"))
    return {
        "arch": str(teacher.get("arch") or "unnamed"),
        "split": str(teacher.get("split") or ""),
        "top1": "" if top1 is None else f"{top1:.2f}",
    }


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of a nested configuration."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flatten(part, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(part, (Mapping, list, tuple)) for part in value):
        for i, part in enumerate(value):
            yield from _flatten(part, f"{prefix}[{i}]")
    elif isinstance(value, (list, tuple)):
        yield prefix, ", ".join(map(str, value)) or "none"
    elif prefix:
        yield prefix, "null" if value is None else str(value)
