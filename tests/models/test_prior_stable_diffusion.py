"""Stable Diffusion against diffusers' own pipelines, on tiny random networks written in its format."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from support.prior_tests import INFOS, PriorTests
from support.tiny_networks import save_stable_diffusion

from ddoq_ray.models.priors.base import Sampling
from ddoq_ray.models.priors.load import load_prior

STEPS = 10
NEGATIVE = "cartoon, anime"
SCHEDULERS = {"ddim": DDIMScheduler, "pndm": PNDMScheduler, "dpm++2m": DPMSolverMultistepScheduler}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return save_stable_diffusion(tmp_path_factory.mktemp("sd") / "sd")


class TestStableDiffusion(PriorTests):
    @pytest.fixture
    def folder(self, saved: Path) -> Path:
        return saved


class TestVelocity(PriorTests):
    """As Stable Diffusion 2.1."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction", steps_offset=1)
            return save_stable_diffusion(
                tmp_path_factory.mktemp("sd2") / "sd", scheduler, use_linear_projection=True, attention_head_dim=[2, 4]
            )


def drawn(n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, 4, 4, generator=g), torch.randn(n, 4, 4, 4, generator=g)


def denoised(prior: Any, z: torch.Tensor, e: torch.Tensor, how: Sampling) -> torch.Tensor:
    """What `synthesize` decodes."""
    condition = prior.conditioning(INFOS)
    with torch.inference_mode():
        return prior.sampler.sample(z, e, lambda x, t, g: prior.predict(x, t, condition, g), how)


def pipeline_of(kind: Any, folder: Path, scheduler: str) -> Any:
    pipeline = kind.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    config = pipeline.scheduler.config
    if scheduler != "folder":
        clip = {"clip_sample": False} if scheduler == "ddim" else {}
        pipeline.scheduler = SCHEDULERS[scheduler].from_config(config, **clip)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("scheduler", ["folder", *SCHEDULERS])
