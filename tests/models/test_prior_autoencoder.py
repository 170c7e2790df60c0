"""An autoencoder alone as a prior: of its own folder, and of a pipeline's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.prior_tests import PriorTests
from support.tiny_networks import CLASSES, save_parts, tiny_kl, tiny_taesd, tiny_unet

from ddoq_ray.models.autoencoder import load_autoencoder
from ddoq_ray.models.priors.autoencoder import AutoencoderPrior
from ddoq_ray.models.priors.load import load_prior


class Alone(PriorTests):
    denoises = has_null = False

    def wrong_conditions(self, right: torch.Tensor | None) -> list[torch.Tensor | None]:
        assert right is None
        return [torch.zeros(3, dtype=torch.int64)]


class TestKL(Alone):
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tiny_kl(scaling_factor=0.5, shift_factor=0.3).save_pretrained(tmp_path / "kl")
        return tmp_path / "kl"


class TestTiny(Alone):
    """Its config has no size."""

    how: ClassVar[dict[str, Any]] = {"image_size": 8}

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tiny_taesd().save_pretrained(tmp_path / "tiny")
        return tmp_path / "tiny"

    def test_the_size_is_asked_for_and_is_part_of_what_it_is(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"does not say for which size.*give prior\.image_size"):
            load_prior(folder)
        with pytest.raises(ValueError, match=r"image_size=9: expected a multiple of 2"):
            load_prior(folder, image_size=9)
        small, large = load_prior(folder, image_size=8), load_prior(folder, image_size=16)
        assert large.latent_shape == (4, 8, 8) and small.id != large.id


class TestOfAPipeline(Alone):
    how: ClassVar[dict[str, Any]] = {"autoencoder_only": True}

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            folder = save_parts(tmp_path / "whole", "unet", tiny_unet(), extra={"classes": CLASSES})
        shutil.rmtree(folder / "scheduler")
        (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
        return folder

    def test_it_is_the_pipelines_autoencoder(self, folder: Path) -> None:
        ours = load_prior(folder, **self.how)
        assert isinstance(ours, AutoencoderPrior) and ours.latent_shape == (4, 4, 4)
        images = torch.rand(2, 3, 8, 8) * 2 - 1
        assert torch.equal(ours.encode(images), load_autoencoder(folder).encode(images))


def test_what_only_a_denoiser_has_is_refused(tmp_path: Path) -> None:
    tiny_kl().save_pretrained(tmp_path)
    for how in ({"scheduler": "ddim"}, {"negative_prompt": "cartoon"}):
        with pytest.raises(ValueError, match="denoises nothing; leave it out"):
            load_prior(tmp_path, **how)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match=r"expected the file model_index\.json"):
        load_prior(tmp_path)
    with pytest.raises(ValueError, match="VQModel"):
        load_prior(tmp_path, autoencoder_only=True)
