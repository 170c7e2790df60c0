"""What conditions an image is the prior's own affair, and no class is asked for more than the prior needs."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image
from support.tiny_networks import CLASSES, tiny_unet, tiny_vae

from ddoq_ray.execution.networks import Networks
from ddoq_ray.models.priors.base import Sampling
from ddoq_ray.models.priors.class_conditional import ClassConditionalPrior
from ddoq_ray.models.synthesis import Asked, Synthesizer
from ddoq_ray.stages.prepare import mapping
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.records import ClassInfo

INFOS = [
    ClassInfo(i, name, name, prior_label=label) for i, (name, label) in enumerate(zip(CLASSES, [2, 0, 1], strict=True))
]


def prior_of(scheduler: Any = DDIMScheduler) -> ClassConditionalPrior:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ClassConditionalPrior(tiny_vae(), tiny_unet(), scheduler(clip_sample=False), num_classes=len(CLASSES))


def test_a_row_follows_from_its_class_alone_and_may_be_shipped() -> None:
    prior = prior_of()
    rows = prior.conditioning(INFOS)
    assert torch.equal(rows, torch.tensor([2, 0, 1])) and torch.equal(pickle.loads(pickle.dumps(rows)), rows)
    for i, info in enumerate(INFOS):
        assert torch.equal(prior.conditioning([info]), rows[i : i + 1])
    with pytest.raises(ValueError, match=r"1 of 3 classes have no prior_label.*\(dog\).*classes\.json"):
        prior.conditioning([INFOS[0], dataclasses.replace(INFOS[1], prior_label=None), INFOS[2]])
    with pytest.raises(ValueError, match="expected int64 labels"):
        prior.synthesize(torch.zeros(1, 4, 4, 4), None, torch.zeros(1, 4, 4, 4), Sampling(0.5, 4))


def test_pictures_are_keyed_by_their_centroids() -> None:
    prior, how = prior_of(DDPMScheduler), Sampling(0.5, 2)
    z = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    made = Synthesizer(prior, seed=1, batch=1).pictures(Asked(z, INFOS, [4, 5, 6]), how).pictures
    assert made.shape == (3, 8, 8, 3) and made.dtype == np.uint8
    back = Synthesizer(prior, seed=1, batch=1).pictures(Asked(z[::-1].copy(), INFOS[::-1], [6, 5, 4]), how).pictures
    assert np.array_equal(made, back[::-1])
    other = Synthesizer(prior, seed=2, batch=1).pictures(Asked(z, INFOS, [4, 5, 6]), how).pictures
    assert not np.array_equal(made, other)
    together = Synthesizer(prior, seed=1, batch=3).pictures(Asked(z, INFOS, [4, 5, 6]), how).pictures
    assert np.abs(made.astype(int) - together).max() <= 1


def test_pictures_may_be_stored_at_another_size() -> None:
    prior, how = prior_of(), Sampling(0.5, 2)
    z = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    own = Synthesizer(prior, seed=1, batch=2).pictures(Asked(z, INFOS, [4, 5, 6]), how).pictures
    small = Synthesizer(prior, seed=1, batch=2, image_size=5).pictures(Asked(z, INFOS, [4, 5, 6]), how).pictures
    assert small.shape == (3, 5, 5, 3) and small.dtype == np.uint8
    for picture, expected in zip(small, own, strict=True):
        assert np.array_equal(picture, np.asarray(Image.fromarray(expected).resize((5, 5))))  # as D4M's script does


def test_what_is_not_finite_is_named() -> None:
    z = np.zeros((2, 64), np.float32)
    z[1, 3] = np.nan
    with pytest.raises(ValueError, match=r"class 1 \(dog\), centroid 9, is a centroid with NaN"):
        Synthesizer(prior_of(), 0, 2).pictures(Asked(z, INFOS[:2], [8, 9]), Sampling(0.5, 4))
    damaged = prior_of()
    with torch.no_grad():
        damaged.denoiser.conv_in.weight[0] = float("inf")
    with pytest.raises(ValueError, match=r"image of class 0 \(cat\), centroid 8, and 1 more"):
        Synthesizer(damaged, 0, 2).pictures(Asked(np.zeros((2, 64), np.float32), INFOS[:2], [8, 9]), Sampling(0.5, 4))


@pytest.mark.parametrize("needs", [("prior_label",), ("prompt",), ()])
def test_classes_need_a_label_only_where_the_prior_takes_labels(tmp_path: Path, needs: tuple[str, ...]) -> None:
    unknown = tuple(dataclasses.replace(info, prior_label=None) for info in INFOS)
    data = Data(Folder(str(tmp_path)), unknown, (), ())
    networks = Networks("", (4,), 8, None, 0, None, None, None, 0, 0, {}, prior_needs=needs)
    if needs == ("prior_label",):
        with pytest.raises(ValueError, match="has no prior_label"):
            mapping.resolve(data, networks)
    else:
        assert mapping.resolve(data, networks).classes == unknown


def test_a_class_that_the_prior_has_no_label_of_is_told_what_serves() -> None:
    imagenet = ["tench, Tinca tinca", *(f"class {i}" for i in range(999))]
    with pytest.raises(ValueError, match=r"labels are ImageNet-1K's.*subsets.*train-prior.*prior=sd-1-5"):
        mapping.resolve_mapping([ClassInfo(0, "weld seam", "weld seam")], "prior_label", "prior", imagenet, 1000)
    with pytest.raises(ValueError, match=r"no output of that name.*train-prior.*prior=sd-1-5") as error:
        mapping.resolve_mapping([ClassInfo(0, "weld seam", "weld seam")], "prior_label", "prior", ["cat"], 1)
    assert "ImageNet" not in str(error.value)
    assert mapping.resolve_mapping([ClassInfo(0, "tench", "tench")], "prior_label", "prior", imagenet, 1000)
