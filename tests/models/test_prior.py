"""The prior against diffusers itself, on tiny random models written in diffusers' own format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
)
from PIL import Image
from support.prior_tests import PriorTests
from support.tiny_networks import CLASSES, save_parts, tiny_dit, tiny_unet, tiny_vae

from ddoq_ray.data import collections as sources
from ddoq_ray.data.samples import to_square
from ddoq_ray.models.classifiers import load_classifier
from ddoq_ray.models.priors.base import Sampling
from ddoq_ray.models.priors.class_conditional import ClassConditionalPrior
from ddoq_ray.models.priors.load import load_prior

STEPS = 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("priors")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_parts(root / "unet", "unet", tiny_unet(), extra={"classes": CLASSES, "image_size": 8})
        DiTPipeline(tiny_dit(), tiny_vae(), DDIMScheduler(clip_sample=False)).save_pretrained(root / "dit")
        # Published DiT folders name their labels in model_index.json; diffusers reads but never writes that.
        index = json.loads((root / "dit/model_index.json").read_text())
        (root / "dit/model_index.json").write_text(json.dumps({**index, "id2label": {"0": "a", "1": "b", "2": "c"}}))
    return {name: root / name for name in ("unet", "dit")}


@pytest.fixture(scope="module", params=["unet", "dit"])
def prior(request, folders):
    return load_prior(folders[request.param])


class TestUNet(PriorTests):
    @pytest.fixture
    def folder(self, folders: dict[str, Path]) -> Path:
        return folders["unet"]

    def wrong_conditions(self, right: torch.Tensor | None) -> list[torch.Tensor | None]:
        assert right is not None
        return [*super().wrong_conditions(right), right.int(), right + 3, right - 3]


class TestDiT(TestUNet):
    @pytest.fixture
    def folder(self, folders: dict[str, Path]) -> Path:
        return folders["dit"]


class TestUNetWithoutNullLabel(TestUNet):
    has_null = False

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return save_parts(tmp_path / "plain", "unet", tiny_unet(3), extra={"classes": CLASSES})


def batch(seed: int = 0, n: int = 3):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(CLASSES)
    return torch.randn(n, 4, 4, 4, generator=g), labels, torch.randn(n, 4, 4, 4, generator=g)


def synthesize(prior, z, y, e, generators=None, **how):
    return prior.synthesize(z, y, e, Sampling(**how), generators)


def test_attributes(folders):
    unet, dit = load_prior(folders["unet"]), load_prior(folders["dit"])
    for p in (unet, dit):
        assert p.latent_shape == (4, 4, 4) and p.image_size == 8 and p.num_classes == 3
    assert unet.classes == CLASSES and dit.classes == ["a", "b", "c"]
    assert unet.id != dit.id and len(unet.id) == 16


def test_encode_is_the_scaled_posterior_mode(prior):
    x = torch.rand(5, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        expected = prior.vae.encode(x).latent_dist.mean * 0.5
    z = prior.encode(x)
    assert z.shape == (5, 4, 4, 4) and z.dtype == torch.float32
    torch.testing.assert_close(z, expected)
    with pytest.raises(ValueError, match="expected images"):
        prior.encode(torch.zeros(1, 3, 16, 16))


def test_shift_factor_is_undone_by_decoding(tmp_path):
    plain = load_prior(save_parts(tmp_path / "a", "unet", tiny_unet(), extra={"num_classes": len(CLASSES)}))
    shifted = ClassConditionalPrior(
        tiny_vae(shift_factor=0.3), tiny_unet(), DDIMScheduler(clip_sample=False), num_classes=len(CLASSES)
    )
    shifted.vae.load_state_dict(plain.vae.state_dict())
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(shifted.encode(x), plain.encode(x) - 0.3 * 0.5)
    _, y, e = batch(n=2)
    a, b = (synthesize(p, p.encode(x), y, e, strength=0, steps=5) for p in (plain, shifted))
    assert int((a.int() - b.int()).abs().max()) <= 1


def test_same_noise_same_bytes_other_noise_other_bytes(prior):
    z, y, e = batch()
    run = {"strength": 0.5, "steps": STEPS}
    first = synthesize(prior, z, y, e, **run)
    torch.rand(7)  # the global generator must not matter
    assert torch.equal(first, synthesize(prior, z, y, e, **run))
    assert not torch.equal(first, synthesize(prior, z, y, -e, **run))
    assert not torch.equal(first, synthesize(prior, z, y.flip(0), e, **run))


@pytest.mark.parametrize("out_channels", [4, 8])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", ["folder", "pndm", "dpm++2m"])
def test_from_pure_noise_equals_diffusers_own_pipeline(
    tmp_path: Path, guidance: float, out_channels: int, scheduler: str
) -> None:
    """DiTPipeline hard-codes ImageNet's null label 1000, so there are 1000 classes; 8 channels hold a learned sigma."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DiTPipeline(tiny_dit(1000, out_channels), tiny_vae(), DDIMScheduler(clip_sample=False)).save_pretrained(
            tmp_path
        )
    pipeline = DiTPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    prior = load_prior(tmp_path, scheduler=scheduler)
    if scheduler == "pndm":
        pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    elif scheduler == "dpm++2m":
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline([5, 999, 0], guidance, torch.Generator().manual_seed(3), STEPS, output_type="np").images
    e = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    y, how = torch.tensor([5, 999, 0]), Sampling(0.0, STEPS, "noise", guidance)
    with torch.inference_mode():
        z = prior.sampler.sample(torch.zeros_like(e), e, lambda x, t, g: prior.predict(x, t, y, g), how)
    pixels = (prior.autoencoder.decode(z) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(pixels, torch.from_numpy(expected), atol=1e-5, rtol=1e-5)
    made = synthesize(prior, torch.zeros_like(e), y, e, start="noise", strength=0.0, steps=STEPS, guidance=guidance)
    assert (made.float() / 255 - torch.from_numpy(expected)).abs().max() <= 0.5 / 255 + 1e-5


def test_noised_runs_the_last_steps_from_the_noised_centroid(prior):
    """SDEdit by hand: int(10 * 0.3) = 3 steps of DDIM."""
    z, y, e = batch()
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        x = scheduler.add_noise(z, e, scheduler.timesteps[7:8].expand(3))
        for t in scheduler.timesteps[7:]:
            out = prior.denoiser(x, timestep=t.expand(3), class_labels=y).sample[:, :4]
            x = scheduler.step(out, t, x).prev_sample
    expected = synthesize(prior, x, y, e, strength=0.0, steps=STEPS)
    assert torch.equal(synthesize(prior, z, y, e, strength=0.3, steps=STEPS), expected)


def test_guidance_one_is_the_conditional_model(prior):
    z, y, e = batch()
    run = {"strength": 0.6, "steps": STEPS}
    plain = synthesize(prior, z, y, e, **run)
    near = synthesize(prior, z, y, e, guidance=1.0 + 1e-9, **run)
    assert int((plain.int() - near.int()).abs().max()) <= 1
    assert not torch.equal(plain, synthesize(prior, z, y, e, guidance=30.0, **run))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_inversion_equals_diffusers_inverse_scheduler(folders, prediction_type):
    base = load_prior(folders["unet"])
    options = {"clip_sample": False, "prediction_type": prediction_type}
    prior = ClassConditionalPrior(base.vae, base.denoiser, DDIMScheduler(**options), num_classes=len(CLASSES))
    z, y, _ = batch()
    inverse = DDIMInverseScheduler(**options)
    inverse.set_timesteps(STEPS)
    x = z
    for t in inverse.timesteps[:4]:
        with torch.no_grad():
            x = inverse.step(prior.denoiser(x, timestep=t.expand(3), class_labels=y).sample, t, x).prev_sample
    scheduler = DDIMScheduler(**options)
    scheduler.set_timesteps(STEPS)
    with torch.inference_mode():
        mine = prior.sampler.invert(z, lambda x, t, g: prior.predict(x, t, y, g), scheduler.timesteps[STEPS - 4 :])
    torch.testing.assert_close(mine, x, atol=1e-5, rtol=1e-5)


def test_inversion_brings_the_image_back_and_ignores_the_noise(prior):
    z, y, e = batch()
    plain = synthesize(prior, z, y, e, strength=0.0, steps=50)
    back = synthesize(prior, z, y, e, start="inversion", strength=0.4, steps=50)
    assert torch.equal(back, synthesize(prior, z, y, -e, start="inversion", strength=0.4, steps=50))
    assert (plain.int() - back.int()).abs().float().mean() < 2.0


def test_step_noise_comes_from_the_generators(folders):
    base = load_prior(folders["dit"])
    prior = ClassConditionalPrior(base.vae, base.denoiser, DDPMScheduler(clip_sample=False))
    z, y, e = batch()

    def run(*seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds] if seeds else None
        return synthesize(prior, z, y, e, generators, strength=0.5, steps=STEPS)

    assert torch.equal(run(1, 2, 3), run(1, 2, 3)) and torch.equal(run(), run())
    other = run(1, 2, 4)
    assert torch.equal(run(1, 2, 3)[:2], other[:2]) and not torch.equal(run(1, 2, 3)[2], other[2])


def test_a_learned_variance_reaches_the_scheduler(folders):
    base = load_prior(folders["dit"])  # 8 output channels: noise and variance
    z, y, e = batch()
    images = [
        synthesize(
            ClassConditionalPrior(base.vae, base.denoiser, DDPMScheduler(clip_sample=False, variance_type=kind)),
            z,
            y,
            e,
            strength=0.5,
            steps=STEPS,
            guidance=2.0,
        )
        for kind in ("fixed_small", "learned_range")
    ]
    assert not torch.equal(*images)


def test_a_multistep_scheduler_keeps_no_state_between_calls(folders):
    base = load_prior(folders["unet"])
    prior = ClassConditionalPrior(base.vae, base.denoiser, DPMSolverMultistepScheduler(), num_classes=len(CLASSES))
    z, y, e = batch()
    run = {"strength": 0.5, "steps": STEPS}
    assert torch.equal(synthesize(prior, z, y, e, **run), synthesize(prior, z, y, e, **run))


def test_the_published_dit_folder_format_loads(folders, tmp_path):
    """facebook/DiT-XL-2-256: class name of before DiTTransformer2DModel, .bin weights, extra keys."""
    shutil.copytree(folders["dit"], tmp_path / "old")
    for part, loaded in (("vae", AutoencoderKL), ("transformer", DiTTransformer2DModel)):
        model = loaded.from_pretrained(folders["dit"], subfolder=part)
        shutil.rmtree(tmp_path / "old" / part)
        model.save_pretrained(tmp_path / "old" / part, safe_serialization=False)
    path = tmp_path / "old" / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config.update(_class_name="Transformer2DModel", cross_attention_dim=None, num_vector_embeds=None)
    path.write_text(json.dumps(config))
    old, new = load_prior(tmp_path / "old"), load_prior(folders["dit"])
    z, y, e = batch()
    run = {"strength": 0.5, "steps": STEPS, "guidance": 4.0}
    assert torch.equal(synthesize(old, z, y, e, **run), synthesize(new, z, y, e, **run))


def test_what_is_saved_has_the_id_of_its_values(folders, tmp_path):
    prior = load_prior(folders["unet"])
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
    prior.save(tmp_path / "same", {})
    assert load_prior(tmp_path / "same").id == prior.id
    with torch.no_grad():
        prior.denoiser.conv_in.weight[0, 0, 0, 0] += 1
    prior.save(tmp_path / "other", {})
    assert load_prior(tmp_path / "other").id != prior.id


def test_missing_or_mismatched_folders_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="no existing folder"):
        load_prior(tmp_path / "absent")
    with pytest.raises(ValueError, match="ships"):
        load_prior("shipped:absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected the file model_index"):
        load_prior(tmp_path / "empty")

    def broken(name: str) -> Path:
        return Path(shutil.copytree(folders["unet"], tmp_path / name))

    shutil.rmtree((folder := broken("no-unet")) / "unet")
    with pytest.raises(ValueError, match="unet/ or transformer/"):
        load_prior(folder)
    (folder := broken("no-weights")).joinpath("unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="does not load"):
        load_prior(folder)
    (folder := broken("size")).joinpath("ddoq_prior.json").write_text('{"image_size": 32, "num_classes": 3}')
    with pytest.raises(ValueError, match="image_size 32"):
        load_prior(folder)
    (folder := broken("count")).joinpath("ddoq_prior.json").write_text("{}")
    with pytest.raises(ValueError, match=r"nothing says whether the last is the null label: 4 classes or 3"):
        load_prior(folder)
    (folder := broken("classes")).joinpath("ddoq_prior.json").write_text('{"classes": ["cat"]}')
    with pytest.raises(ValueError, match="1 classes for a UNet with 4"):
        load_prior(folder)
    (folder := broken("text")).joinpath("model_index.json").write_text('{"text_encoder": ["transformers", "X"]}')
    with pytest.raises(ValueError, match=r"text-conditional.*None.*DiTPipeline, DiffusionPipeline.*prior=autoencoder"):
        load_prior(folder)
    (folder := broken("other")).joinpath("model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match=r"FluxPipeline; this version reads .*DiTPipeline"):
        load_prior(folder)
    folder = broken("lacking")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    with pytest.raises(ValueError, match=r"lacks|does not load"):
        load_prior(folder)
    folder = broken("channels")
    shutil.rmtree(folder / "vae")
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3,
                        norm_num_groups=4)  # fmt: skip
    vae.save_pretrained(folder / "vae")
    with pytest.raises(ValueError, match="3 latent channels"):
        load_prior(folder)


def test_the_shipped_digits_prior():
    """Digits survive the round trip, noise is undone within the class, and labels steer pure noise."""
    prior = load_prior("shipped:digits-prior")
    teacher = load_classifier("shipped:digits-teacher")
    assert prior.image_size == teacher.image_size == 16 and prior.classes == teacher.classes
    digits, ids = sources.digits()["selection"]
    digits, labels = digits[:60], torch.from_numpy(ids[:60])
    rgb = np.stack([to_square(Image.fromarray(d).convert("RGB"), 16) for d in digits])
    pixels = torch.from_numpy(rgb).permute(0, 3, 1, 2)
    z = prior.encode(pixels.float() / 127.5 - 1)
    assert 0.8 < float(z.std()) < 1.2
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    runs = {"decoded": ("noised", 0.0), "noised": ("noised", 0.4), "noise": ("noise", 1.0)}
    images = {
        name: synthesize(prior, z, labels, noise, start=start, strength=strength, steps=25)
        for name, (start, strength) in runs.items()
    }
    assert (images["decoded"].float() - torch.from_numpy(rgb).float()).abs().mean() < 10
    for name, made in images.items():
        with torch.inference_mode():
            right = (teacher(made.permute(0, 3, 1, 2).float() / 255).argmax(1) == labels).float().mean()
        assert right > 0.9, name
