"""How sure a classifier is of pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddoq_ray.models.classifiers import Classifier, Normalisation, build_classifier
from ddoq_ray.models.confidence import class_losses

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def judge() -> Classifier:
    return build_classifier("convnet3-w8", 5, 16, Normalisation((0.2, 0.4, 0.6), (0.3, 0.2, 0.5))).eval()


def test_it_is_the_cross_entropy_of_each_picture(judge: Classifier) -> None:
    pictures, indices = RNG.integers(0, 256, (4, 16, 16, 3), np.uint8), np.array([0, 3, 4, 1])
    losses = class_losses(judge, pictures, indices)
    with torch.inference_mode():
        for picture, index, loss in zip(pictures, indices, losses, strict=True):
            logits = judge(torch.from_numpy(picture.transpose(2, 0, 1)[None] / np.float32(255)))[0]
            assert np.isclose(loss, -logits.log_softmax(0)[index], atol=1e-5)


def test_a_padded_crop_is_zero_outside_once_it_is_normalised(judge: Classifier) -> None:
    crops = RNG.integers(0, 256, (2, 8, 8, 3), np.uint8)
    seen = []
    hook = judge.trunk.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    class_losses(judge, crops, np.array([1, 2]), pad=True)
    hook.remove()
    (x,) = seen
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:12, 4:12] = True
    assert float(x[:, :, ~inside].abs().max()) < 1e-6
    pixels = x[:, :, inside].reshape(2, 3, 8, 8) * judge.std + judge.mean
    assert np.allclose(pixels.permute(0, 2, 3, 1).numpy() * 255, crops, atol=1e-3)


def test_an_output_that_is_not_there_is_told(judge: Classifier) -> None:
    with pytest.raises(ValueError, match="it has 5 outputs, and a class asks for output 5"):
        class_losses(judge, np.zeros((1, 16, 16, 3), np.uint8), np.array([5]))
