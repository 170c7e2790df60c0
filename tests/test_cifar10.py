"""Real class-mixed shards of somebody else's making: CIFAR-10 from data to report, with networks made on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.planned import on_disk

from ddoq_ray import pipeline
from ddoq_ray.cli import main
from ddoq_ray.commands import plan
from ddoq_ray.config.compose import load_config

ASSETS = Path(os.environ.get("DDOQ_ASSETS", Path(__file__).resolve().parents[2] / "shared/assets"))
SHARDS = ASSETS / "cifar10-wds"

pytestmark = [
    pytest.mark.assets,
    pytest.mark.skipif(not SHARDS.is_dir(), reason=f"no CIFAR-10 shards at {SHARDS} (set DDOQ_ASSETS)"),
]


def test_cifar10_from_shards_to_report(tmp_path: Path, ray_here: None) -> None:
    data = [
        f"dataset.path={SHARDS}/train-{{000000..000001}}.tar",
        f"dataset.val_path={SHARDS}/test-000000.tar",
        f"dataset.classes={SHARDS}/classes.json",
    ]
    prior, teacher = f"prior.path={tmp_path}/prior", f"teacher.path={tmp_path}/teacher"
    tiny = ["training.autoencoder_steps=30", "training.denoiser_steps=20", "training.autoencoder_batch=16"]
    assert main(["train-prior", *data, f"out={tmp_path}/prior", "image_size=32", *tiny]) == 0
    assert main(["train-teacher", *data, f"out={tmp_path}/teacher", "image_size=32", "training.epochs=1"]) == 0

    with pytest.raises(ValueError, match=r"airplane.*prior"):  # the digits' prior has ten labels too, but other ones
        pipeline.run(load_config(["experiment=digits", *data, f"run_dir={tmp_path}/wrong", teacher]))

    small = [
        "experiment=digits",
        "ipc=2",
        "num_seeds=1",
        "protocol.steps=10",
        "student.image_size=32",
        "teacher.min_top1=0",
    ]
    pipeline.run(load_config([*data, prior, teacher, *small, f"run_dir={tmp_path}/run"]))
    config = load_config([*data, prior, teacher, *small, f"run_dir={tmp_path}/run"])
    made, there = plan.plan(config), on_disk(config)
    made.written.pop("prepare")  # the shards lie elsewhere
    assert made.written == {name: pytest.approx(size, rel=0.2) for name, size in there.items()}, made.lines
    results = json.loads((tmp_path / "run/report/results.json").read_text())
    assert results["counts"]["train_images"] == 2000 and results["quarantine"]["samples"] == 0
    assert {r["method"] for r in results["rows"]} == {"ddoq", "ddoq-sqrt", "d4m", "random", "full"}
    classes = json.loads((tmp_path / "run/data/classes.json").read_text())
    assert [(c["name"], c["teacher_index"], c["prior_label"]) for c in classes[:2]] == [
        ("airplane", 0, 0),
        ("automobile", 1, 1),
    ]
