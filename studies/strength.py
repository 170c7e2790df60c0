"""The noise strength, chosen on the digits' selection split (never on the reported one).

For each IPC and strength: the run's own method, several seeds, scored on the selection split. Latents are encoded
once and shared. `noise` is the baseline that ignores the centroids.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import finish, parser
from ddoq_ray import pipeline
from ddoq_ray.config.compose import load_config
from ddoq_ray.core.metrics import mean_std
from ddoq_ray.data.collections import DIGIT_NAMES
from ddoq_ray.execution.session import ray_session
from ddoq_ray.stages.prepare.step import digit_shards
from ddoq_ray.storage.folder import Folder


def write_selection(folder: str) -> list[str]:
    """The digits with `selection` in the place of validation; returns the overrides that use them."""
    data = Folder(folder)
    for split, tars in digit_shards().items():
        for i, tar in enumerate(tars):
            data.publish(f"{split}/{split}-{i:06d}.tar", tar)
    data.publish_json("classes.json", list(DIGIT_NAMES))
    return [
        "experiment=digits",
        f"dataset.path={folder}/train",
        f"dataset.val_path={folder}/selection",
        f"dataset.classes={folder}/classes.json",
    ]


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method from a run's ``results.json`` rows: mean and standard deviation over its seeds."""
    cases = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["seed"])
        top1 = [row["top1_pct"] for row in mine]
        case = {key: mine[0][key] for key in ("method", "ipc", "student", "epochs", "train_images")}
        cases.append(
            case | {"seeds": len(mine), "top1_pct_mean": mean_std(top1).mean, "top1_pct_std": mean_std(top1).std}
        )
    return cases


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--ipc", type=int, nargs="+", default=[1, 5, 10])
    arguments.add_argument("--strength", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3, 0.4, 0.6])
    arguments.add_argument("--seeds", type=int, default=5)
    asked = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ray_session(load_config().cluster):
        data = write_selection(f"{folder}/data")
        first = f"{folder}/latents"
        pipeline.run(load_config([*data, f"run_dir={first}", "stages=[prepare,encode]"]))
        for ipc in asked.ipc:
            cases = [("noised", s) for s in asked.strength] + [("noise", 1.0)]
            for start, strength in cases:
                run_dir = f"{folder}/{ipc}-{start}-{strength}"
                baselines = "[random]" if (start, strength) == cases[0] else "[]"
                overrides = [
                    *data, f"latents.path={first}/latents", f"run_dir={run_dir}", f"ipc={ipc}",
                    f"num_seeds={asked.seeds}", f"baselines={baselines}", f"synthesizer.start={start}",
                ]  # fmt: skip
                if start == "noised":
                    overrides.append(f"synthesizer.strength={strength}")
                pipeline.run(load_config(overrides))
                results = json.loads(Path(run_dir, "report/results.json").read_text())
                for case in summarize(results["rows"]):
                    about = {"dataset": "digits", "split": "selection"}
                    if case["method"] != "random":
                        about |= {"start": start, "strength": strength}
                    rows.append(about | case)
    finish(rows, ["ipc", "method", "start", "strength", "seeds", "top1_pct_mean", "top1_pct_std"], asked.json)


if __name__ == "__main__":
    main()
