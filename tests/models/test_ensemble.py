"""Several teachers as one: the mean of their probabilities at the temperature, by hand; other classes are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddoq_ray.config.compose import load_config
from ddoq_ray.core.views.params import ViewSpec
from ddoq_ray.core.views.render import batch_views
from ddoq_ray.execution.networks import Networks
from ddoq_ray.models.classifiers import Classifier, build_classifier
from ddoq_ray.models.ensemble import Ensemble, feature_dim, for_teacher, load_teacher
from ddoq_ray.models.labelling import Labeller
from ddoq_ray.stages.label.step import Label, codec_name
from ddoq_ray.stages.synthesize.step import Synthesize
from ddoq_ray.storage.layout import LabelKey, Place

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 3, 20, 20), dtype=np.uint8))


@pytest.fixture(scope="module")
def members() -> list[Classifier]:
    return [build_classifier("convnet3-w8", 5, size, seed=seed).eval() for seed, size in enumerate((24, 16))]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("codec", ["logits", "logits_int8"])
def test_its_labels_are_the_mean_of_probabilities(members: list[Classifier], temperature: float, codec: str) -> None:
    ensemble = Ensemble(members, temperature).eval()
    labeller = Labeller(ensemble, codec, ViewSpec(size=24), seed=3, batch=4)
    packed, _ = labeller.labels(IMAGES, np.arange(6), 2)
    views = batch_views(IMAGES, np.arange(6), ViewSpec(size=24), 3, 2)[0]
    with torch.no_grad():
        each = [(m(for_teacher(views, m.image_size)) / temperature).softmax(1) for m in members]
    found = (labeller.codec.decode(packed) / temperature).softmax(1)
    torch.testing.assert_close(found, (each[0] + each[1]) / 2, rtol=0, atol=2e-3)


def test_what_is_known_of_it(members: list[Classifier]) -> None:
    ensemble = Ensemble(members, 2.0)
    assert (ensemble.image_size, ensemble.num_classes, feature_dim(ensemble)) == (24, 5, None)
    assert ensemble.id == Ensemble(members[::-1], 3.0).id != members[0].id
    assert Ensemble(members[:1], 2.0).id != ensemble.id
    costs = Labeller(ensemble, "logits", ViewSpec(size=16), seed=0, batch=4).codec_costs(IMAGES, np.arange(5), 2.0)
    assert list(costs) == ["logits", "logits_int8"] and costs["logits"]["kl"] < costs["logits_int8"]["kl"] < 1e-4
    with pytest.raises(ValueError, match=r"teacher\.path: .* same classes .* has 5 .* 4 "):
        Ensemble([members[0], build_classifier("convnet3-w8", 4, 16)], 1.0)


def test_teachers_are_loaded_by_their_paths() -> None:
    one = load_teacher("shipped:digits-teacher")
    assert isinstance(one, Classifier) and load_teacher(["shipped:digits-teacher"]).id == one.id
    two = load_teacher(["shipped:digits-teacher"] * 2, temperature=4.0)
    x = torch.rand(3, 3, one.image_size, one.image_size)
    with torch.no_grad():  # a teacher beside itself says what it says alone, up to a constant
        torch.testing.assert_close((two(x) / 4).softmax(1), (one(x) / 4).softmax(1))


def test_the_temperature_is_in_the_identity_of_an_ensembles_labels() -> None:
    step = Label(Synthesize(Place()), Place(), LabelKey("teacher", "protocol", 16))
    several = "teacher.path=[shipped:digits-teacher,elsewhere/other]"
    config = load_config([several, "protocol.temperature=7"])
    assert config.teacher.title == "digits-teacher+other"
    assert step.settings(config)["views"]["temperature"] == 7
    assert "temperature" not in step.settings(load_config(["protocol.temperature=7"]))["views"]
    networks = Networks("p", (1,), 8, None, 0, "t", "a+b", None, 1000, None, {})
    assert codec_name(config, networks, 10) == "logits"
    with pytest.raises(ValueError, match=r"labels\.mode=features: .* no linear head"):
        codec_name(load_config([several, "labels.mode=features"]), networks, 10)
    for mode in ("online", "hard"):  # nothing is stored
        assert codec_name(load_config([several, f"labels.mode={mode}"]), networks, 10) == mode


def test_a_budget_is_per_image_set_and_too_small_a_one_is_refused_with_the_sizes() -> None:
    networks = Networks("p", (1,), 8, None, 0, "t", "a", None, 1000, 512, {})
    keys = ("protocol.steps=null", "protocol.epochs=300", "baselines=[]")

    def chosen(budget: str, images: int = 10_000) -> str:
        return codec_name(load_config([*keys, f"labels.budget={budget}"]), networks, images)

    assert [chosen(b) for b in ("6GB", "5.9GB", "1600MB", "1.548GB")] == ["logits", "features", "features", "features"]
    with pytest.raises(ValueError, match=r"labels\.budget=1GB is too small for 3,000,000 labels .*features 1\.5 GB"):
        chosen("1GB")
    with pytest.raises(ValueError, match="expected a size such as 500MB"):
        load_config(["labels.budget=big"])
    with pytest.raises(ValueError, match=r"labels\.budget has no effect .*labels\.mode"):
        load_config(["labels.budget=1GB", "labels.mode=logits"])
