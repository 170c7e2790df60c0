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
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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


def tiny_text_unet(**config: Any) -> UNet2DConditionModel:
    sizes: dict[str, Any] = {
        "sample_size": 4, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 8),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "norm_num_groups": 4, "attention_head_dim": 2,
        "cross_attention_dim": 16,
    }  # fmt: skip
    return UNet2DConditionModel(**sizes | config).eval()


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters, and the end of a word; in the files that Stable Diffusion's own folders have."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    end = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    about = {"model_max_length": 8, "bos_token": "<|startoftext|>", "tokenizer_class": "CLIPTokenizer", **end}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=8, **tokens,
        )
    ).eval()  # fmt: skip


def save_stable_diffusion(folder: Path, scheduler: Any = None, **unet: Any) -> Path:
    """A folder as StableDiffusionPipeline saves it, with the scheduler of Stable Diffusion 1.5."""
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    StableDiffusionPipeline(
        tiny_vae(), tiny_text_encoder(tokenizer), tokenizer, tiny_text_unet(**unet),
        scheduler or PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                   skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder
