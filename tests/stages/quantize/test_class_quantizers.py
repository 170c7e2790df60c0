"""Classes that are quantized whole, without an actor."""

from __future__ import annotations

import numpy as np
import pytest

from ddoq_ray.config.quantizer import BalancedConfig
from ddoq_ray.core.balanced import balanced
from ddoq_ray.core.baselines import lloyd
from ddoq_ray.core.distortion import voronoi_counts, w2_squared
from ddoq_ray.stages.quantize.class_quantizers import Settings, WholeClasses


def test_balanced_centroids_are_better_for_uniform_weights_than_those_of_k_means() -> None:
    rng = np.random.default_rng(0)
    x = {c: np.concatenate([rng.normal(0, 1, (50, 6)), rng.normal(4, 0.3, (9, 6))]).astype(np.float16) for c in (0, 1)}
    settings = Settings(4, 3, "error", 1, (6, 1, 1), "prior", "id", 1)
    whole = WholeClasses(
        BalancedConfig(rounds=20), settings, {0: 59, 1: 59}, {0: 0, 1: 0}, lambda wanted: ((c, x[c]) for c in wanted)
    )
    uniform = np.full(4, 0.25)
    books = list(whole.codebooks([0, 1]))
    assert [book.class_id for book in books] == [0, 1]
    for book in books:
        latents = x[book.class_id].astype(np.float32)
        start, _ = lloyd(latents, 4, seed=3, class_id=book.class_id)
        assert (book.centroids == balanced(latents, start, max_rounds=20).centroids).all()
        assert (book.counts == voronoi_counts(latents, book.centroids)).all() and book.counts.sum() == 59
        assert w2_squared(latents, book.centroids, uniform) < 0.95 * w2_squared(latents, start, uniform)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quantizer.shrink=true with quantizer.name=balanced"):
        BalancedConfig(shrink=True)
    with pytest.raises(ValueError, match=r"quantizer.rounds=-1"):
        BalancedConfig(rounds=-1)
