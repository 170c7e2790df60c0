"""Folders in diffusers' format as others leave them: each is read right, or refused in one line that names its file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    KarrasVeScheduler,
    PNDMScheduler,
    RePaintScheduler,
    ScoreSdeVeScheduler,
    UnCLIPScheduler,
    VQModel,
)
from support.tiny_networks import (
    CLASSES,
    save_parts,
    save_stable_diffusion,
    tiny_dit,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)

from ddoq_ray.models.priors.base import Sampling
from ddoq_ray.models.priors.load import load_prior
from ddoq_ray.storage.records import ClassInfo

INFOS = [ClassInfo(i, name, name, prior_label=i) for i, name in enumerate(CLASSES)]
EXTRA = {"classes": CLASSES}


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def made(folder: Path, **load: Any) -> torch.Tensor:
    """One image of each class."""
    prior = load_prior(folder, **load)
    how = Sampling(strength=1.0, steps=4, guidance=2.0)
    assert prior.check_settings(how) == 4
    z, e = torch.randn(2, len(INFOS), *prior.latent_shape, generator=torch.Generator().manual_seed(0))
    return prior.synthesize(z, prior.conditioning(INFOS), e, how)


def one_line(folder: Path, words: str, **load: Any) -> None:
    with pytest.raises(ValueError, match=words) as error:
        made(folder, **load)
    assert "\n" not in str(error.value).strip() and len(str(error.value)) < 600, error.value


@pytest.mark.parametrize("solver", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_solver_that_takes_no_variance_is_given_none(tmp_path: Path, solver: Any) -> None:
    """A config that was DDPM's says variance_type to whichever solver it was handed on to by `from_config`."""
    scheduler = solver(**({"skip_prk_steps": True} if solver is PNDMScheduler else {}))
    folder = save_parts(tmp_path / "dit", "transformer", tiny_dit(), scheduler, EXTRA)
    expected = made(folder)
    edit(folder / "scheduler/scheduler_config.json", variance_type="learned_range")
    assert torch.equal(made(folder), expected)


def test_a_learned_variance_that_nothing_predicts(tmp_path: Path) -> None:
    learned = DDPMScheduler(variance_type="learned_range")
    one_line(save_parts(tmp_path / "unet", "unet", tiny_unet(), learned, EXTRA), "variance_type=learned_range.*fixed")
    one_line(save_stable_diffusion(tmp_path / "sd", learned), "variance_type=learned_range.*fixed")


@pytest.mark.parametrize("scheduler", [RePaintScheduler, ScoreSdeVeScheduler, KarrasVeScheduler, UnCLIPScheduler])
def test_a_scheduler_that_cannot_do_it_is_named_before_images_are_made(tmp_path: Path, scheduler: Any) -> None:
    folder = save_parts(tmp_path / "p", "unet", tiny_unet(), scheduler(), EXTRA)
    for start in ("noised", "noise"):
        with pytest.raises(ValueError, match=scheduler.__name__):
            load_prior(folder).check_settings(Sampling(strength=1.0, steps=4, start=start))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trained_betas": [0.1, 0.2]}, "PNDMScheduler.*cannot"),
        ({"beta_schedule": "wat"}, r"scheduler_config\.json.*wat"),
        ({"num_train_timesteps": None}, r"scheduler_config\.json"),
        ({"_class_name": "AutoPipelineForText2Image"}, "AutoPipelineForText2Image"),
    ],
)
def test_a_scheduler_config_that_cannot_be_right(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = save_stable_diffusion(tmp_path / "sd")
    edit(folder / "scheduler/scheduler_config.json", **changes)
    one_line(folder, words)


def test_a_solver_that_cannot_take_over_the_folders_noise_levels_is_refused(tmp_path: Path) -> None:
    zero = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    folder = save_stable_diffusion(tmp_path / "sd", zero)
    one_line(folder, r"prior\.scheduler=pndm.*rescale_betas_zero_snr", scheduler="pndm")
    assert torch.equal(made(folder, scheduler="ddim"), made(folder))


@pytest.mark.parametrize(
    ("index", "extra", "words"),
    [
        ({"id2label": {"cat": 0, "dog": 1, "fish": 2}}, {}, r"model_index\.json.*id2label"),
        ({"id2label": CLASSES}, {}, r"model_index\.json.*id2label"),
        ({}, {"classes": 3}, r"ddoq_prior\.json.*classes"),
        ({}, {"classes": dict(enumerate(CLASSES))}, r"ddoq_prior\.json.*classes"),
        ({}, {"num_classes": "3"}, r"ddoq_prior\.json.*num_classes"),
        ({}, {"classes": CLASSES, "latents": {"x": 1}}, r"ddoq_prior\.json.*latents"),
    ],
)
def test_class_names_that_are_none(tmp_path: Path, index: Any, extra: dict[str, Any], words: str) -> None:
    part, denoiser = ("transformer", tiny_dit()) if index else ("unet", tiny_unet())
    folder = save_parts(tmp_path / "p", part, denoiser, None, extra)
    edit(folder / "model_index.json", **index)
    one_line(folder, words)


@pytest.mark.parametrize(
    "changes",
    [
        {"scaling_factor": 0.0},
        {"scaling_factor": None},
        {"scaling_factor": "big"},
        {"latents_mean": 0.5, "latents_std": 1.0},
        {"latents_mean": [0.0] * 4, "latents_std": [float("nan")] * 4},
    ],
)
def test_a_scale_that_is_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = save_parts(tmp_path / "p", "unet", tiny_unet(), None, EXTRA)
    edit(folder / "vae/config.json", **changes)
    one_line(folder, f"autoencoder.*{next(reversed(changes))}")


def test_networks_that_diffusers_itself_cannot_make(tmp_path: Path) -> None:
    folder = save_parts(tmp_path / "p", "unet", tiny_unet(), None, EXTRA)
    edit(folder / "vae/config.json", sample_size=None)
    one_line(folder, "vae does not load as AutoencoderKL")


def test_a_network_alone_that_is_no_autoencoder_of_ours(tmp_path: Path) -> None:
    vq = VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=8)
    vq.save_pretrained(tmp_path / "vq")
    one_line(tmp_path / "vq", r"AutoencoderKL.*found a VQModel alone")
    tiny_unet().save_pretrained(tmp_path / "unet")
    one_line(tmp_path / "unet", r"model_index\.json.*UNet2DModel alone")


