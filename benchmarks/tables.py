"""Writes the tables of README and docs/ from the result files; `--check` says which are not what the files hold.

A table stands between `<!-- table: NAME -->` and `<!-- end -->` in its page, and is written whole. A figure in a page's
text is not written here: tests compare those of README with the files.

    python -m benchmarks.tables [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from studies import theory_figures

Row = dict[str, Any]
CHECKOUT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n)(.*?)(<!-- end -->)", re.S)
KS = (10, 50, 100, 200)


def fill(page: str, made: Mapping[str, str]) -> str:
    """The page with each table of `made` in its place; other tables stay.

    Raises:
        ValueError: The page has no place for a table, or two.
    """
    places = [found[2] for found in BLOCK.finditer(page)]
    for name in made:
        if places.count(name) != 1:
            raise ValueError(
                f"expected <!-- table: {name} --> ... <!-- end --> once in the page, got it {places.count(name)} times"
            )
    return BLOCK.sub(lambda found: f"{found[1]}{made[found[2]]}\n{found[4]}" if found[2] in made else found[0], page)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" if cells else "|" + "---|" * len(head) for cells in (head, (), *lines))


def digits(rows: Sequence[Row]) -> dict[str, str]:
    """Top-1 of each method at each size and kind of labels; a star where the interval against random leaves out 0."""
    at, sizes = _lines(rows)

    def score(labels: str, method: str, ipc: int) -> str:
        row = at.get((labels, method, None if method == "full" else ipc))
        if row is None:
            return "-"
        d = row.get("against") if method != "full" else None
        told = d is not None and (d["low_pct"] > 0 or d["high_pct"] < 0)
        return f"{row['mean_pct']:.1f} +- {row['std_pct']:.1f}{'*' if told else ''}"

    cells = list(product(dict.fromkeys(row["labels"] for row in rows), sizes))
    methods = dict.fromkeys(row["method"] for row in rows)
    head = ["method", *(f"{labels}, IPC {ipc}" for labels, ipc in cells)]
    lines = [[f"`{method}`", *(score(labels, method, ipc) for labels, ipc in cells)] for method in methods]
    return {"digits": markdown(head, lines)}


def _lines(rows: Sequence[Row]) -> tuple[dict[tuple[str, str, int | None], Row], list[int]]:
    """A comparison's lines by labels, method and IPC, and its sizes."""
    sizes = sorted({row["ipc"] for row in rows if row["ipc"] is not None})
    return {(row["labels"], row["method"], row["ipc"]): row for row in rows}, sizes


def _ratio(rows: Sequence[Row], k: int, pair: tuple[str, str], field: str, decimals: int) -> str:
    """Lowest and highest ratio of a field of two quantizers over the files of real latents."""
    value = {(row["latents"], row["method"]): row[field] for row in rows if row["k"] == k}
    files = [name for name in dict.fromkeys(name for name, _ in value) if not name.startswith("synthetic")]
    ratios = [value[name, pair[0]] / value[name, pair[1]] for name in files]
    return f"{min(ratios):.{decimals}f} to {max(ratios):.{decimals}f}"


def quantizers(rows: Sequence[Row]) -> dict[str, str]:
    """Ours over the peers'."""
    kmeans, d4m = ("gram", "sklearn-kmeans"), ("clvq-corrected", "d4m")
    columns = [(kmeans, "distortion", 3), (kmeans, "cpu_s", 2), (d4m, "distortion", 3), (d4m, "cpu_s", 2)]
    head = ["K", "`gram` / scikit-learn's KMeans: distortion", "CPU time", "`clvq` / D4M: distortion", "CPU time"]
    return {"quantizers": markdown(head, [[str(k), *(_ratio(rows, k, *column) for column in columns)] for k in KS])}


def winners(rows: Sequence[Row]) -> dict[str, str]:
    """The corrected winner over the paper's."""
    pair = ("clvq-corrected", "clvq-paper")
    columns = [(pair, "distortion", 3), (pair, "heldout_distortion", 3), (pair, "cpu_s", 2)]
    head = ["K", "distortion", "held-out distortion", "CPU time"]
    return {"winners": markdown(head, [[str(k), *(_ratio(rows, k, *column) for column in columns)] for k in KS])}


def starts(rows: Sequence[Row]) -> dict[str, str]:
    """Top-1 of students by how centroids became images, with the number of seeds."""
    keys = ("strength", "guide_until", "guide_scale", "guide_pool")

    def settings(row: Row) -> str:
        told = [f"{key} {row[key]:g}" for key in keys if key in row] + (["rescaled"] if row["rescale"] else [])
        told += ["of the cell"] if row["keep"] == "cell" else []
        told += [f"guidance {row['guidance']:g}"] if row.get("guidance", 3) != 3 else []
        told += ["float32"] if row["arithmetic"].startswith("float32") else []
        return ", ".join(told) or "-"

    def score(row: Row) -> str:
        return f"{row['top1_mean']:.1f}" + ("" if row["top1_std"] is None else f" +- {row['top1_std']:.1f}")

    lines = [
        [row["teacher"].split()[0].removesuffix("-cifar"), str(row["ipc"]), f"`{row['method']}`",
         row.get("start", "-"), settings(row), str(row["candidates"]), score(row), str(row["seeds"])]
        for row in rows
    ]  # fmt: skip
    return {
        "starts": markdown(["teacher", "IPC", "method", "start", "settings", "candidates", "top-1", "seeds"], lines)
    }


