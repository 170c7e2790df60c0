"""The chaos matrix: every stage, every kind of death, several seeds; each makes what an undisturbed run makes.

    python -m tests.chaos.matrix --json benchmarks/results/chaos.json [--minutes 10] [--stage encode] [--death node]

A row a cell: `stage`, `death`, `seed`, `equal`; what was killed, at which moment (units that the stage had published,
and seconds after), how the run ended, and seconds. A row that is in the file is not made again, so that the matrix can
be made in parts; where any row is not equal the exit code is 1. What a cell does is in cells.py.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import parser, provenance
from ddoq_ray.config.run import STAGES
from tests.chaos.cells import DEATHS, HANGS_S, cell, lab
from tests.support.deaths import Over

SEEDS = 3
COMMAND = "python -m tests.chaos.matrix"


def save(file: Path, rows: list[dict[str, Any]]) -> None:
    order = {key: n for n, key in enumerate(itertools.product(STAGES, DEATHS, range(1000)))}
    rows.sort(key=lambda row: order[row["stage"], row["death"], row["seed"]])
    written = file.with_suffix(".tmp")
    written.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(written, file)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--stage", choices=STAGES, action="append", help="only this stage; may be given again")
    options.add_argument("--death", choices=DEATHS, action="append", help="only this death; may be given again")
    options.add_argument("--seeds", type=int, default=SEEDS, help="of each stage and death")
    options.add_argument("--minutes", type=float, help="begin no cell after so long")
    options.add_argument("--scratch", help="where the undisturbed run is kept for the next part; by default it is not")
    given = options.parse_args()
    file = Path(given.json or "chaos.json")
    rows = json.loads(file.read_text()) if file.exists() else []
    there = {(row["stage"], row["death"], row["seed"]) for row in rows}
    # Seed by seed, so that a part of the matrix is a matrix too.
    every = itertools.product(range(given.seeds), given.stage or STAGES, given.death or DEATHS)
    todo = [(stage, death, seed) for seed, stage, death in every if (stage, death, seed) not in there]
    if todo:
        make(todo, rows, file, given.minutes, given.scratch)
    wrong = [row for row in rows if not row["equal"]]
    print(f"{len(rows)} cells, {len(wrong)} not equal; a stage hangs after {HANGS_S:.0f} s")
    return 1 if wrong else 0


Cell = tuple[str, str, int]  # stage, death, seed


def make(todo: list[Cell], rows: list[dict[str, Any]], file: Path, minutes: float | None, kept: str | None) -> None:
    """Add the rows of `todo`, each saved as it is made."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddoq-chaos-") as own:
        scratch = Path(kept or own)
        os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")  # nothing of the user's is read or written
        with lab(scratch / "base") as here:
            print(f"the cluster and the undisturbed run took {time.monotonic() - start:.0f} s", flush=True)
            for stage, death, seed in todo:
                if minutes and time.monotonic() - start > 60 * minutes:
                    break
                try:
                    row = cell(here, stage, death, seed, scratch / "cell")
                except (Over, TimeoutError) as error:
                    ended = f"{type(error).__name__}: {error}"[:300]
                    row = {"stage": stage, "death": death, "seed": seed, "equal": False, "ended": ended}
                rows.append(row | provenance() | {"command": COMMAND})
                save(file, rows)
                told = ", ".join(f"{value}" for key, value in row.items() if key not in ("files",))
                print(f"{time.monotonic() - start:5.0f} s  {told}", flush=True)
                if "TimeoutError" in row["ended"]:
                    os._exit(1)  # its thread hangs, and would have the next cell's workers


if __name__ == "__main__":
    sys.exit(main())
