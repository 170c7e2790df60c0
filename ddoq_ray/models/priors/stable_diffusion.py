"""Stable Diffusion 1.x and 2.x: a UNet that is asked in words, image-to-image from a centroid as D4M does.

Shape suffixes: B batch, C latent channels, h w latent size, T tokens of a text, D width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor

from ddoq_ray.models.autoencoder import DTYPES, identity_of, load_network, network_kind
from ddoq_ray.models.folders import content_digest, read_json
from ddoq_ray.models.priors.base import field_of
from ddoq_ray.models.priors.loading import PLAIN, Loading
from ddoq_ray.models.priors.prompts import Prompts
from ddoq_ray.models.priors.sampling import DiffusionPrior, Sampler
from ddoq_ray.models.priors.schedulers import check_variance, make_scheduler
from ddoq_ray.storage.records import ClassInfo

PUBLISHED_GUIDANCE = 8.0  # D4M's
_SERVES = "a text-to-image folder of Stable Diffusion 1.x or 2.x serves (prior=sd-1-5)"
# Keys of a UNet's config that tell of inputs beside latents, time and text; what such models are.
_MORE_INPUTS = {
    "addition_embed_type": "sizes or images beside the text, as Stable Diffusion XL's does",
    "class_embed_type": "a class or an image's embedding beside the text",
    "num_class_embeds": "a noise level or class beside the text, as upscalers' do",
    "encoder_hid_dim_type": "projected images, as Kandinsky's does",
    "time_cond_proj_dim": "its guidance as an input, as latent consistency models' do",
}
_SAVED_BY = ("transformers_version", "torch_dtype", "dtype")  # of a text encoder's config: not what it computes


class StableDiffusionPrior(DiffusionPrior):
    """See `Prior`. A condition is float32 [2, T, D]: the class's prompt, and the negative prompt."""

    needs = ("prompt",)
    has_null = True

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        denoiser: UNet2DConditionModel,
        scheduler: Any,
        prompts: Prompts,
        *,
        how: Loading = PLAIN,
        id: str,
    ) -> None:
        """Put the parts together.

        Args:
            vae: the autoencoder.
            denoiser: latents and text in; noise or velocity out.
            scheduler: any diffusers scheduler with add_noise and step.
            prompts: the text encoder, which stays on the CPU: it is asked once a class.
            how: how the networks run, the images' size and the negative prompt.
            id: the content digest.

        Raises:
            ValueError: the parts do not fit together, or the UNet needs more than latents and text.
        """
        _check_unet(denoiser.config, int(vae.config["latent_channels"]), prompts.width)
        self.sampler = Sampler(scheduler, torch.device(how.device))
        check_variance(scheduler, predicted=False)
        self.prompts = prompts
        self.negative_prompt = how.negative_prompt
        self.dtype = DTYPES[how.dtype]
        self.id = id
        self.autoencoder = how.autoencoder(vae)
        side = denoiser.config["sample_size"]
        if how.image_size is None and not isinstance(side, int):
            raise ValueError(
                "prior: the UNet's config has no sample_size; give prior.image_size, which it was trained with"
            )
        factor = self.autoencoder.factor
        self.image_size = how.image_size or side * factor
        halved = factor * 2 ** (len(denoiser.config["block_out_channels"]) - 1)
        if self.image_size % halved:
            raise ValueError(f"prior.image_size={self.image_size}: expected a multiple of {halved}")
        self.latent_shape = (self.autoencoder.latent_channels, self.image_size // factor, self.image_size // factor)
        self.denoiser = how.denoiser(denoiser)

    @classmethod
    def from_folder(cls, folder: Path, index: dict[str, Any], how: Loading) -> StableDiffusionPrior:
        """Read a folder as `load_prior` describes it; safety checker and feature extractor are left aside."""
        raw = {part: read_json(folder / part / "config.json", "prior") for part in ("vae", "unet", "text_encoder")}
        raw["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json", "prior")
        if raw["unet"].get("_class_name") != "UNet2DConditionModel":
            raise ValueError(
                f"prior: expected a UNet2DConditionModel in {folder}, got {raw['unet'].get('_class_name')}"
            )
        # What it needs is told before gigabytes are read.
        _check_unet(raw["unet"], int(raw["vae"].get("latent_channels", 4)), raw["text_encoder"].get("hidden_size"))
        prompts = Prompts.from_folder(folder)
        vae = load_network(network_kind(raw["vae"], folder), folder, "vae")
        denoiser = load_network(UNet2DConditionModel, folder, "unet")
        told = {k: v for k, v in raw["text_encoder"].items() if k not in _SAVED_BY}
        configs: dict[str, Any] = raw | {
            "vae": identity_of(raw["vae"]),
            "text_encoder": told,
            "tokenizer": prompts.identity(),
        }
        if how.image_size is not None:
            configs["image_size"] = how.image_size
        networks = {"vae": vae.state_dict(), "denoiser": denoiser.state_dict(), "text_encoder": prompts.tensors()}
        tensors = {f"{part}.{name}": t for part, state in networks.items() for name, t in state.items()}
        scheduler = make_scheduler(raw["scheduler"], how.scheduler)
        return cls(vae, denoiser, scheduler, prompts, how=how, id=content_digest(configs, tensors))

    def guidance_of(self, asked: float | None) -> float:
        """The guidance scale that is asked for; for None D4M's."""
        return PUBLISHED_GUIDANCE if asked is None else asked

    def conditioning(self, classes: Sequence[ClassInfo]) -> Tensor:
        """float32 [N, 2, T, D]: the embeddings of each class's prompt and of the negative prompt."""
        texts = [str(text) for text in field_of(classes, "prompt")]
        if not texts:
            return torch.zeros(0, 2, self.prompts.tokens, self.prompts.width)
        null = self.prompts.embed(self.negative_prompt)
        return torch.stack([torch.stack([self.prompts.embed(text), null]) for text in texts])

    def check_condition(self, condition: Tensor | None, rows: int) -> None:
        """Raise a ValueError unless `condition` holds the two embeddings for each row."""
        expected = (rows, 2, self.prompts.tokens, self.prompts.width)
        told = "none" if condition is None else f"{condition.dtype} {tuple(condition.shape)}"
        if condition is None or tuple(condition.shape) != expected or condition.dtype != torch.float32:
            raise ValueError(f"prior: expected float32 embeddings {list(expected)} of prompts, got {told}")

    def predict(self, z: Tensor, t: Tensor, condition: Tensor | None, guidance: float) -> Tensor:
        """The UNet's output at z, guided away from the negative prompt."""
        assert condition is not None, "checked by check_condition"
        text = condition[:, 0]
        guided = guidance != 1.0
        if guided:  # in the order of diffusers' pipelines
            z, text = torch.cat([z, z]), torch.cat([condition[:, 1], text])
        times = t.to(self.device).expand(len(z))
        output = self.denoiser(z.to(self.dtype), times, encoder_hidden_states=text.to(self.dtype)).sample.float()
        if not guided:
            return output
        without, within = output.chunk(2)
        return without + guidance * (within - without)


def _check_unet(config: Any, latent_channels: int, text_width: int | None) -> None:
    """Refuse a UNet that needs more than latents, time and text.

    Raises:
        ValueError: saying what it takes, and what serves.
    """
    for key, what in _MORE_INPUTS.items():
        if config.get(key) is not None:
            raise ValueError(f"prior: the UNet takes {what} ({key}={config.get(key)}); {_SERVES}")
    taken = config.get("in_channels", 4)
    if taken != latent_channels:
        raise ValueError(
            f"prior: the UNet takes {taken} channels and the autoencoder's latents have {latent_channels}: it wants a "
            f"masked or another picture beside the latents, as inpainting models do; {_SERVES}"
        )
    if config.get("out_channels", 4) != latent_channels:
        raise ValueError(
            f"prior: expected {latent_channels} output channels, got {config.get('out_channels')}; {_SERVES}"
        )
    width = config.get("cross_attention_dim", 1280)
    if width != text_width:
        raise ValueError(
            f"prior: the UNet expects text of width {width}, the text encoder gives {text_width}; the two folders "
            "belong to different models"
        )