@pytest.mark.parametrize(
    "form",
    [
        {"variant": "fp16"},
        {"variant": "bf16"},
        {"variant": "non_ema"},
        {"safe_serialization": False},
        {"safe_serialization": False, "variant": "fp16"},
        {"max_shard_size": "20KB"},
        {"max_shard_size": "20KB", "variant": "fp16"},
        {"max_shard_size": "20KB", "safe_serialization": False},
    ],
)
def test_weights_in_every_form_that_diffusers_writes(tmp_path: Path, form: dict[str, Any], capfd: Any) -> None:
    folder = save_parts(tmp_path / "p", "unet", tiny_unet(), None, EXTRA)
    for part, network in (("unet", tiny_unet()), ("vae", tiny_vae())):
        shutil.rmtree(folder / part)
        network.save_pretrained(folder / part, **form)
    capfd.readouterr()
    assert len(made(folder)) == len(CLASSES)
    assert "error" not in capfd.readouterr().err.lower()


def test_plain_weights_come_before_a_variant_of_another_form(tmp_path: Path) -> None:
    """As repositories have it that kept the .bin of float32 and added safetensors of half precision."""
    folder = save_parts(tmp_path / "p", "unet", tiny_unet(), None, EXTRA)
    expected, plain = made(folder), load_prior(folder).denoiser
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    plain.save_pretrained(folder / "unet", safe_serialization=False)
    tiny_unet().save_pretrained(folder / "unet", variant="fp16")
    assert torch.equal(made(folder), expected)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_text_encoder_of_a_variant_alone(tmp_path: Path, variant: str) -> None:
    folder = save_stable_diffusion(tmp_path / "sd")
    shutil.rmtree(folder / "text_encoder")
    encoder = tiny_text_encoder(tiny_tokenizer(tmp_path / "tokenizer"))
    encoder.save_pretrained(folder / "text_encoder", variant=variant)
    assert len(made(folder)) == len(CLASSES)


def _emptied(tokenizer: Path) -> None:
    for file in tokenizer.iterdir():
        file.unlink()


def _of_t5(tokenizer: Path) -> None:
    _emptied(tokenizer)
    (tokenizer / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    (tokenizer / "spiece.model").write_bytes(b"pieces")


def _of_another_clip(tokenizer: Path) -> None:
    (tokenizer / "tokenizer.json").unlink()
    words = json.loads((tokenizer / "vocab.json").read_text())
    more = {f"word{i}</w>": len(words) + i for i in range(50)}
    (tokenizer / "vocab.json").write_text(json.dumps(words | more))


def _a_page_instead(tokenizer: Path) -> None:
    (tokenizer / "tokenizer.json").unlink()
    (tokenizer / "merges.txt").write_text("<html>404</html>\n")


@pytest.mark.parametrize("spoil", [_emptied, _of_t5, _of_another_clip, _a_page_instead])
def test_a_tokenizer_that_is_not_the_text_encoders(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """transformers makes a tokenizer of two words out of an empty folder: every class would have one prompt."""
    folder = save_stable_diffusion(tmp_path / "sd")
    spoil(folder / "tokenizer")
    one_line(folder, "tokenizer/")


def test_a_text_encoder_that_is_damaged_or_holds_code(tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path / "sd")
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:3000])
    one_line(folder, "text_encoder/")
    file.unlink()
    torch.save(torch.nn.Linear(2, 2), folder / "text_encoder/pytorch_model.bin")
    one_line(folder, "text_encoder/")
