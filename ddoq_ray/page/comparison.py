"""A comparison as tables (terminal, Markdown, CSV) and as a section of the page, from the lines of ``results.json``."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddoq_ray.core.comparison import FULL, SETTING, settings_of
from ddoq_ray.core.sizing import in_bytes
from ddoq_ray.page.charts import Axis, Series, dot_whisker, legend_sample, line_chart
from ddoq_ray.page.tables import count, method_order

Line = Mapping[str, Any]
NOTE = (
    "top-1 in percent at the last epoch, mean +- sample standard deviation over seeds; differences are paired by seed, "
    "with Student's 95 % interval of their mean; HLR: hard-label recovery (points below all real images with hard "
    "labels; DD-Ranking, arXiv 2505.13300); reported: papers' own figures, by their protocols, not measured here"
)
CSV_FIELDS = (
    *SETTING, "protocol", "ipc", "method", "train_images", "seeds", "mean_pct", "std_pct", "diverged", "against",
    "against_mean_pct", "against_low_pct", "against_high_pct", "against_n", "ior_pct", "hlr_pct", "images_bytes",
    "labels_bytes", "images_s", "labels_s", "train_s", "train_device_s", "device", "reported",
)  # fmt: skip


def score(line: Line, pm: str = "+-") -> str:
    """Mean and spread of a line; what is there instead where a student diverged."""
    if line["diverged"]:
        return f"{line['diverged']} of {len(line['seeds'])} diverged"
    if line["mean_pct"] is None:
        return "-"
    return f"{line['mean_pct']:.2f}" + ("" if line["std_pct"] is None else f" {pm} {line['std_pct']:.2f}")


def difference(line: Line) -> str:
    """The paired difference with its interval."""
    d = line["against"]
    if d is None:
        return "-"
    interval = "" if d["low_pct"] is None else f" [{d['low_pct']:+.2f}, {d['high_pct']:+.2f}]"
    return f"{d['mean_pct']:+.2f}{interval}"


def beyond(line: Line) -> str:
    """`up` or `down` where the interval of the difference leaves out 0."""
    d = line["against"]
    if d is None or d["low_pct"] is None or d["low_pct"] <= 0 <= d["high_pct"]:
        return ""
    return "up" if d["mean_pct"] > 0 else "down"


def in_seconds(value: float) -> str:
    """Seconds at a tick: whole ones, with a digit behind the point below ten."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def published(line: Line) -> str:
    return "; ".join(f"{r['top1_pct']:.1f} ({r['source']}; {r['protocol']})" for r in line["reported"]) or "-"


def _optional(lines: Sequence[Line]) -> dict[str, Callable[[Line], str]]:
    """Columns of settings in which the lines differ."""
    columns: dict[str, Callable[[Line], str]] = {
        "student": lambda li: f"{li['student']}, {li['size']} px",
        "teacher": lambda li: str(li["teacher"]),
        "labels": lambda li: str(li["labels"]),
    }
    return {name: text for name, text in columns.items() if len({text(line) for line in lines}) > 1}


def _columns(lines: Sequence[Line], reference: str) -> dict[str, Callable[[Line], str]]:
    columns: dict[str, Callable[[Line], str]] = {
        "method": lambda li: str(li["method"]),
        "ipc": lambda li: "all" if li["ipc"] is None else str(li["ipc"]),
        **_optional(lines),
        "seeds": lambda li: str(len(li["seeds"])),
        "top-1": score,
    }
    if any(line["against"] for line in lines):
        columns[f"against {reference} [95 %]"] = difference
    if any(line["hlr_pct"] is not None for line in lines):
        columns["HLR"] = lambda li: "-" if li["hlr_pct"] is None else f"{li['hlr_pct']:.2f}"
    columns["image bytes"] = lambda li: in_bytes(li["images_bytes"])
    columns["label bytes"] = lambda li: in_bytes(li["labels_bytes"]) if li["labels_bytes"] else "-"
    columns["s to make, label, train"] = lambda li: " ".join(
        f"{li[key]:.1f}" for key in ("images_s", "labels_s", "train_s")
    )
    if any(line["reported"] for line in lines):
        columns["reported"] = published
    return columns


def _title(results: Mapping[str, Any]) -> str:
    lines: Sequence[Line] = results["comparison"]["lines"]
    fixed = [f"{name} {lines[0][name]}" for name in ("student", "teacher", "labels") if name not in _optional(lines)]
    return f"{results['dataset']}, {', '.join(fixed)}, {count(results['counts']['val_images'])} validation images"


def text_table(results: Mapping[str, Any]) -> str:
    """The lines as aligned plain text (ASCII), for a terminal."""
    head, body = _cells(results)
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *body)]
    return "\n".join([_title(results), rows[0], "  ".join("-" * w for w in widths), *rows[1:], NOTE])


def markdown_table(results: Mapping[str, Any]) -> str:
    """The lines as a Markdown page of one table."""
    head, body = _cells(results)
    rows = [f"| {' | '.join(cell.replace('|', ' ') for cell in row)} |" for row in (head, *body)]
    return "\n".join([f"# {_title(results)}", "", rows[0], "|" + "---|" * len(head), *rows[1:], "", NOTE + ".", ""])


