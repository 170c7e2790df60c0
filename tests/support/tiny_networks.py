"""Tiny networks in diffusers' classes, untrained: what a prior or an autoencoder is, in kilobytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiTTransformer2DModel,
    UNet2DModel,
)

CLASSES = ["cat", "dog", "fish"]


def tiny_vae(scaling_factor: float = 0.5, shift_factor: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        mid_block_add_attention=False,
    )


def tiny_unet(num_class_embeds: int = len(CLASSES) + 1) -> UNet2DModel:
    return UNet2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=num_class_embeds,
    )


def tiny_dit(num_classes: int = len(CLASSES), out_channels: int = 8) -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=out_channels,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=num_classes,
    )
    return model.eval()


def save_parts(folder: Path, part: str, denoiser, scheduler=None, extra: dict | None = None, **vae) -> Path:
    """A folder of parts, each saved by diffusers itself."""
    tiny_vae(**vae).save_pretrained(folder / "vae")
    denoiser.save_pretrained(folder / part)
    (scheduler or DDIMScheduler(clip_sample=False)).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline"}))
    if extra is not None:
        (folder / "ddoq_prior.json").write_text(json.dumps(extra))
    return folder


def tiny_kl(**config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=8, mid_block_add_attention=False,
        **config,
    ).eval()  # fmt: skip


def tiny_taesd(**config: Any) -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4, **config,
    ).eval()  # fmt: skip
