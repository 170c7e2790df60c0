"""Images of one colour, and those that are no numbers, are made anew from other noise, and only they change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from support.tiny_networks import tiny_unet, tiny_vae
from torch import Tensor

from ddoq_ray.config.compose import load_config
from ddoq_ray.core.rng import philox
from ddoq_ray.models.candidates import Candidates
from ddoq_ray.models.classifiers import build_classifier
from ddoq_ray.models.priors.base import NonFiniteImages, Sampling
from ddoq_ray.models.priors.class_conditional import ClassConditionalPrior
from ddoq_ray.models.synthesis import Asked, Made, Synthesizer
from ddoq_ray.storage.records import ClassInfo

INFOS = [ClassInfo(c, n, n, c, c) for c, n in enumerate(("cat", "dog", "owl"))]
HOW = Sampling(0.5, 4)
Key = tuple[int, ...]  # class_id, centroid_id, and then candidate and attempt where they are not the first


def first_value(*key: int) -> float:
    """The first value of an image's noise, by which it is known here."""
    return float(philox(1, "noise", *key).standard_normal((4, 4, 4)).astype(np.float32)[0, 0, 0])


class Failing(ClassConditionalPrior):
    """A tiny prior of which some images, known by their noise, come out black or as no numbers."""

    def failing(self, black: Sequence[Key] = (), lost: Sequence[Key] = ()) -> Failing:
        self.black, self.lost = ({first_value(*key) for key in keys} for keys in (black, lost))
        self.calls: list[int] = []
        return self

    def synthesize(self, latents: Tensor, condition: Tensor | None, noise: Tensor, *rest: Any) -> Tensor:
        self.calls.append(len(noise))
        values = [float(row[0, 0, 0]) for row in noise]
        lost = [i for i, value in enumerate(values) if value in self.lost]
        if lost:
            raise NonFiniteImages(lost)
        made = super().synthesize(latents, condition, noise, *rest).clone()
        made[[i for i, value in enumerate(values) if value in self.black]] = 0
        return made


@pytest.fixture(scope="module")
def tiny() -> Failing:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Failing(tiny_vae(), tiny_unet(), DDIMScheduler(clip_sample=False), classes=["cat", "dog", "owl"])