def _cells(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    comparison = results["comparison"]
    columns = _columns(comparison["lines"], comparison["reference"])
    return list(columns), [[text(line) for text in columns.values()] for line in comparison["lines"]]


def csv_table(results: Mapping[str, Any]) -> str:
    """The lines as CSV, figures as they are; what is not known is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for line in results["comparison"]["lines"]:
        d = line["against"] or {}
        mine = {f"against_{key}": d.get(key) for key in ("mean_pct", "low_pct", "high_pct", "n")}
        row = line | mine | {"against": d.get("method"), "seeds": len(line["seeds"])}
        writer.writerow(row | {"reported": "; ".join(f"{r['top1_pct']:g}" for r in line["reported"])})
    return out.getvalue()


def comparison_section(results: Mapping[str, Any], slots: Mapping[str, str]) -> dict[str, Any] | None:
    """What the page shows: a table and three charts for each student, teacher and kind of labels."""
    comparison = results.get("comparison")
    if not comparison or not comparison["lines"]:
        return None
    groups = []
    for setting in settings_of(comparison["lines"]):
        lines = [line for line in comparison["lines"] if tuple(line[name] for name in SETTING) == setting]
        student, size, teacher, labels = setting
        words = f"{student} at {size} px, " + ("hard labels" if labels == "hard" else f"soft labels of {teacher}")
        groups.append({"title": words, "ipcs": _by_ipc(lines, slots)} | _charts(lines, slots))
    return {
        "groups": groups,
        "methods": len({line["method"] for line in comparison["lines"]}),
        "reference": comparison["reference"] if any(line["against"] for line in comparison["lines"]) else "",
        "recovery": any(line["hlr_pct"] is not None for line in comparison["lines"]),
        "published": any(line["reported"] for line in comparison["lines"]),
    }


def _by_ipc(lines: Sequence[Line], slots: Mapping[str, str]) -> list[dict[str, Any]]:
    found = []
    for ipc in dict.fromkeys(line["ipc"] for line in lines):
        mine = [line for line in lines if line["ipc"] == ipc]
        known = [line for line in mine if line["mean_pct"] is not None]
        ends = [line["mean_pct"] + sign * (line["std_pct"] or 0.0) for line in known for sign in (-1, 1)]
        rows = []
        for line in mine:
            strip = ""
            if line in known and ipc is not None:
                strip = dot_whisker(line["mean_pct"], line["std_pct"], min(ends), max(ends), slots[line["method"]])
            rows.append(
                {
                    "method": line["method"],
                    "images": count(line["train_images"]),
                    "seeds": len(line["seeds"]),
                    "score": score(line, "±"),
                    "strip": strip,
                    "difference": "" if line["against"] is None else difference(line).replace("-", "−"),
                    "sign": beyond(line),
                    "hlr": "" if line["hlr_pct"] is None else f"{line['hlr_pct']:.2f}",
                    "bytes": in_bytes(line["images_bytes"] + line["labels_bytes"]),
                    "seconds": f"{line['images_s'] + line['labels_s']:.1f} + {line['train_s']:.1f}",
                    "reported": line["reported"],
                }
            )
        found.append({"ipc": ipc, "rows": rows})
    return found


def _charts(lines: Sequence[Line], slots: Mapping[str, str]) -> dict[str, Any]:
    """Accuracy against images per class, bytes and seconds; without the whole training set, which has no ipc."""
    shown = [line for line in lines if line["method"] != FULL and line["mean_pct"] is not None]
    methods = method_order((line["method"] for line in shown), "")
    axes: list[tuple[str, Axis, Callable[[Line], float]]] = [
        ("images per class", Axis("images per class", log=True), lambda li: li["ipc"]),
        (
            "bytes of images and labels",
            Axis("bytes of images and labels", log=True, text=in_bytes),
            lambda li: li["images_bytes"] + li["labels_bytes"],
        ),
        (
            "seconds to make, label and train",
            Axis("seconds to make, label and train once", log=True, text=in_seconds),
            lambda li: li["images_s"] + li["labels_s"] + li["train_s"],
        ),
    ]
    charts = []
    for words, axis, where in axes:
        series = [_series(method, slots[method], shown, where) for method in methods]
        title = f"Top-1 by {words}"
        chart = line_chart(series, title=title, axis=axis, unit=" %", floor=0.0, ceiling=100.0)
        charts.append({"title": title, "svg": chart})
    legend = [{"method": method, "sample": legend_sample(slots[method])} for method in methods]
    return {"charts": [chart for chart in charts if chart["svg"]], "legend": legend}


def _series(method: str, slot: str, lines: Sequence[Line], where: Callable[[Line], float]) -> Series:
    points = [(where(line), line["mean_pct"], line["std_pct"] or 0.0) for line in lines if line["method"] == method]
    points = sorted(point for point in points if point[0] > 0)
    xs, mean = [x for x, _, _ in points], [m for _, m, _ in points]
    return Series(method, slot, xs, mean, [m - h for _, m, h in points], [m + h for _, m, h in points])
