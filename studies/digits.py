"""The digits table: every method at IPC 1, 5 and 10, five seeds, paired.

Runs the main job (default configuration, reported on the validation split) once an IPC, in one Ray session.
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
from ddoq_ray.core.metrics import mean_std, paired_difference
from ddoq_ray.execution.session import ray_session


def summarize(rows: Sequence[dict[str, Any]], against: Sequence[str] = ("random", "d4m")) -> list[dict[str, Any]]:
    """One row a method from a run's ``results.json`` rows: mean, std, and paired differences."""
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["seed"]] = row
    cases = []
    for method, seeds in by_method.items():
        ordered = [seeds[s] for s in sorted(seeds)]
        top1 = [r["top1_pct"] for r in ordered]
        case: dict[str, Any] = {
            "method": method,
            "ipc": ordered[0]["ipc"],
            "student": ordered[0]["student"],
            "seeds": len(ordered),
            "epochs": ordered[0]["epochs"],
            "train_images": ordered[0]["train_images"],
            "top1_pct_mean": mean_std(top1).mean,
            "top1_pct_std": mean_std(top1).std,
            "top1_pct": top1,
        }
        for other in against:
            if other in by_method and other != method:
                d = paired_difference(top1, [by_method[other][s]["top1_pct"] for s in sorted(by_method[other])])
                case |= {f"minus_{other}_pct_mean": d.mean, f"minus_{other}_pct_std": d.std}
        cases.append(case)
    return cases


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--ipc", type=int, nargs="+", default=[1, 5, 10])
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("overrides", nargs="*", default=[], help="key=value for the run")
    asked = arguments.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, ray_session(load_config(asked.overrides).cluster):
        for ipc in asked.ipc:
            run_dir = f"{folder}/ipc{ipc}"
            config = load_config([f"ipc={ipc}", f"num_seeds={asked.seeds}", f"run_dir={run_dir}", *asked.overrides])
            pipeline.run(config)
            results = json.loads(Path(run_dir, "report/results.json").read_text())
            rows += [{"dataset": "digits", "split": "val", **case} for case in summarize(results["rows"])]
    columns = ["ipc", "method", "seeds", "top1_pct_mean", "top1_pct_std", "minus_random_pct_mean"]
    finish(rows, [*columns, "minus_random_pct_std", "minus_d4m_pct_mean", "minus_d4m_pct_std"], asked.json)


if __name__ == "__main__":
    main()
