"""What a comparison costs beside its trainings: its wall time over the sum of its trainings divided by the groups.

`ddoq-ray compare` as a process of its own, on the digits: from nothing (Ray's start, data, encoding, codebooks, images,
labels, students, report), and again with all but the students there (not with --once).
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

from benchmarks.provenance import finish, parser, provenance

WORDS = ["methods=[ddoq,ddoq-sqrt,d4m,random]", "ipcs=[1,5,10]", "num_seeds=10", "cluster.trainer.groups=2"]
COLUMNS = ["what", "students", "groups", "wall_s", "trainings_s", "train_stage_s", "ratio", "ratio_of_training"]


def measured(words: list[str], run: Path, what: str) -> dict[str, Any]:
    """One row: the command from its start to its end, and what its students took.

    `train_stage_s` is the time from the last label to the last student; `ratio_of_training` is that over the trainings.
    """
    command = [sys.executable, "-m", "ddoq_ray", "compare", *words, "cluster.address=local", f"run_dir={run}"]
    start, began = time.perf_counter(), time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    results = json.loads((run / "report/results.json").read_text())
    groups = results["config"]["cluster"]["trainer"]["groups"]
    trainings = sum(row["seconds"] for row in results["students"])
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    stages = [e for e in events if e["time"] >= began and e["event"] in ("stage finished", "teacher checked")]
    ended = next(e["time"] for e in stages if e.get("stage") == "train")
    training = ended - max((e["time"] for e in stages if e["time"] < ended), default=began)
    return {
        "what": what,
        "students": len(results["students"]),
        "groups": groups,
        "wall_s": round(wall, 1),
        "trainings_s": round(trainings, 1),
        "train_stage_s": round(training, 1),
        "ratio": round(wall / (trainings / groups), 3),
        "ratio_of_training": round(training / (trainings / groups), 3),
        "keys": words,
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--keep", type=Path, help="run directory, which stays; by default one that goes")
    arguments.add_argument("--lines", type=Path, help="write the comparison's lines here, for `benchmarks.tables`")
    arguments.add_argument("--once", action="store_true", help="from nothing only")
    arguments.add_argument("words", nargs="*", default=WORDS, help="key=value for the comparison")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = given.keep or Path(folder) / "run"
        rows = [measured(given.words, run, "from nothing")]
        if given.lines is not None:
            lines = json.loads((run / "report/results.json").read_text())["comparison"]["lines"]
            given.lines.write_text(json.dumps([line | provenance() for line in lines], indent=1) + "\n")
        if not given.once:
            for students in run.glob("compare/*/students"):
                shutil.rmtree(students)
            rows.append(measured(given.words, run, "images and labels there"))
    finish(rows, COLUMNS, given.json)


if __name__ == "__main__":
    main()
