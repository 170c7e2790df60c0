"""The accuracy table: rows grouped over seeds, and the same table as plain text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from ddoq_ray.config.methods import SPECS

METHODS = {name: spec.words for name, spec in SPECS.items()}
_NAMED_SLOTS = {"random": "random", "full": "full"}
_FREE_SLOTS = tuple("abcdefghijkl")


def number(value: Any) -> float | None:
    """A finite float, or None for what is missing or not a number."""
    if value is None or isinstance(value, bool):
        return None
    try:
        out = float(value)
    except (TypeError, ValueError):
        return None
    return out if math.isfinite(out) else None


def numbers(values: Iterable[Any]) -> list[float]:
    """The finite ones of `values`."""
    return [v for v in (number(value) for value in values) if v is not None]


def count(value: Any) -> str:
    """A whole number with its thousands apart; empty where it is missing."""
    kept = number(value)
    return "" if kept is None else f"{int(kept):,}"


def method_order(methods: Iterable[str], own: str) -> list[str]:
    """Distinct methods: the own one first, then the known ones, then others by name, `full` at the end."""
    known = list(METHODS)

    def key(method: str) -> tuple[int, int, str]:
        if method == own:
            return (0, 0, method)
        if method == "full":
            return (3, 0, method)
        return (1, known.index(method), method) if method in known else (2, 0, method)

    return sorted(set(methods), key=key)


def method_slots(methods: list[str], own: str) -> dict[str, str]:
    """Give every method a colour slot; the own one, `random` and `full` always have theirs."""
    slots: dict[str, str] = {}
    free = 0
    for method in methods:
        if method == own:
            slots[method] = "own"
        elif method in _NAMED_SLOTS:
            slots[method] = _NAMED_SLOTS[method]
        else:
            slots[method] = _FREE_SLOTS[free % len(_FREE_SLOTS)]
            free += 1
    return slots


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) over seeds; `std` is None below two values."""

    mean: float
    std: float | None
    n: int

    def text(self, pm: str = "±") -> str:
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} {pm} {self.std:.2f}"


def spread(values: Iterable[Any]) -> Spread | None:
    """Spread of the finite values, None where there are none."""
    kept = numbers(values)
    if not kept:
        return None
    return Spread(fmean(kept), stdev(kept) if len(kept) > 1 else None, len(kept))


@dataclass(frozen=True)
class AccuracyLine:
    """One (method, ipc, student) of the accuracy table, over its seeds.

    Attributes:
        diverged: Students whose training diverged. One is enough to leave the line without figures: the mean of the
            seeds that went well would flatter a method that fails now and then.
    """

    method: str
    ipc: int | None
    student: str
    images: int | None
    seeds: int
    epochs: str
    top1: Spread | None
    top5: Spread | None
    best: Spread | None
    best_epoch: str
    paired: Mapping[str, Any] | None
    diverged: int = 0

    def diverged_text(self) -> str:
        return f"{self.diverged} of {self.seeds} diverged" if self.diverged else ""

    def paired_text(self, pm: str = "±") -> str:
        mean = number((self.paired or {}).get("mean_diff_pct"))
        if self.paired is None or mean is None:
            return ""
        std, n = number(self.paired.get("std_diff_pct")), self.paired.get("n")
        text = f"{mean:+.2f}".replace("-", "−" if pm == "±" else "-")
        if std is not None and n != 1:
            text += f" {pm} {std:.2f}"
        return text


def _range(values: Iterable[Any]) -> str:
    kept = sorted({int(v) for v in numbers(values)})
    if not kept:
        return ""
    return str(kept[0]) if len(kept) == 1 else f"{kept[0]}-{kept[-1]}"


