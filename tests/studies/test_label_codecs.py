"""What rounding costs on real teachers: what the page says of the file, and the file of the teachers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ddoq_ray.core.views.params import ViewSpec
from ddoq_ray.models.classifiers import load_classifier
from ddoq_ray.models.labelling import Labeller
from studies.assets import write_cifar10_teacher
from studies.label_codecs import cifar10_images

RESULTS = Path(__file__).resolve().parents[2] / "studies/results/label_codecs.json"


def test_features_cost_a_ten_thousandth_at_most_on_every_real_teacher() -> None:
    rows = [row for row in json.loads(RESULTS.read_text()) if row["codec"] == "features" and row["temperature"] == 20]
    assert {row["teacher"] for row in rows} == {"ResNet-20", "ResNet-56", "EfficientNet-Lite0"}
    assert max(row["relative_kl"] for row in rows) < 1e-4


@pytest.mark.assets
@pytest.mark.parametrize("depth", [20, 56])
def test_the_cifar_resnets_cost_as_much_here(tmp_path: Path, depth: int) -> None:
    teacher = load_classifier(write_cifar10_teacher(depth, tmp_path / "teacher"))
    labeller = Labeller(teacher, "logits", ViewSpec(size=32, min_scale=0.08), seed=1, batch=32)
    costs = labeller.codec_costs(cifar10_images(32), np.arange(32), 20.0)
    assert costs["features"]["relative"] < 1e-4 and costs["logits"]["relative"] < 1e-6
