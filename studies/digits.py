"""The digits table: methods at IPC 1, 2 and 5, soft labels and hard ones, ten seeds, paired by seed with intervals.

`ddoq-ray compare experiment=digits-compare` on the validation split, or on the selection split, by which its student
was chosen:

    python -m studies.digits --json studies/results/digits.json
    python -m studies.digits --split selection methods=[ddoq,d4m,random] num_seeds=5 \\
        students=[convnet3-w8@16,convnet3-w16@16,convnet3-w32@16] --json studies/results/digits_students.json
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.provenance import finish, parser
from ddoq_ray import pipeline
from ddoq_ray.commands.table import BY_NAME
from studies.strength import write_selection


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--split", choices=("selection", "val"), default="val")
    arguments.add_argument("--keep", type=Path, help="run directory that stays, and is gone on with")
    arguments.add_argument("words", nargs="*", default=[], help="key=value for the comparison")
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = asked.keep or Path(folder) / "run"
        data = write_selection(f"{folder}/data") if asked.split == "selection" else []
        # Of the selection split all but its own experiment.
        words = ["experiment=digits-compare", *data[1:], f"run_dir={run_dir}", *asked.words]
        pipeline.run(BY_NAME["compare"].compose(words))
        lines = json.loads((run_dir / "report/results.json").read_text())["comparison"]["lines"]
    rows = [{"dataset": "digits", "split": asked.split} | line for line in lines]
    finish(rows, ["labels", "ipc", "method", "student", "mean_pct", "std_pct", "against"], asked.json)


if __name__ == "__main__":
    main()
