"""diffusers autoencoders: images to latents and back, in the scale that a latent diffusion model works in.

Both kinds are scaled by one rule, `z = (raw - shift_factor) * scaling_factor`, with the values of the folder's
config; where it holds latents_mean and latents_std, a channel each, `z = (raw - mean) / std * scaling_factor`, as
diffusers' pipelines do. AutoencoderKL's raw latents have a standard deviation of several units, and its factor (0.18
for Stable Diffusion) brings them to about one. AutoencoderTiny is distilled to give the scaled latents at once, so its
factor is 1; its `latent_magnitude` and `latent_shift` serve storing latents as bytes, and are no part of the scale.

Shape suffixes: B batch, C latent channels, h w latent size, H W image size.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from ddoq_ray.models.compiling import check_compiler
from ddoq_ray.models.folders import content_digest, first_line, read_json, resolve_folder
from ddoq_ray.models.weights_files import check_finite, check_not_pointers, is_safetensors, variant_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


class Autoencoder:
    """An autoencoder on a device, in one arithmetic.

    Attributes:
        network: the diffusers model.
        latent_channels: C of its latents.
        factor: H / h, how much smaller a latent's side is than its image's.
        id: content digest of configuration and weights.
    """

    # Seven parameters: a network and the ways to run it, by name.
    def __init__(
        self,
        network: AutoencoderKL | AutoencoderTiny,
        *,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        channels_last: bool = False,
        compile: bool = False,
        decode_batch: int | None = None,
        id: str = "",
    ) -> None:
        """Put a network to use.

        Args:
            network: its config holds scaling_factor and perhaps shift_factor.
            device: where it runs.
            dtype: "float32", "float16" or "bfloat16": its arithmetic. Latents stay float32.
            channels_last: keep images and weights with channels innermost, which convolutions in half precision want.
            compile: run the encoder through torch.compile; then every call should have the same shape.
            decode_batch: latents that are decoded at once; None: all that `decode` is given.
            id: the content digest, if known.

        Raises:
            ValueError: an unknown dtype or kind of network.
        """
        if dtype not in DTYPES:
            raise ValueError(f"autoencoder: expected a dtype of {sorted(DTYPES)}, got {dtype!r}")
        if not any(isinstance(network, kind) for kind in KINDS.values()):
            raise ValueError(f"autoencoder: expected one of {sorted(KINDS)}, got {type(network).__name__}")
        config = network.config
        self.factor = factor_of(network)
        self.latent_channels = int(config["latent_channels"])
        self.id = id
        self.decode_batch = decode_batch
        self.device = torch.device(device)
        self.dtype = DTYPES[dtype]
        self.network = cast(network, self.device, self.dtype).eval().requires_grad_(False)
        self._shift, self._scale = _shift_and_scale(config, self.latent_channels, self.device)
        self._grey = config["in_channels"] == 1, config["out_channels"] == 1
        if config["in_channels"] not in (1, 3) or config["out_channels"] not in (1, 3):
            raise ValueError(
                f"autoencoder: expected images of 1 or 3 channels, got {config['in_channels']} in and "
                f"{config['out_channels']} out; give an autoencoder of pictures"
            )
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            torch.nn.Module.to(self.network, memory_format=torch.channels_last)
        if compile:
            check_compiler("encoder.compile")
            self.network.encoder.compile(dynamic=False)

    def check_posterior(self, posterior: str) -> None:
        """Raise a ValueError when there is no such posterior to take latents from."""
        if posterior == "sample" and not isinstance(self.network, AutoencoderKL):
            raise ValueError(
                f"encoder.posterior=sample: an {type(self.network).__name__} gives one latent an image and no "
                "distribution to sample from; use encoder.posterior=mode"
            )

    @torch.inference_mode()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of images, scaled.

        Args:
            images: float [B, 3, H, W] in [-1, 1].
            noise: float32 [B, C, h, w], standard normal; given, the posterior's sample `mean + std * noise` is taken
                instead of its mode. The same noise gives the same sample on every device.

        Returns:
            float32 [B, C, h, w] on the autoencoder's device.

        Raises:
            ValueError: noise for a network that has no posterior.
        """
        x = images.to(self.device, self.dtype)
        if self._grey[0]:  # pictures are RGB everywhere else; the weights are ITU-R 601's, as Pillow's
            x = (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        x = x.contiguous(memory_format=self._format)
        if isinstance(self.network, AutoencoderKL):
            posterior = self.network.encode(x).latent_dist
            raw = posterior.mode().float()
            if noise is not None:
                raw = raw + posterior.std.float() * noise.to(self.device, torch.float32)
        else:
            if noise is not None:
                self.check_posterior("sample")
            raw = self.network.encode(x).latents.float()
        return (raw - self._shift) * self._scale

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of scaled latents float32 [B, C, h, w]: float32 [B, 3, H, W], about [-1, 1], not clamped."""
        raw = (latents.to(self.device) / self._scale + self._shift).to(self.dtype)
        raw = raw.contiguous(memory_format=self._format)
        parts = [self.network.decode(part).sample.float() for part in raw.split(self.decode_batch or max(1, len(raw)))]
        pixels = torch.cat(parts)
        return pixels.expand(-1, 3, -1, -1) if self._grey[1] else pixels


def _shift_and_scale(config: Any, channels: int, device: torch.device) -> tuple[float | Tensor, float | Tensor]:
    """(shift, scale) of `z = (raw - shift) * scale`: numbers, or float32 [1, C, 1, 1].

    Raises:
        ValueError: what the config says is no such scale.
    """
    scale, shift = config.get("scaling_factor"), config.get("shift_factor") or 0.0
    if not (_numbers(scale, shift) and scale):
        raise ValueError(
            f"autoencoder: expected finite numbers in its config, scaling_factor not 0: got scaling_factor {scale!r}, "
            f"shift_factor {shift!r}"
        )
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return float(shift), float(scale)
    lists = all(isinstance(v, list | tuple) and len(v) == channels and _numbers(*v) for v in (mean, std))
    if not lists or min(std) <= 0:
        raise ValueError(
            f"autoencoder: expected latents_mean and positive latents_std of {channels} channels in its config, got "
            f"{mean} and {std}"
        )
    columns = (torch.tensor(v, dtype=torch.float32, device=device).view(1, -1, 1, 1) for v in (mean, std))
    by_mean, by_std = columns
    return by_mean, float(scale) / by_std


def _numbers(*values: Any) -> bool:
    return all(isinstance(v, int | float) and math.isfinite(v) for v in values)


def factor_of(network: AutoencoderKL | AutoencoderTiny) -> int:
    """H / h, how much smaller a latent's side is than its image's."""
    widths = "block_out_channels" if isinstance(network, AutoencoderKL) else "encoder_block_out_channels"
    return int(2 ** (len(network.config[widths]) - 1))


def identity_of(config: dict[str, Any]) -> dict[str, Any]:
    """What stands for an autoencoder's config.json in a content digest.

    One with latents_mean and latents_std is marked: versions that overlooked them gave other latents and images of the
    same files, which must not be taken for these.
    """
    by_channel = config.get("latents_mean") is not None and config.get("latents_std") is not None
    return config | {"latents": "normalised by channel"} if by_channel else config


def encoder_digest(network: AutoencoderKL | AutoencoderTiny) -> str:
    """16 hex digits of what latents follow from: the encoder's weights, and the scale in the config."""
    parts = ("encoder.", "quant_conv.")
    scale = ("_class_name", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "latent_channels")
    config = {key: network.config.get(key) for key in scale}
    return content_digest(config, {k: v for k, v in network.state_dict().items() if k.startswith(parts)})


def load_autoencoder(path: str | os.PathLike[str], **how: Any) -> Autoencoder:
    """Load an autoencoder alone: a prior's, without its denoiser, or one that is saved by itself.

    Args:
        path: a folder in diffusers' format, of an autoencoder or of a pipeline with a vae/ in it, `shipped:<name>`,
            or a Hugging Face id of either.
        how: device, dtype, channels_last and compile of `Autoencoder`.

    Raises:
        ValueError: the folder is missing or incomplete, or holds another kind of network.
    """
    folder = resolve_folder(path, "autoencoder")
    part = "vae" if (folder / "vae").is_dir() else None
    config = read_json(folder / (part or "") / "config.json", "autoencoder")
    network = load_network(network_kind(config, folder), folder, part)
    return Autoencoder(network, id=content_digest(identity_of(config), network.state_dict()), **how)


def network_kind(config: dict[str, Any], folder: Path) -> Any:
    """The class of the autoencoder that a config.json belongs to.

    Raises:
        ValueError: it is none of ours.
    """
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise ValueError(f"autoencoder: expected one of {sorted(KINDS)}, got {kind} in {folder}")
    return KINDS[str(kind)]


def cast(network: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The network itself, moved and cast."""
    # torch's own `to`: diffusers' warns of every cast, even when no part of the network must stay float32.
    return torch.nn.Module.to(network, device, dtype)


def load_network(network_class: Any, folder: Path, part: str | None) -> Any:
    """A diffusers network of a folder (its subfolder `part`) in float32, with every tensor from the files.

    Raises:
        ValueError: a file or a tensor is absent or does not fit.
    """
    place = folder / (part or "")
    check_not_pointers(place, "prior")
    variant = variant_of(place)
    try:
        # Without low_cpu_mem_usage no accelerate is needed; random values must not stand in for tensors
        # that are absent or of a wrong shape, so the report of what was missing is asked for and read.
        network, report = network_class.from_pretrained(
            os.fspath(folder), subfolder=part, torch_dtype=torch.float32, low_cpu_mem_usage=False,
            output_loading_info=True, local_files_only=True, variant=variant,
            use_safetensors=is_safetensors(place, variant),
        )  # fmt: skip
    except Exception as error:  # a config or a file of others, and whatever diffusers raises of it
        raise ValueError(f"prior: {place} does not load as {network_class.__name__}: {first_line(error)}") from error
    absent = list(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]
    if absent:
        raise ValueError(f"prior: {place} lacks {len(absent)} tensors, such as {absent[:3]}")
    check_finite(network.state_dict(), str(place))
    return network
