"""Autoencoders of both kinds against diffusers itself, on tiny random ones written in its own format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from support.tiny_networks import tiny_kl, tiny_taesd

from ddoq_ray.models.autoencoder import Autoencoder, identity_of, load_autoencoder
from ddoq_ray.models.folders import content_digest
from ddoq_ray.models.priors.base import Sampling
from ddoq_ray.models.priors.load import load_prior


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {"kl": tiny_kl(scaling_factor=0.5, shift_factor=0.3), "tiny": tiny_taesd()}


@pytest.fixture(scope="module")
def folders(networks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("autoencoders")
    for name, network in networks.items():
        network.save_pretrained(root / name)
    return {name: root / name for name in networks}


def images(n: int = 5) -> torch.Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def noise(n: int = 5) -> torch.Tensor:
    return torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(2))


def test_kl_is_scaled_and_shifted_as_its_config_says(networks: dict[str, Any], folders: dict[str, Path]) -> None:
    ours = load_autoencoder(folders["kl"])
    assert (ours.latent_channels, ours.factor) == (4, 2)
    with torch.no_grad():
        posterior = networks["kl"].encode(images()).latent_dist
        torch.testing.assert_close(ours.encode(images()), (posterior.mean - 0.3) * 0.5)
        drawn = (posterior.mean + posterior.std * noise() - 0.3) * 0.5
        torch.testing.assert_close(ours.encode(images(), noise()), drawn)
        decoded = networks["kl"].decode(posterior.mean).sample
    torch.testing.assert_close(ours.decode(ours.encode(images())), decoded)


def test_tiny_gives_scaled_latents_at_once(networks: dict[str, Any], folders: dict[str, Path]) -> None:
    ours = load_autoencoder(folders["tiny"])
    assert (ours.latent_channels, ours.factor) == (4, 2)
    with torch.no_grad():
        raw = networks["tiny"].encode(images()).latents
        decoded = networks["tiny"].decode(raw).sample
    torch.testing.assert_close(ours.encode(images()), raw)
    torch.testing.assert_close(ours.decode(ours.encode(images())), decoded)
    with pytest.raises(ValueError, match=r"use encoder\.posterior=mode"):
        ours.encode(images(), noise())
    with pytest.raises(ValueError, match=r"use encoder\.posterior=mode"):
        ours.check_posterior("sample")
    load_autoencoder(folders["kl"]).check_posterior("sample")


def test_a_sample_does_not_depend_on_its_batch(folders: dict[str, Path]) -> None:
    ours = load_autoencoder(folders["kl"])
    whole = ours.encode(images(), noise())
    alone = torch.cat([ours.encode(images()[i : i + 1], noise()[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, whole)
    assert not torch.allclose(whole[0], whole[1])


@pytest.mark.parametrize("kind", ["kl", "tiny"])
@pytest.mark.parametrize(("dtype", "bound"), [("float16", 0.01), ("bfloat16", 0.05)])
def test_half_precision_and_channels_last_are_near_float32(
    folders: dict[str, Path], kind: str, dtype: str, bound: float
) -> None:
    exact = load_autoencoder(folders[kind]).encode(images())
    last = load_autoencoder(folders[kind], channels_last=True)
    torch.testing.assert_close(last.encode(images()), exact, rtol=1e-4, atol=1e-5)
    half = load_autoencoder(folders[kind], dtype=dtype, channels_last=True).encode(images())
    assert half.dtype == torch.float32
    assert float((half - exact).abs().max()) < bound * float(exact.abs().max())


@pytest.mark.slow
def test_the_compiled_encoder_is_the_encoder(folders: dict[str, Path]) -> None:
    compiled = load_autoencoder(folders["kl"], compile=True)
    torch.testing.assert_close(compiled.encode(images()), load_autoencoder(folders["kl"]).encode(images()))


def test_a_prior_with_a_tiny_autoencoder(networks: dict[str, Any], tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4, attention_head_dim=4,
        num_class_embeds=4,
    )  # fmt: skip
    networks["tiny"].save_pretrained(tmp_path / "vae")
    unet.save_pretrained(tmp_path / "unet")
    DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline"}))
    (tmp_path / "ddoq_prior.json").write_text(json.dumps({"num_classes": 3}))
    prior = load_prior(tmp_path)
    assert prior.image_size == 8 and prior.latent_shape == (4, 4, 4)
    z = prior.encode(images())
    torch.testing.assert_close(z, load_autoencoder(tmp_path).encode(images()))  # the prior's own, without its denoiser
    made = prior.synthesize(z, torch.zeros(5, dtype=torch.int64), noise(), Sampling(0.5, 4))
    assert made.shape == (5, 8, 8, 3) and made.dtype == torch.uint8


def test_what_is_no_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match=r"AutoencoderKL.*AutoencoderTiny.*VQModel"):
        load_autoencoder(tmp_path)
    with pytest.raises(ValueError, match="dtype"):
        Autoencoder(tiny_taesd(), dtype="float64")


def test_statistics_by_channel_are_part_of_what_an_autoencoder_is(folders: dict[str, Path], tmp_path: Path) -> None:
    """Earlier versions overlooked them: what they made is not taken for this; what others made stays."""
    plain = {"_class_name": "AutoencoderKL", "scaling_factor": 0.5}
    assert identity_of(plain) == plain and identity_of(plain | {"latents_mean": None, "latents_std": None}).keys() == {
        *plain, "latents_mean", "latents_std",
    }  # fmt: skip
    shutil.copytree(folders["kl"], tmp_path / "kl")
    config = json.loads((tmp_path / "kl/config.json").read_text())
    assert load_autoencoder(tmp_path / "kl").id == load_autoencoder(folders["kl"]).id
    config |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    (tmp_path / "kl/config.json").write_text(json.dumps(config))
    found = load_autoencoder(tmp_path / "kl")
    assert found.id != content_digest(config, found.network.state_dict())  # what earlier versions called it