@pytest.mark.parametrize("guidance", [1.0, 8.0])
@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_image_to_image_equals_diffusers_own(
    saved: Path, scheduler: str, guidance: float, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given latents of four channels the pipeline takes them as they are; its noise is handed to it."""
    z, e = drawn()
    pipeline = pipeline_of(StableDiffusionImg2ImgPipeline, saved, scheduler)
    monkeypatch.setattr("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.randn_tensor",
                        lambda shape, **_: e)  # fmt: skip
    asked: dict[str, Any] = {"strength": strength, "num_inference_steps": STEPS, "guidance_scale": guidance}
    expected = pipeline(
        [i.prompt for i in INFOS], z, negative_prompt=[NEGATIVE] * 3, output_type="latent", **asked
    ).images
    prior = load_prior(saved, scheduler=scheduler, negative_prompt=NEGATIVE)
    how = Sampling(strength, STEPS, "noised", guidance)
    torch.testing.assert_close(denoised(prior, z, e, how), expected, atol=1e-5, rtol=1e-5)
    pictures = pipeline([i.prompt for i in INFOS], z, negative_prompt=[NEGATIVE] * 3, output_type="np", **asked).images
    made = prior.synthesize(z, prior.conditioning(INFOS), e, how)
    assert (made.float() / 255 - torch.from_numpy(pictures)).abs().max() <= 0.5 / 255 + 1e-5


@pytest.mark.parametrize("scheduler", ["folder", *SCHEDULERS])
@pytest.mark.parametrize("guidance", [1.0, 8.0])
def test_from_noise_it_equals_diffusers_own_pipeline(saved: Path, scheduler: str, guidance: float) -> None:
    z, e = drawn()
    pipeline = pipeline_of(StableDiffusionPipeline, saved, scheduler)
    expected = pipeline(
        [i.prompt for i in INFOS], latents=e, negative_prompt=[NEGATIVE] * 3, num_inference_steps=STEPS,
        guidance_scale=guidance, output_type="latent", height=8, width=8,
    ).images  # fmt: skip
    prior = load_prior(saved, scheduler=scheduler, negative_prompt=NEGATIVE)
    made = denoised(prior, z, e, Sampling(0.0, STEPS, "noise", guidance))
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


def test_the_prompt_and_the_negative_prompt_steer(saved: Path) -> None:
    z, e = drawn()
    plain, other = load_prior(saved), load_prior(saved, negative_prompt=NEGATIVE)
    assert plain.id == other.id  # latents do not depend on it
    rows, others = plain.conditioning(INFOS), other.conditioning(INFOS)
    assert rows.shape == (3, 2, 8, 16) and rows.dtype == torch.float32
    assert torch.equal(rows[:, 0], others[:, 0]) and not torch.equal(rows[:, 1], others[:, 1])
    assert torch.equal(rows[0, 1], rows[1, 1])
    guided = Sampling(0.7, STEPS, "noised", 8.0)
    assert not torch.equal(denoised(plain, z, e, guided), denoised(other, z, e, guided))
    unguided = Sampling(0.7, STEPS, "noised", 1.0)
    assert torch.equal(denoised(plain, z, e, unguided), denoised(other, z, e, unguided))
    assert plain.guidance_of(None) == 8.0


def test_a_text_is_embedded_once_and_few_are_kept(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior: Any = load_prior(saved)
    asked: list[int] = []
    prior.prompts.encoder.register_forward_pre_hook(lambda *_: asked.append(1))
    first = prior.conditioning(INFOS)
    assert torch.equal(prior.conditioning(INFOS * 5)[:3], first) and len(asked) == 4
    monkeypatch.setattr("ddoq_ray.models.priors.prompts.KEPT", 2)
    again = [prior.conditioning([info]) for info in [*INFOS, dataclasses.replace(INFOS[0], prompt="a b"), *INFOS]]
    assert len(prior.prompts._made) == 2 and torch.equal(torch.cat(again[-3:]), first)


def test_a_prompt_too_long_is_told(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = load_prior(saved).conditioning([dataclasses.replace(INFOS[0], prompt="cat " * 20)])
    assert rows.shape == (1, 2, 8, 16) and "longer than 8 tokens" in caplog.text


def test_another_size_of_images_is_another_prior(saved: Path) -> None:
    prior, larger = load_prior(saved), load_prior(saved, image_size=16)
    assert larger.latent_shape == (4, 8, 8) and larger.image_size == 16 and larger.id != prior.id
    z, y, e = torch.randn(1, 4, 8, 8), larger.conditioning(INFOS[:1]), torch.randn(1, 4, 8, 8)
    assert larger.synthesize(z, y, e, Sampling(0.5, 4)).shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match=r"image_size=10: expected a multiple of 4"):
        load_prior(saved, image_size=10)


def test_an_image_to_image_folder_and_one_of_a_safety_checker_load(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "sd"))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionImg2ImgPipeline",
              "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_prior(folder).id == load_prior(saved).id


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("unet", {"in_channels": 9}, r"takes 9 channels.*inpainting.*prior=sd-1-5"),
        ("unet", {"addition_embed_type": "text_time"}, r"Stable Diffusion XL.*prior=sd-1-5"),
        ("unet", {"class_embed_type": "projection"}, r"class_embed_type=projection.*prior=sd-1-5"),
        ("unet", {"num_class_embeds": 1000}, r"upscalers.*prior=sd-1-5"),
        ("unet", {"time_cond_proj_dim": 256}, r"latent consistency.*prior=sd-1-5"),
        ("unet", {"cross_attention_dim": 768}, r"text of width 768, the text encoder gives 16"),
        ("unet", {"_class_name": "UNet2DModel"}, r"expected a UNet2DConditionModel.*got UNet2DModel"),
        ("unet", {"layers_per_block": 2}, r"lacks|does not load"),
        ("text_encoder", {"num_hidden_layers": 3}, r"text_encoder lacks 16 tensors"),
    ],
)
def test_networks_that_need_more_are_refused_with_what_serves(
    saved: Path, tmp_path: Path, part: str, changes: dict[str, Any], words: str
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "sd"))
    config = json.loads((folder / part / "config.json").read_text())
    (folder / part / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=words):
        load_prior(folder)


def test_incomplete_folders_are_refused(saved: Path, tmp_path: Path) -> None:
    for part in ("tokenizer", "text_encoder", "scheduler", "unet", "vae"):
        folder = Path(shutil.copytree(saved, tmp_path / part))
        shutil.rmtree(folder / part)
        with pytest.raises(ValueError, match=part):
            load_prior(folder)
    folder = Path(shutil.copytree(saved, tmp_path / "xl"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(ValueError, match=r"StableDiffusionXLPipeline; this version reads StableDiffusionPipeline"):
        load_prior(folder)
    with pytest.raises(ValueError, match=r"prior\.scheduler=euler: expected one of folder, ddim"):
        load_prior(saved, scheduler="euler")
