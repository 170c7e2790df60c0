"""Starts that use centroids without their blur: the pull of `guided`, candidates and who keeps which."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from support.tiny_networks import CLASSES, tiny_unet, tiny_vae

from ddoq_ray.models.candidates import Candidates
from ddoq_ray.models.classifiers import build_classifier
from ddoq_ray.models.priors.base import Sampling
from ddoq_ray.models.priors.class_conditional import ClassConditionalPrior
from ddoq_ray.models.priors.sampling import Sampler
from ddoq_ray.models.synthesis import Asked, Synthesizer
from ddoq_ray.storage.records import ClassInfo

INFOS = [ClassInfo(i, name, name, teacher_index=i, prior_label=i) for i, name in enumerate(CLASSES)]
CPU = torch.device("cpu")


def sampler(kind: Any = DDIMScheduler, **config: Any) -> Sampler:
    return Sampler(
        kind(beta_schedule="linear", **({"clip_sample": False} if kind is DDIMScheduler else {}), **config), CPU
    )


def rows(n: int = 3, side: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, side, side, generator=g), torch.randn(n, 2, side, side, generator=g)


def of_normal_data(s: Sampler, *, v: bool) -> Any:
    """What a perfect network says where clean latents are standard normal: E[clean | z] = signal z."""

    def predict(z: torch.Tensor, t: torch.Tensor, guidance: float) -> torch.Tensor:
        level = s.scheduler.alphas_cumprod[t.long()]
        eps = (1 - level).sqrt() * z
        return level.sqrt() * eps - (1 - level).sqrt() * level.sqrt() * z if v else eps

    return predict


def guided(scale: float, until: float = 0.0, pool: int = 1, steps: int = 20) -> Sampling:
    return Sampling(1.0, steps, "guided", guide_until=until, guide_scale=scale, guide_pool=pool)


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_no_pull_is_the_start_from_noise(kind):
    s = sampler(kind)
    z, noise = rows()
    plain = s.sample(z, noise, of_normal_data(s, v=False), Sampling(1.0, 20, "noise"))
    for how in (guided(0.0), guided(0.7, until=1.0)):
        assert torch.allclose(s.sample(z, noise, of_normal_data(s, v=False), how), plain, atol=1e-5)


def test_a_whole_pull_to_the_end_gives_the_centroid_and_one_let_go_early_does_not():
    s = sampler()
    z, noise = rows()
    assert torch.allclose(s.sample(z, noise, of_normal_data(s, v=False), guided(1.0)), z, atol=1e-5)
    let_go = s.sample(z, noise, of_normal_data(s, v=False), guided(1.0, until=0.8))
    free = s.sample(z, noise, of_normal_data(s, v=False), Sampling(1.0, 20, "noise"))
    near, far = ((x - z).square().mean() for x in (let_go, free))
    assert 0.01 < near < 0.8 * far


def test_both_kinds_of_prediction_are_pulled_alike_and_a_learned_variance_passes():
    z, noise = rows()
    eps, v = sampler(), sampler(prediction_type="v_prediction")
    how = guided(0.4, until=0.3)
    one = eps.sample(z, noise, of_normal_data(eps, v=False), how)
    assert torch.allclose(one, v.sample(z, noise, of_normal_data(v, v=True), how), atol=1e-4)
    output = torch.cat([noise, torch.full_like(noise, 7.0)], dim=1)
    moved = eps.guided(output, noise, torch.tensor(900), z, how)
    assert moved.shape == output.shape and bool((moved[:, 2:] == 7.0).all()) and not torch.equal(moved, output)


@pytest.mark.parametrize("side", [4, 5])
def test_a_coarse_pull_moves_means_of_squares_alone(side):
    s = sampler()
    z, noise = rows(side=side)
    t = torch.tensor(500)
    output = of_normal_data(s, v=False)(noise, t, 1.0)
    level = s.scheduler.alphas_cumprod[500]
    clean = lambda o: (noise - (1 - level).sqrt() * o) / level.sqrt()
    before, after = clean(output), clean(s.guided(output, noise, t, z, guided(1.0, pool=2)))
    moved = after - before
    blocks = moved[..., :4, :4].unfold(2, 2, 2).unfold(3, 2, 2)
    assert torch.allclose(blocks, blocks.mean((-1, -2), keepdim=True).expand_as(blocks), atol=1e-5)
    mean = lambda x: torch.nn.functional.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    assert torch.allclose(mean(after), mean(z), atol=1e-4)


def test_what_cannot_be_guided_is_refused():
    with pytest.raises(ValueError, match="start=guided needs a variance-preserving scheduler"):
        sampler(EulerDiscreteScheduler).steps_run(guided(0.3))
    with pytest.raises(ValueError, match="guide_until and guide_scale"):
        sampler().steps_run(guided(1.5))
    assert sampler().steps_run(guided(0.3, steps=7)) == 7


def prior_of() -> ClassConditionalPrior:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ClassConditionalPrior(tiny_vae(), tiny_unet(), DDIMScheduler(clip_sample=False), classes=list(CLASSES))


def asked(n: int = 3) -> Asked:
    z = np.random.default_rng(0).standard_normal((n, 64)).astype(np.float32)
    return Asked(z, [INFOS[i % 3] for i in range(n)], [i // 3 for i in range(n)])


def test_of_several_images_the_one_with_the_lowest_loss_is_kept_whatever_the_batch():
    prior, judge = prior_of(), build_classifier("convnet3-w8", 3, 8, seed=1).eval()
    want, how = asked(6), Sampling(1.0, 3, "noise")
    candidates = Candidates(4, judge)
    made = Synthesizer(prior, 1, 1, candidates).pictures(want, how)
    alone = Synthesizer(prior, 1, 1).pictures(want, how).pictures
    indices = np.arange(6) % 3
    best = candidates.losses(alone, indices)
    assert made.losses is not None and made.kept is not None
    assert (made.losses <= best).all() and len(set(made.kept.tolist())) > 1
    first = made.kept == 0  # the first candidate is the image that is made where there are no others
    assert np.array_equal(made.pictures[first], alone[first]) and np.array_equal(made.losses[first], best[first])
    assert np.allclose(candidates.losses(made.pictures, indices), made.losses, atol=1e-5)
    again = Synthesizer(prior, 1, 1, candidates).pictures(want[slice(2, 5)], how)
    assert np.array_equal(again.pictures, made.pictures[2:5])
    assert made.facts[0] == {"judge_loss": round(float(made.losses[0]), 6), "candidate": int(made.kept[0])}


def test_the_first_of_equal_candidates_is_kept_and_none_that_is_no_number():
    chosen = Candidates(3, build_classifier("convnet3-w8", 3, 8)).chosen
    losses = np.array([[2.0, np.nan, np.inf, 5.0], [1.0, 3.0, np.nan, 1.0], [1.0, 3.0, np.inf, 2.0]], np.float32)
    everywhere = np.ones((3, 4), bool)
    assert chosen(losses, everywhere).tolist() == [1, 1, 0, 1]
    inside = np.array([[True, False, False, True], [False, False, False, False], [True, False, False, True]])
    assert chosen(losses, inside).tolist() == [2, 1, 0, 2]  # of all, where none is inside


def test_candidates_keep_to_their_cell():
    prior = prior_of()
    judge = build_classifier("convnet3-w8", 3, 8, seed=1).eval()
    want, how = asked(6), Sampling(1.0, 3, "noise")
    books = {c: want.centroids[[c, c + 3]] for c in range(3)}
    synthesizer = Synthesizer(prior, 1, 3, Candidates(6, judge, "cell"))
    made = synthesizer.pictures(want, how, books)
    free = Synthesizer(prior, 1, 3, Candidates(6, judge)).pictures(want, how)
    inside = [synthesizer._inside(want, pictures, books) for pictures in (made.pictures, free.pictures)]
    assert inside[0].sum() >= inside[1].sum() and inside[0].any()


def test_a_judge_of_other_classes_is_refused():
    candidates = Candidates(2, build_classifier("convnet3-w8", 2, 8).eval())
    with pytest.raises(ValueError, match="it has 2 outputs, and a class asks for output 2"):
        Synthesizer(prior_of(), 0, 3, candidates).pictures(asked(), Sampling(0.5, 4))
    with pytest.raises(ValueError, match="expected 2 or more"):
        Candidates(1, SimpleNamespace())  # type: ignore[arg-type]