def made_of(prior: Failing, retries: int = 2, how: Sampling = HOW, candidates: Candidates | None = None) -> Made:
    z = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    asked = Asked(z, [INFOS[i % 3] for i in range(5)], [i // 3 for i in range(5)])  # two batches, of 3 and 2
    return Synthesizer(prior, 1, 3, candidates, retries=retries).pictures(asked, how)


def changed(a: Made, b: Made) -> list[int]:
    return [i for i in range(5) if not np.array_equal(a.pictures[i], b.pictures[i])]


def test_what_succeeds_is_made_once(tiny: Failing) -> None:
    plain = made_of(tiny.failing(), retries=0)
    assert tiny.calls == [3, 2] and plain.facts == [{}] * 5
    again = made_of(tiny.failing())
    assert tiny.calls == [3, 2] and not changed(again, plain) and again.facts == [{}] * 5


@pytest.mark.parametrize("how", ["black", "lost"])
def test_only_what_failed_changes_and_the_same_whatever_else_failed(tiny: Failing, how: str) -> None:
    """The second row (class 1, centroid 0), alone and with its neighbours, in a batch of the same size."""
    plain = made_of(tiny.failing())
    alone = made_of(tiny.failing(**{how: [(1, 0)]}))
    assert changed(alone, plain) == [1] and alone.facts == [{}, {"attempt": 1}, {}, {}, {}]
    assert set(tiny.calls) == {3, 2}
    both = made_of(tiny.failing(**{how: [(1, 0), (2, 0), (2, 0, 0, 1)]}))
    assert changed(both, plain) == [1, 2] and np.array_equal(both.pictures[1], alone.pictures[1])
    assert both.facts == [{}, {"attempt": 1}, {"attempt": 2}, {}, {}]
    whole = made_of(tiny.failing(**{how: [(0, 0), (1, 0), (2, 0)]}))
    assert changed(whole, plain) == [0, 1, 2] and np.array_equal(whole.pictures[1], alone.pictures[1])
    assert not changed(made_of(tiny.failing(**{how: [(1, 0)]})), alone)  # the same each time


def test_what_stays_of_one_colour_is_kept_as_it_is(tiny: Failing) -> None:
    black = [(1, 1), (1, 1, 0, 1), (1, 1, 0, 2)]
    made, plain = made_of(tiny.failing(black)), made_of(tiny.failing())
    assert changed(made, plain) == [4] and not made.pictures[4].any() and made.facts == [{}] * 5
    made = made_of(tiny.failing(black[1:], black[:1]))  # a picture is better than none
    assert not made.pictures[4].any() and made.facts[4] == {"attempt": 1}


def test_what_is_never_finite_ends_the_run_by_name(tiny: Failing) -> None:
    lost = [(1, 1), (1, 1, 0, 1), (1, 1, 0, 2)]
    with pytest.raises(ValueError, match=r"class 1 \(dog\), centroid 1, and 0 more .* in 2 more attempts too"):
        made_of(tiny.failing(lost=lost))
    with pytest.raises(ValueError, match=r"\(dog\), centroid 1, and 0 more of its batch became NaN or infinite;"):
        made_of(tiny.failing(lost=lost), retries=0)
    with pytest.raises(ValueError, match=r"class 0 \(cat\), centroid 1, and 1 more"):
        made_of(tiny.failing(lost=[(0, 1), (1, 1)]), retries=0)
    assert made_of(tiny.failing(lost=lost[:2])).facts[4] == {"attempt": 2}


@pytest.mark.parametrize(("start", "strength", "again"), [("noised", 0.0, 0), ("given", 0.0, 0), ("noise", 0.0, 2)])
def test_without_noise_nothing_is_tried_again(tiny: Failing, start: Any, strength: float, again: int) -> None:
    black = [(0, 0), (0, 0, 0, 1), (0, 0, 0, 2)]
    made_of(tiny.failing(black), how=Sampling(strength, 4, start))
    assert len(tiny.calls) == 2 + again


class Judge(Candidates):
    """Three candidates, judged by a function of their pictures."""

    def __init__(self, loss: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__(3, build_classifier("convnet3-w8", 3, 8, seed=1).eval())
        self.loss = loss

    def losses(self, pictures: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return self.loss(pictures)


def test_the_judge_chooses_among_good_candidates(tiny: Failing) -> None:
    """Black ones would have the lowest loss."""
    judge = Judge(lambda pictures: pictures.astype(np.float32).mean(axis=(1, 2, 3)))
    plain = made_of(tiny.failing(), candidates=judge)
    assert plain.kept is not None
    first = int(plain.kept[1])
    gone = (1, 0, first) if first else (1, 0)
    for black, lost in (([gone], []), ([], [gone])):
        made = made_of(tiny.failing(black, lost), candidates=judge)
        assert changed(made, plain) == [1] and made.kept is not None and made.losses is not None
        assert made.kept[1] != first and made.losses[1] >= plain.losses[1] and "attempt" not in made.facts[1]
    every = [(1, 0), (1, 0, 1), (1, 0, 2)]
    made = made_of(tiny.failing(every[:2], every[2:]), candidates=judge)
    assert changed(made, plain) == [1] and made.pictures[1].any() and made.facts[1]["attempt"] == 1
    made = made_of(tiny.failing(every[:2], every[2:]), candidates=judge, retries=0)
    assert not made.pictures[1].any() and made.kept[1] in (0, 1)
    blind = Judge(lambda pictures: np.full(len(pictures), np.nan, np.float32))
    assert made_of(tiny.failing(every[:1]), candidates=blind).kept[1] == 1


def test_the_key_is_refused_where_there_is_no_noise() -> None:
    with pytest.raises(ValueError, match=r"synthesizer\.retries has no effect .*strength=0"):
        load_config(["synthesizer.strength=0", "synthesizer.retries=1"])
    with pytest.raises(ValueError, match=r"synthesizer\.retries=-1: expected 0 or more"):
        load_config(["synthesizer.retries=-1"])
    assert load_config(["synthesizer.retries=0"]).synthesizer.retries == 0