def label_codecs(rows: Sequence[Row]) -> dict[str, str]:
    """Bytes and KL of each codec on each real teacher, at both temperatures."""
    at = {(row["teacher"], row["images"], row["codec"], row["temperature"]): row for row in rows}
    temperatures = sorted({row["temperature"] for row in rows})

    def line(teacher: str, images: str, codec: str) -> list[str]:
        found = [at[teacher, images, codec, t] for t in temperatures]
        costs = [f"{row['kl_nats']:.1e}, {row['relative_kl']:.1e}" for row in found]
        return [teacher, images, f"`{codec}`", str(found[0]["bytes"]), *costs]

    head = ["teacher", "views of", "codec", "bytes", *(f"T = {t:g}: nats, share" for t in temperatures)]
    return {"label-codecs": markdown(head, [line(*key) for key in dict.fromkeys(key[:3] for key in at)])}


def compared(name: str) -> Callable[[list[Row]], dict[str, str]]:
    """A table of this name: top-1 of a comparison's methods, their differences from random, and what papers report."""
    return lambda rows: {name: _compared(rows)}


def _compared(rows: Sequence[Row]) -> str:
    at, sizes = _lines(rows)

    def score(row: Row | None) -> str:
        return "-" if row is None else f"{row['mean_pct']:.1f} +- {row['std_pct']:.1f}"

    def difference(row: Row | None) -> str:
        d = (row or {}).get("against")
        return "-" if d is None else f"{d['mean_pct']:+.1f} [{d['low_pct']:+.1f}, {d['high_pct']:+.1f}]"

    def reported(row: Row | None) -> str:
        return "; ".join(f"{r['top1_pct']:.1f} ({r['source']})" for r in (row or {}).get("reported", ())) or "-"

    published = any(row["reported"] for row in rows)
    lines = []
    for labels, method in dict.fromkeys((row["labels"], row["method"]) for row in rows):
        mine = [at.get((labels, method, None if method == "full" else ipc)) for ipc in sizes]
        papers = [", ".join(map(reported, mine))] if published else []
        lines.append([labels, f"`{method}`", *map(score, mine), *map(difference, mine), *papers])
    head = ["labels", "method", *(f"IPC {k}" for k in sizes), *(f"against random, IPC {k}" for k in sizes)]
    return markdown([*head, *(["reported, not measured here"] if published else [])], lines)


def scale(rows: Sequence[Row]) -> dict[str, str]:
    """Efficiency over workers, what a death costs, and the driver's memory over keys."""
    of = {part: [row for row in rows if row["part"] == part] for part in ("scaling", "death", "keys")}
    lines = [
        [row["stage"], str(row["workers"]), f"{row['efficiency']:.3f}", f"{row['of_ideal']:.3f}",
         f"{row['overhead_ms_per_chunk']:.1f}", f"{row['driver_ms_per_chunk']:.1f}", f"{row['start_s']:.1f}"]
        for row in of["scaling"]
    ]  # fmt: skip
    head = ["stage", "workers", "efficiency", "of ideal", "overhead, ms a unit", "driver, CPU ms a unit", "start, s"]
    deaths = [[row["stage"], str(row["workers"]), f"{row['lost_s']:.1f}"] for row in of["death"]]
    grown = [
        [row["stage"], f"{row['keys']:,}", f"{row['chunks']:,}", f"{row['driver_peak_bytes'] / 1e6:.0f}",
         f"{row['growth']:.3f}" if "growth" in row else "", f"{row['chunks'] / row['span_s']:.0f}",
         f"{row['driver_ms_per_chunk']:.1f}"]
        for row in of["keys"]
    ]  # fmt: skip
    keys = ["stage", "keys", "units", "driver's peak, MB", "beside a tenth", "units a second", "driver, CPU ms a unit"]
    return {
        "scale-workers": markdown(head, lines),
        "scale-deaths": markdown(["stage", "workers", "time lost to a death, s"], deaths),
        "scale-keys": markdown(keys, grown),
    }


def training(rows: Sequence[Row]) -> dict[str, str]:
    """A student's own loop over the same student on one resident batch."""
    lines = [
        [f"`{row['student']}`", str(row["size"]), str(row["batch"]), f"{row['images']:,}", str(row["students"]),
         row["kept"], f"{row['steps_per_s']:.2f}", f"{row['resident_steps_per_s']:.2f}",
         f"{row['ratio_to_resident']:.2f}"]
        for row in rows
    ]  # fmt: skip
    columns = ["student", "px", "batch", "images", "students in turn", "kept in", "steps/s", "resident", "ratio"]
    return {"training": markdown(columns, lines)}


