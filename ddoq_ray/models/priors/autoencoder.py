"""An autoencoder alone: centroids are decoded as they are, which is the ablation of the diffusion between them.

Shape suffixes: B batch, C latent channels, h w latent size, H W image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddoq_ray.models.autoencoder import KINDS, factor_of, identity_of, load_network, network_kind
from ddoq_ray.models.folders import content_digest, read_json
from ddoq_ray.models.priors.base import STARTS, Prior, Sampling
from ddoq_ray.models.priors.loading import Loading
from ddoq_ray.storage.records import ClassInfo

_DENOISERS = ("unet", "transformer")
_DECODES = (
    "prior: an autoencoder alone denoises nothing; give synthesizer.strength=0 with synthesizer.start=noised, or a "
    "prior.path with a denoiser (and no prior.autoencoder_only)"
)


class AutoencoderPrior(Prior):
    """See `Prior`. It takes no condition and runs no step."""

    def __init__(self, network: Any, image_size: int, *, how: Loading, id: str) -> None:
        """Put a network to use.

        Args:
            network: an autoencoder of diffusers.
            image_size: H = W of the images.
            how: how it runs.
            id: the content digest.

        Raises:
            ValueError: the size does not fit the network, or `how` asks for what only a denoiser has.
        """
        for key, default in (("scheduler", "folder"), ("negative_prompt", "")):
            if getattr(how, key) != default:
                raise ValueError(f"prior.{key}: an autoencoder alone denoises nothing; leave it out")
        self.autoencoder = how.autoencoder(network, id)
        factor = self.autoencoder.factor
        if image_size < factor or image_size % factor:
            raise ValueError(f"prior.image_size={image_size}: expected a multiple of {factor}, by which it scales down")
        self.image_size = image_size
        self.latent_shape = (self.autoencoder.latent_channels, image_size // factor, image_size // factor)
        self.id = id

    @classmethod
    def from_folder(cls, folder: Path, how: Loading) -> AutoencoderPrior:
        """Read a folder of an autoencoder alone, or the vae/ of a pipeline's."""
        part = "vae" if (folder / "vae").is_dir() else None
        config = read_json(folder / (part or "") / "config.json", "prior")
        network = load_network(network_kind(config, folder), folder, part)
        size = how.image_size or _size_of(folder, config, factor_of(network))
        digest = content_digest({"autoencoder": identity_of(config), "image_size": size}, network.state_dict())
        return cls(network, size, how=how, id=digest)

    def conditioning(self, classes: Sequence[ClassInfo]) -> None:
        """Nothing: the centroid says all."""
        return None

    @torch.inference_mode()
    def synthesize(
        self,
        latents: Tensor,
        condition: Tensor | None,
        noise: Tensor,
        how: Sampling,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """See `Prior`."""
        self.check_batch(latents, noise, generators)
        self.check_settings(how)
        if condition is not None:
            raise ValueError(f"prior: expected no condition for an autoencoder alone, got {tuple(condition.shape)}")
        return self.decode(latents.to(torch.float32))

    def check_settings(self, how: Sampling) -> int:
        """See `Prior`."""
        if how.start not in STARTS:
            raise ValueError(f"prior: expected a start of {list(STARTS)}, got {how.start!r}")
        if how.start != "noised" or how.strength != 0:
            raise ValueError(_DECODES)
        if how.guidance != 1.0:
            raise ValueError(
                f"prior: guidance {how.guidance} needs a null condition, which an autoencoder alone lacks; use "
                "synthesizer.guidance=1"
            )
        return 0

    def noise_scales(self, strength: float, steps: int) -> tuple[float, float]:
        """See `Prior`."""
        raise ValueError(
            f"quantizer.noise_level={strength}: an autoencoder alone denoises nothing; use quantizer.noise_level=0, or "
            "a prior with a denoiser"
        )


def is_autoencoder(folder: Path) -> bool:
    """Whether a folder holds an autoencoder and nothing else."""
    if (folder / "model_index.json").exists() or not (folder / "config.json").is_file():
        return False
    return read_json(folder / "config.json", "prior").get("_class_name") in KINDS


def _size_of(folder: Path, config: dict[str, Any], factor: int) -> int:
    """H = W as a pipeline's denoiser has it, else the autoencoder's config.

    Raises:
        ValueError: neither says it.
    """
    for part in _DENOISERS:
        if (folder / part / "config.json").is_file():
            side = read_json(folder / part / "config.json", "prior").get("sample_size")
            if isinstance(side, int):
                return side * factor
    size = config.get("sample_size")
    if not isinstance(size, int):
        raise ValueError(
            f"prior: {folder} does not say for which size of images it is; give prior.image_size (a multiple of "
            f"{factor})"
        )
    return size
