"""Pictures to latents: what the network gives, whatever the inner batch; noise that belongs to its key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from support.tiny_networks import tiny_kl

from ddoq_ray.core.rng import philox
from ddoq_ray.models.autoencoder import Autoencoder
from ddoq_ray.models.encoding import Encoding, LatentEncoder, not_finite

SHAPE = (4, 4, 4)
KEYS = [f"k{i}" for i in range(7)]
PIXELS = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
NEAR = {"rtol": 2e-3, "atol": 2e-3}  # float16's rounding, and another batch size


@pytest.fixture(scope="module")
def network() -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_kl(scaling_factor=0.5)


@pytest.fixture
def encoder(network: AutoencoderKL) -> Callable[..., LatentEncoder]:
    def make(batch: int, **how: Any) -> LatentEncoder:
        return LatentEncoder(Autoencoder(network), Encoding(SHAPE, batch, **how))

    return make


def test_a_posterior_sample_belongs_to_its_key(network: AutoencoderKL, encoder: Callable[..., LatentEncoder]) -> None:
    """In any batch and any order, and with the noise that the key alone gives."""
    drawn = encoder(7, posterior="sample", seed=3).encode(PIXELS, KEYS)
    for batch in (1, 3):
        small = encoder(batch, posterior="sample", seed=3)
        np.testing.assert_allclose(small.encode(PIXELS[::-1], KEYS[::-1])[::-1], drawn, **NEAR)
    other = encoder(7, posterior="sample", seed=4).encode(PIXELS, KEYS)
    assert not np.allclose(other, drawn, atol=1e-2)

    images = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = np.stack([philox("posterior", 3, k).standard_normal(SHAPE, dtype=np.float32) for k in KEYS])
    with torch.no_grad():
        posterior = network.encode(images).latent_dist
    expected = (posterior.mean + posterior.std * torch.from_numpy(noise)) * 0.5
    np.testing.assert_allclose(drawn, expected.flatten(1).numpy(), **NEAR)
    assert drawn.dtype == np.float16 and drawn.shape == (7, 64)


@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_the_network_sees_one_shape_where_it_is_compiled(
    encoder: Callable[..., LatentEncoder], posterior: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last batch is filled up, and what was filled in does not come back."""
    seen: list[int] = []
    encode = Autoencoder.encode

    def watched(self: Autoencoder, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        assert (noise is None) == (posterior == "mode") and (noise is None or len(noise) == len(images))
        seen.append(len(images))
        return encode(self, images, noise)

    monkeypatch.setattr(Autoencoder, "encode", watched)
    plain = encoder(3, posterior=posterior).encode(PIXELS, KEYS)
    filled = encoder(3, posterior=posterior, one_shape=True).encode(PIXELS, KEYS)
    assert seen == [3, 3, 1, 3, 3, 3]
    np.testing.assert_allclose(filled, plain, **NEAR)


def test_no_picture_gives_no_latent(encoder: Callable[..., LatentEncoder]) -> None:
    for posterior in ("mode", "sample"):
        made = encoder(3, posterior=posterior).encode(PIXELS[:0], [])
        assert made.shape == (0, 64) and made.dtype == np.float16


def test_what_does_not_fit_float16_is_found() -> None:
    rng = np.random.default_rng(0)
    latents = rng.integers(0, 2**16, (500, 8)).astype(np.uint16).view(np.float16)  # every kind of number
    assert not_finite(latents).tolist() == np.flatnonzero(~np.isfinite(latents).all(axis=1)).tolist()
