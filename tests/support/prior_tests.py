"""What every kind of prior must do: a class of tests that each kind runs on a tiny folder in diffusers' format."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pretended_gpu import OnGpu, pretended_gpu

from ddoq_ray.models.priors.base import STARTS, NonFiniteImages, Prior, Sampling
from ddoq_ray.models.priors.load import load_prior
from ddoq_ray.storage.records import ClassInfo

STEPS = 4
INFOS = [
    ClassInfo(i, name, name, prior_label=label) for i, (name, label) in enumerate([("cat", 2), ("dog", 0), ("fish", 1)])
]


class PriorTests:
    """A subclass names the folder and how it is loaded, and says what the kind can do."""

    how: ClassVar[dict[str, Any]] = {}  # of `load_prior`
    denoises = True
    has_null = True
    size = 8  # of the images

    @pytest.fixture
    def folder(self) -> Path:
        raise NotImplementedError

    @pytest.fixture
    def prior(self, folder: Path) -> Prior:
        return load_prior(folder, **self.how)

    def wrong_conditions(self, right: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Conditions of three images that the kind must refuse."""
        return [None, torch.zeros(3, 7), *([] if right is None else [right[:2]])]

    def drawn(self, prior: Prior, seed: int = 0, n: int = 3) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Latents, conditions and noise of n images."""
        g = torch.Generator().manual_seed(seed)
        shape = (n, *prior.latent_shape)
        classes = [INFOS[i % len(INFOS)] for i in range(n)]
        return torch.randn(shape, generator=g), prior.conditioning(classes), torch.randn(shape, generator=g)

    def settings(self, **how: Any) -> Sampling:
        """Settings that this kind runs."""
        return Sampling(**({"strength": 0.5 if self.denoises else 0.0, "steps": STEPS} | how))

    def test_its_attributes_fit_together(self, prior: Prior) -> None:
        channels, height, width = prior.latent_shape
        assert prior.image_size == self.size == height * prior.autoencoder.factor and height == width
        assert channels == prior.autoencoder.latent_channels and len(prior.id) == 16
        assert prior.has_null == self.has_null and set(prior.needs) <= {f.name for f in dataclasses.fields(ClassInfo)}
        assert (prior.guidance_of(None) > 1) == self.has_null and prior.guidance_of(3.0) == 3.0

    def test_encode_and_decode(self, prior: Prior) -> None:
        images = torch.rand(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(1)) * 2 - 1
        z = prior.encode(images)
        assert tuple(z.shape) == (2, *prior.latent_shape) and z.dtype == torch.float32
        pictures = prior.decode(z)
        assert tuple(pictures.shape) == (2, self.size, self.size, 3) and pictures.dtype == torch.uint8
        assert pictures.device.type == "cpu" and pictures.is_contiguous()
        with pytest.raises(ValueError, match="expected images"):
            prior.encode(torch.zeros(1, 3, self.size * 2, self.size))

    def test_strength_zero_is_the_autoencoders_decode(self, prior: Prior) -> None:
        z, y, e = self.drawn(prior)
        made = prior.synthesize(z, y, e, self.settings(strength=0.0))
        pixels = (prior.autoencoder.decode(z) / 2 + 0.5).clamp(0, 1)
        assert torch.equal(made, (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
        assert torch.equal(made, prior.decode(z))
        assert prior.check_settings(self.settings(strength=0.0)) == 0

    def test_the_same_batch_gives_the_same_bytes(self, prior: Prior) -> None:
        z, y, e = self.drawn(prior)
        guidance = 3.0 if self.has_null else 1.0
        first = prior.synthesize(z, y, e, self.settings(guidance=guidance))
        torch.rand(7)  # the global generator must not matter
        assert torch.equal(first, prior.synthesize(z, y, e, self.settings(guidance=guidance)))
        other, _, _ = self.drawn(prior, seed=1)
        assert not torch.equal(first, prior.synthesize(other, y, e, self.settings(guidance=guidance)))
        if self.denoises:
            assert not torch.equal(first, prior.synthesize(z, y, -e, self.settings(guidance=guidance)))

    def test_every_start(self, prior: Prior) -> None:
        z, y, e = self.drawn(prior)
        for start in STARTS:
            how = self.settings(start=start)
            if not self.denoises and start != "noised":
                with pytest.raises(ValueError, match=r"strength=0.*start=noised"):
                    prior.synthesize(z, y, e, how)
                continue
            run = STEPS if start in ("noise", "guided") else STEPS // 2
            assert prior.check_settings(how) == (run if self.denoises else 0)
            made = prior.synthesize(z, y, e, how)
            assert tuple(made.shape) == (3, self.size, self.size, 3) and made.dtype == torch.uint8

    def test_the_batch_may_be_decoded_in_parts(self, prior: Prior, folder: Path) -> None:
        z, y, e = self.drawn(prior, n=5)
        parts = load_prior(folder, **self.how, decode_batch=2)
        whole = prior.synthesize(z, y, e, self.settings())
        assert parts.id == prior.id
        assert int((parts.synthesize(z, y, e, self.settings()).int() - whole.int()).abs().max()) <= 1
        with pytest.raises(ValueError, match="1 latent or more"):
            load_prior(folder, **self.how, decode_batch=0)

    def test_a_row_of_conditions_follows_from_its_class_alone(self, prior: Prior) -> None:
        rows = prior.conditioning(INFOS)
        if rows is None:
            assert prior.needs == () and prior.conditioning([]) is None
            return
        assert rows.device.type == "cpu" and len(rows) == len(INFOS)
        assert torch.equal(pickle.loads(pickle.dumps(rows)), rows)
        for i, info in enumerate(INFOS):
            assert torch.equal(prior.conditioning([info]), rows[i : i + 1])
        assert torch.equal(prior.conditioning(INFOS[::-1]), rows.flip(0))
        assert len({row.numpy().tobytes() for row in rows}) == len(INFOS)
        for field in prior.needs:
            lacking: Any = dataclasses.replace(INFOS[1], **{field: None})
            with pytest.raises(ValueError, match=rf"1 of 2 classes have no {field}.*\(dog\).*classes\.json"):
                prior.conditioning([INFOS[0], lacking])

    def test_noise_scales_are_those_of_the_start(self, prior: Prior) -> None:
        with pytest.raises(ValueError, match=r"strength|denoises nothing"):
            prior.noise_scales(0.0, STEPS)
        if not self.denoises:
            return
        signal, sigma = prior.noise_scales(0.5, STEPS)
        assert signal**2 + sigma**2 == pytest.approx(1.0, abs=1e-5) and 0 < sigma < 1
        z, y, e = self.drawn(prior)
        noised = prior.synthesize(z, y, e, self.settings())
        given = prior.synthesize(signal * z + sigma * e, y, torch.zeros_like(e), self.settings(start="given"))
        assert int((noised.int() - given.int()).abs().max()) <= 1

    def test_what_does_not_fit_is_refused_in_words(self, prior: Prior) -> None:
        z, y, e = self.drawn(prior)
        good = self.settings()
        for arguments, how, words in [
            ((z[:, :3], y, e), good, "expected latents"),
            ((z, y, e[:2]), good, "expected noise"),
            ((z, y, e), self.settings(start="warm"), "start"),
            ((z, y, e), self.settings(strength=1.5), "strength"),
            ((z, y, e), self.settings(strength=-0.1), "strength"),
            *([((z, y, e), self.settings(strength=0.1), "runs none")] if self.denoises else []),
            *([((z, y, e), self.settings(steps=0), "steps")] if self.denoises else []),
            *([] if self.has_null else [((z, y, e), self.settings(guidance=2.0), "null")]),
        ]:
            with pytest.raises(ValueError, match=words):
                prior.synthesize(*arguments, how)
        with pytest.raises(ValueError, match="expected 3 generators"):
            prior.synthesize(z, y, e, good, [torch.Generator()])
        for condition in self.wrong_conditions(y):
            with pytest.raises(ValueError, match=r"prior: (expected|labels must)"):
                prior.synthesize(z, condition, e, good)
        for how in (self.settings(start="warm"), self.settings(strength=1.5)):
            with pytest.raises(ValueError):
                prior.check_settings(how)

    def test_images_that_are_not_finite_are_named(self, prior: Prior) -> None:
        z, y, e = self.drawn(prior)
        z[1, 0, 0, 0] = float("nan")
        with pytest.raises(NonFiniteImages) as error:
            prior.synthesize(z, y, e, self.settings())
        assert error.value.rows == [1] and pickle.loads(pickle.dumps(error.value)).rows == [1]

    def test_the_id_names_values_and_not_files(self, prior: Prior, folder: Path, tmp_path: Path) -> None:
        same = Path(shutil.copytree(folder, tmp_path / "same"))
        weights = [p.relative_to(folder) for p in folder.rglob("*.safetensors")]
        assert weights
        for name in weights:  # the form before safetensors
            torch.save(load_file(folder / name), (same / name).with_suffix(".bin"))
            (same / name).unlink()
            if name.name == "model.safetensors":  # transformers has another name for it
                (same / name).with_suffix(".bin").rename((same / name).parent / "pytorch_model.bin")
        assert load_prior(same, **self.how).id == prior.id
        for i, name in enumerate(weights):
            other = Path(shutil.copytree(folder, tmp_path / str(i)))
            tensors = load_file(other / name)
            key = sorted(tensors)[0]
            tensors[key] = tensors[key] + 1
            save_file(tensors, other / name, metadata={"format": "pt"})
            assert load_prior(other, **self.how).id != prior.id, name

    def test_it_runs_where_it_is_asked_to(self, prior: Prior, folder: Path) -> None:
        """On a pretended GPU no two devices meet, and the CPU's values come."""
        z, y, e = self.drawn(prior)
        for start in STARTS if self.denoises else STARTS[:1]:
            how = self.settings(start=start, guidance=3.0 if self.has_null else 1.0)
            expected = prior.synthesize(z, y, e, how)
            with pretended_gpu() as gpu:
                there = load_prior(folder, **self.how, device=gpu)
                assert there.id == prior.id and there.device.type == "cuda"
                conditions = there.conditioning(INFOS)
                made = there.synthesize(z, conditions, e, how)
            assert not isinstance(made, OnGpu) and made.dtype == torch.uint8
            assert int((made.int() - expected.int()).abs().max()) <= 1  # of 255: a sum in another order

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_and_channels_last_are_near_float32(self, prior: Prior, folder: Path, dtype: str) -> None:
        z, y, e = self.drawn(prior)
        full = prior.synthesize(z, y, e, self.settings())
        half = load_prior(folder, **self.how, dtype=dtype, channels_last=True)
        assert half.encode(torch.zeros(1, 3, self.size, self.size)).dtype == torch.float32 and half.id == prior.id
        assert (full.int() - half.synthesize(z, y, e, self.settings()).int()).abs().float().mean() < 3

    @pytest.mark.slow
    def test_compiled_it_is_the_same_within_rounding(self, prior: Prior, folder: Path) -> None:
        z, y, e = self.drawn(prior)
        compiled = load_prior(folder, **self.how, compile=True).synthesize(z, y, e, self.settings())
        assert int((compiled.int() - prior.synthesize(z, y, e, self.settings()).int()).abs().max()) <= 1