def _find_paired(results: Mapping[str, Any], method: str, ipc: int | None, student: str) -> Mapping[str, Any] | None:
    """The paired difference of a line; an entry that names no ipc belongs to the run's own ipc."""
    entries: list[Mapping[str, Any]] = list(results.get("paired") or [])
    for entry in entries:
        if entry.get("method") != method or entry.get("baseline") != "random":
            continue
        if method != "full" and entry.get("ipc", results.get("ipc")) != ipc:
            continue
        if entry.get("student", student) != student:
            continue
        return entry
    return None


def accuracy_lines(results: Mapping[str, Any]) -> list[AccuracyLine]:
    """Group `results["rows"]` over seeds, ordered by student, ipc (`full` last) and method."""
    groups: dict[tuple[str, int | None, str], list[Mapping[str, Any]]] = {}
    for row in results.get("rows") or []:
        method = str(row.get("method", ""))
        # The whole training set has no images-per-class budget, whatever the row says.
        ipc = None if method == "full" or number(row.get("ipc")) is None else int(row["ipc"])
        groups.setdefault((str(row.get("student") or ""), ipc, method), []).append(row)
    order = method_order((key[2] for key in groups), str(results.get("own_method", "")))
    lines = []
    for student, ipc, method in sorted(
        groups, key=lambda k: (k[0], math.inf if k[1] is None else k[1], order.index(k[2]))
    ):
        rows = groups[student, ipc, method]
        images = numbers(row.get("train_images") for row in rows)
        diverged = sum(bool(row.get("diverged")) for row in rows)
        scored = [] if diverged else rows
        lines.append(
            AccuracyLine(
                method=method,
                ipc=ipc,
                student=student,
                images=int(images[0]) if images else None,
                seeds=len({row.get("seed") for row in rows}),
                epochs=_range(row.get("epochs") for row in rows),
                top1=spread(row.get("top1_pct") for row in scored),
                top5=spread(row.get("top5_pct") for row in scored),
                best=spread(row.get("best_top1_pct") for row in scored),
                best_epoch=_range(row.get("best_epoch") for row in scored),
                paired=None if diverged else _find_paired(results, method, ipc, student),
                diverged=diverged,
            )
        )
    return lines


def accuracy_table(results: Mapping[str, Any]) -> str:
    """The accuracy table as aligned plain text (ASCII).

    Args:
        results: the dictionary that the report stage writes as results.json.

    Returns:
        Lines without a newline at the end: a title, a header, one line a (method, ipc, student), a note.
    """
    title = f"{results.get('dataset') or results.get('name') or 'run'}: top-1 in percent at the last epoch"
    counts = results.get("counts") or {}
    if counts.get("val_images"):
        title += f", on {count(counts['val_images'])} validation images"
        if counts.get("val_refused"):
            title += f" ({count(counts['val_refused'])} more could not be read)"
    lines = accuracy_lines(results)
    if not lines:
        return f"{title}\nno rows: no student was evaluated yet (run the stages train and evaluate)"
    header = ["method", "ipc", "student", "images", "seeds", "top-1", "top-5", "vs random", "best (epoch)"]
    body = []
    for line in lines:
        best = ""
        if line.best is not None:
            best = line.best.text("+-") + (f" ({line.best_epoch})" if line.best_epoch else "")
        body.append(
            [
                line.method,
                "-" if line.ipc is None else str(line.ipc),
                line.student or "-",
                "-" if line.images is None else str(line.images),
                str(line.seeds),
                line.top1.text("+-") if line.top1 else line.diverged_text() or "-",
                line.top5.text("+-") if line.top5 else "-",
                line.paired_text("+-") or "-",
                best or "-",
            ]
        )
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
    words = {0, 2}  # columns of words are flush left, numbers flush right

    def join(row: list[str]) -> str:
        cells = (v.ljust(w) if i in words else v.rjust(w) for i, (v, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    note = "mean +- sample std over seeds; vs random: paired by seed; the best epoch is picked on the scored images"
    return "\n".join([title, join(header), "  ".join("-" * w for w in widths), *map(join, body), note])
