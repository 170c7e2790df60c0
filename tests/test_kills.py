"""A labeller and a trainer are killed in the middle of their work: the run ends by itself, in the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import ray
from support.deaths import InThread

from ddoq_ray import pipeline
from ddoq_ray.config.compose import load_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here")]


def run(place: Path, stages: str) -> None:
    keys = [
        f"run_dir={place}", "ipc=2", "baselines=[d4m]", "num_seeds=2", "protocol.steps=40", "protocol.eval_every=10",
        "synthesizer.shard_images=4", "labels.file_labels=40", "labels.workers=1", f"stages=[{stages}]",
    ]  # fmt: skip
    pipeline.run(load_config(keys))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its images."""
    place = tmp_path_factory.mktemp("images") / "run"
    run(place, "prepare,encode,quantize,synthesize")
    return place


@pytest.fixture(scope="module")
def calm(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("calm") / "run"
    shutil.copytree(images, place)
    run(place, "label,train")
    return place


def content(place: Path, pattern: str) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob(pattern))}


def events(place: Path, stage: str) -> list[str]:
    rows = [json.loads(line) for line in (place / "events.jsonl").read_text().splitlines()]
    return [row["event"] for row in rows if row.get("stage") == stage]


def test_a_killed_labeller(images: Path, calm: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    shutil.copytree(images, place)
    work = InThread(lambda: run(place, "label"))
    work.wait_for(lambda: list(place.rglob("labels-*")))
    work.kill(ray._private.worker._global_node, "Teacher")
    work.join(240)
    labels = content(place, "labels-*")
    assert len(labels) == 2 * 2 * 20 and labels == content(calm, "labels-*")
    assert {"worker lost", "unit requeued"} <= set(events(place, "label"))


def test_a_killed_trainer(images: Path, calm: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    shutil.copytree(images, place)
    run(place, "label")
    work = InThread(lambda: run(place, "train"))
    work.wait_for(lambda: list(place.rglob("students/*/manifest.json")))
    work.kill(ray._private.worker._global_node, "RayTrainWorker")
    work.join(240)
    students = content(place, "model.safetensors")
    assert len(students) == 4 and students == content(calm, "model.safetensors")
    assert "worker lost" in events(place, "train")
