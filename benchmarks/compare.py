"""What a comparison costs beside its trainings: its wall time over the sum of its trainings divided by the groups.

`ddoq-ray compare` as a process of its own, on the digits: from nothing (Ray's start, data, encoding, codebooks, images,
labels, students, report), and again with everything but the students there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import finish, parser

METHODS = ("ddoq", "ddoq-sqrt", "d4m", "random")
COLUMNS = ["what", "students", "groups", "wall_s", "trainings_s", "ratio"]


def measured(words: list[str], run: Path, what: str, groups: int) -> dict[str, Any]:
    """One row: the command from its start to its end, and what its students took."""
    command = [sys.executable, "-m", "ddoq_ray", "compare", *words, f"run_dir={run}"]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    students = json.loads((run / "report/results.json").read_text())["students"]
    trainings = sum(row["seconds"] for row in students)
    return {
        "what": what,
        "students": len(students),
        "groups": groups,
        "wall_s": round(wall, 1),
        "trainings_s": round(trainings, 1),
        "ratio": round(wall / (trainings / groups), 3),
        "keys": words,
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=400, help="optimization steps of a student")
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--ipcs", default="1,5,10")
    arguments.add_argument("--groups", type=int, default=2)
    given = arguments.parse_args()
    words = [
        f"methods=[{','.join(METHODS)}]", f"ipcs=[{given.ipcs}]", f"num_seeds={given.seeds}",
        f"protocol.steps={given.steps}", f"cluster.trainer.groups={given.groups}", "cluster.address=local",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        rows = [measured(words, run, "from nothing", given.groups)]
        for students in run.glob("compare/*/students"):
            shutil.rmtree(students)
        rows.append(measured(words, run, "images and labels there", given.groups))
    finish(rows, COLUMNS, given.json)


if __name__ == "__main__":
    main()
