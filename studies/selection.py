"""CIFAR-10's scheme of weights: top-1 of a comparison's students on the selection split, which no table reports.

    python -m studies.selection RUN_DIRECTORY [--methods ddoq ddoq-sqrt] --json FILE

Soft-labelled students of a finished `ddoq-ray compare` on the shards that `studies.small_images` reports; a row a
method and IPC.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import finish, parser
from ddoq_ray.config.compare import HARD
from ddoq_ray.core.metrics import mean_std
from ddoq_ray.models.accuracy import top1_top5
from ddoq_ray.models.classifiers import load_classifier
from ddoq_ray.storage import layout
from studies.small_images import cifar10


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("run", type=Path, help="run directory of the comparison")
    arguments.add_argument("--methods", nargs="+", help="of these methods only")
    asked = arguments.parse_args()
    _, selection, _ = cifar10()
    images, class_ids = torch.from_numpy(selection.images), torch.from_numpy(selection.class_ids)
    scores: dict[tuple[Any, ...], dict[int, float]] = defaultdict(dict)
    for manifest in sorted(asked.run.rglob(f"{layout.STUDENTS}/*/{layout.MANIFEST}")):
        told = json.loads(manifest.read_text())
        hard = HARD in manifest.parent.name
        if not hard and (asked.methods is None or told["method"] in asked.methods):
            key = (told["student"], told["ipc"], told["method"])
            model = load_classifier(str(manifest.parent))
            scores[key][told["seed"]] = top1_top5(model, images, class_ids)[0]
    rows = []
    for (student, ipc, method), by_seed in sorted(scores.items()):
        top1 = [by_seed[seed] for seed in sorted(by_seed)]
        mean, std = mean_std(top1)
        about = {"dataset": "cifar10", "split": "selection", "student": student, "ipc": ipc, "method": method}
        rows.append(about | {"mean_pct": mean, "std_pct": std, "top1_pct": top1})
    finish(rows, ["student", "ipc", "method", "mean_pct", "std_pct"], asked.json)


if __name__ == "__main__":
    main()
