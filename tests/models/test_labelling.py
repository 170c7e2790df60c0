"""Labels of views: the teacher's answers, in order, whatever the inner batch; no answer that is not a number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddoq_ray.core.labels import make_codec
from ddoq_ray.core.views.params import ViewSpec, view_params
from ddoq_ray.core.views.render import batch_views
from ddoq_ray.models.classifiers import Classifier, build_classifier
from ddoq_ray.models.ensemble import for_teacher
from ddoq_ray.models.labelling import Labeller

SPEC = ViewSpec(size=16, min_scale=0.2, flip=True, cutmix=True)
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 3, 20, 20), dtype=np.uint8))


@pytest.fixture(scope="module")
def teacher() -> Classifier:
    return build_classifier("convnet3-w8", 5, 24).eval()


@pytest.mark.parametrize("codec", ["logits", "features"])
@pytest.mark.parametrize("batch", [1, 4, 50])
def test_labels_are_the_teachers_on_the_views_of_each_image(teacher: Classifier, codec: str, batch: int) -> None:
    index = np.array([7, 2, 5, 0, 1, 8])
    packed, views = Labeller(teacher, codec, SPEC, seed=3, batch=batch).labels(IMAGES, index, 11)
    assert views == view_params(SPEC, 3, 11, index, (9, 20, 20)).packed()
    pixels, _, _ = batch_views(IMAGES, index, SPEC, 3, 11)
    with torch.no_grad():
        expected = teacher(for_teacher(pixels, 24))
    found = make_codec(codec, 5, teacher.head.in_features).decode(packed, teacher.head)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert packed.dtype == np.uint8 and len(packed) == len(index)


@pytest.mark.parametrize("some", [9, 4, 2], ids=["whole epochs", "half", "a small share"])
def test_labels_are_the_same_bytes_however_views_are_rendered(teacher: Classifier, some: int) -> None:
    labeller, codec = Labeller(teacher, "logits", SPEC, seed=3, batch=4), make_codec("logits", 5, None)
    for epoch in (0, 1, 11, 2):
        for first in range(0, len(IMAGES), some):
            index, answers, drawn = np.arange(len(IMAGES))[first : first + some], [], []
            for part in (index[:4], index[4:8], index[8:]):
                with torch.inference_mode():
                    pixels, _, _ = batch_views(IMAGES, part, SPEC, 3, epoch)
                    answers += [codec.encode(teacher(for_teacher(pixels, 24)))] if len(part) else []
                drawn.append(view_params(SPEC, 3, epoch, part, (9, 20, 20)).packed())
            packed, views = labeller.labels(IMAGES, index, epoch)
            np.testing.assert_array_equal(packed, np.concatenate(answers))
            assert views == b"".join(drawn)


def test_an_answer_that_is_not_a_number_is_refused(teacher: Classifier) -> None:
    broken = build_classifier("convnet3-w8", 5, 16).eval()
    broken.head.bias.data[2] = float("nan")
    with pytest.raises(ValueError, match="check the teacher"):
        Labeller(broken, "logits", SPEC, seed=0, batch=4).labels(IMAGES, np.arange(3), 0)
