"""The report's section on codebooks: W2 of each class under each kind of weights, distortion seen and held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ddoq_ray.page.tables import count, number, numbers

MAX_CLASSES = 60  # classes in the table of W2


def codebook_section(results: Mapping[str, Any], methods: list[str], own: str) -> dict[str, Any] | None:
    """What the template shows of `results["classes"]`: the own method's classes, and every method's distortion."""
    entries = list(results.get("classes") or [])
    if not entries:
        return None
    ipc = results.get("ipc")
    entries = [e for e in entries if e.get("ipc", ipc) == ipc] or entries
    measured = [
        e for e in entries if number(e.get("w2_voronoi")) is not None and number(e.get("w2_uniform")) is not None
    ]
    with_w2 = [str(e.get("method", "")) for e in measured]
    shown_method = own if own in with_w2 else next((m for m in methods if m in with_w2), "")
    chosen = sorted((e for e in measured if str(e.get("method", "")) == shown_method), key=lambda e: int(e["class_id"]))
    top = max((float(e[k]) for e in chosen for k in ("w2_voronoi", "w2_uniform")), default=0.0) or 1.0
    rows = [
        {
            "name": str(e.get("name") or e["class_id"]),
            "n": count(e.get("n")),
            "k": count(e.get("k")),
            "voronoi": _figures(float(e["w2_voronoi"])),
            "uniform": _figures(float(e["w2_uniform"])),
            "voronoi_bar": f"{100 * float(e['w2_voronoi']) / top:.1f}",
            "uniform_bar": f"{100 * float(e['w2_uniform']) / top:.1f}",
            "change": _change(float(e["w2_voronoi"]), float(e["w2_uniform"])),
            "unseen": _optional(e.get("heldout_w2_voronoi")),
        }
        for e in chosen[:MAX_CLASSES]
    ]
    means = []
    for method in methods:
        mine = [e for e in entries if str(e.get("method", "")) == method]
        kept, unseen = numbers(e.get("distortion") for e in mine), numbers(e.get("heldout_distortion") for e in mine)
        if kept:
            means.append((method, fmean(kept), fmean(unseen) if unseen else None))
    top = max((max(seen, unseen or 0.0) for _, seen, unseen in means), default=0.0) or 1.0
    heldout = results.get("heldout") or {}
    return {
        "method": shown_method,
        "rows": rows,
        "classes": len(chosen),
        "w2": _w2_by_weights(chosen),
        "unseen": any(unseen is not None for _, _, unseen in means),
        "unseen_images": count(heldout.get("images")),
        "unseen_missing": str(heldout.get("missing") or ""),
        "distortion": [
            {
                "method": method,
                "mean": _figures(seen),
                "bar": f"{100 * seen / top:.1f}",
                "unseen": _optional(unseen),
                "unseen_bar": f"{100 * (unseen or 0.0) / top:.1f}",
                "change": "" if unseen is None else _change(unseen, seen),
            }
            for method, seen, unseen in means
        ],
    }


def _w2_by_weights(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(kind of weights, mean W2) of those that were measured."""
    kinds = {
        "voronoi": "Voronoi",
        "stream": "counts kept while streaming",
        "sqrt": "square root (Eq. 33)",
        "uniform": "uniform",
    }
    means = [(words, numbers(e.get(f"w2_{kind}") for e in entries)) for kind, words in kinds.items()]
    return [(words, _figures(fmean(kept))) for words, kept in means if kept]


def _optional(value: Any) -> str:
    kept = number(value)
    return "" if kept is None else _figures(kept)


def _figures(value: float) -> str:
    """Four significant figures, trailing zeros kept so that a column lines up."""
    return f"{value:#.4g}".rstrip(".") if 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def _change(value: float, reference: float) -> str:
    return "" if reference <= 0 else f"{100 * (value - reference) / reference:+.1f} %".replace("-", "−")