def label_rates(rows: Sequence[Row]) -> dict[str, str]:
    """Views beside the teacher and the student; codecs; the pool."""
    networks = [row for row in rows if "of_teacher" in row]
    lines = [
        [
            f"{row['stored']} to {row['size']}",
            row["what"],
            row["how"],
            f"{row['per_s']:,.0f}",
            f"{row['of_teacher']:.2f}",
        ]
        for row in networks
    ]
    others = [[row["what"], row["how"], f"{row['per_s']:,.0f}"] for row in rows if "of_teacher" not in row]
    return {
        "view-rates": markdown(["px", "what", "how", "images/s", "of the teacher's"], lines),
        "label-rates": markdown(["what", "how", "labels/s"], others),
    }


def labels_scale(rows: Sequence[Row]) -> dict[str, str]:
    """Files, peaks and rates of labels without a teacher."""
    lines = [
        [f"{row['images']:,}", str(row["files"]), *(f"{row[f'{who}_peak_bytes'] / 1e6:.0f}" for who in
         ("driver", "writer", "replay")), f"{row['write_labels_per_s']:,.0f}", f"{row['replay_labels_per_s']:,.0f}"]
        for row in rows
    ]  # fmt: skip
    head = ["images", "files", "driver, MB", "teacher, MB", "student's worker, MB", "written/s", "replayed/s"]
    return {"labels-scale": markdown(head, lines)}


def deaths(rows: Sequence[Row]) -> dict[str, str]:
    """How many cells of a stage and a death hold, of how many, and in how many seconds."""
    kinds = list(dict.fromkeys(row["death"] for row in rows))

    def cell(stage: str, death: str) -> str:
        mine = [row for row in rows if (row["stage"], row["death"]) == (stage, death)]
        seconds = [row["seconds"] for row in mine]
        return f"{sum(row['equal'] for row in mine)} of {len(mine)}, {min(seconds):.0f} to {max(seconds):.0f} s"

    stages = dict.fromkeys(row["stage"] for row in rows)
    return {"deaths": markdown(["stage", *kinds], [[s, *(cell(s, death) for death in kinds)] for s in stages])}


def damage(rows: Sequence[Row]) -> dict[str, str]:
    """What `verify` and the stage that reads a file say of each way in which it is damaged."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = {row["way"]: row for row in rows if row["kind"] == kind}
        named = f"{sum(row['verify'] for row in mine.values())} of {len(mine)}"
        first = mine[ways[0]]
        lines.append([kind, f"`{first['file']}`", named, first["stage"], *(mine[way]["outcome"] for way in ways)])
    return {"damage": markdown(["what", "file", "`verify` names it", "read by", *ways], lines)}


# Page, result file, and what makes the page's tables from its rows, by name.
SOURCES: tuple[tuple[str, str, Callable[[list[Row]], dict[str, str]]], ...] = (
    ("README.md", "studies/results/digits.json", digits),
    ("README.md", "benchmarks/results/quantize.json", quantizers),
    ("docs/adr/0008-corrected-winner.md", "benchmarks/results/quantize.json", winners),
    ("docs/labels.md", "studies/results/label_codecs.json", label_codecs),
    ("docs/synthesis.md", "studies/results/starts.json", starts),
    ("docs/scale.md", "benchmarks/results/scale.json", scale),
    ("docs/labels.md", "benchmarks/results/labels_scale.json", labels_scale),
    ("docs/labels.md", "benchmarks/results/label_rates.json", label_rates),
    ("docs/labels.md", "benchmarks/results/train.json", training),
    ("docs/failures.md", "benchmarks/results/chaos.json", deaths),
    ("docs/failures.md", "benchmarks/results/damage.json", damage),
    ("docs/results.md", "studies/results/digits.json", compared("digits-compare")),
    ("docs/results.md", "studies/results/cifar10.json", compared("cifar10-compare")),
    ("docs/results.md", "studies/results/cifar10_ipc50.json", compared("cifar10-ipc50")),
    ("docs/results.md", "studies/results/fashion_mnist.json", compared("fashion-mnist-compare")),
    ("docs/results.md", "studies/results/fashion_mnist_ipc50.json", compared("fashion-mnist-ipc50")),
    ("docs/theory.md", "studies/results/theory.json", theory_figures.tables),
)


def written() -> dict[str, str]:
    """Each page with the tables that its result files make."""
    pages: dict[str, str] = {}
    for page, results, tables in SOURCES:
        text = pages.get(page) or (CHECKOUT / page).read_text()
        pages[page] = fill(text, tables(json.loads((CHECKOUT / results).read_text())))
    return pages


def stale(pages: Mapping[str, str]) -> list[str]:
    """`PAGE: NAME` of tables that differ on disk."""
    found = []
    for page, text in pages.items():
        there = {block[2]: block[3] for block in BLOCK.finditer((CHECKOUT / page).read_text())}
        found += [f"{page}: {block[2]}" for block in BLOCK.finditer(text) if there[block[2]] != block[3]]
    return found


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table differs")
    asked = arguments.parse_args()
    pages = written()
    differ = stale(pages)
    for name in differ:
        print(name)
    if asked.check:
        return 1 if differ else 0
    for page, text in pages.items():
        (CHECKOUT / page).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
