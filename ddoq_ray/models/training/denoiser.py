"""Training of a latent denoiser: what one step does, whoever drives it.

Shape suffixes: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

from ddoq_ray.config.network_training import GROUPS, PriorTraining
from ddoq_ray.models.training.averaging import Average, Resumable
from ddoq_ray.models.training.course import arithmetic, compiled, generator_of
from ddoq_ray.models.training.ranks import Part, descend

# diffusers' classes have no types: a UNet2DModel or a DiTTransformer2DModel.
Denoiser: TypeAlias = nn.Module


class DenoiserTraining(Resumable):
    """A class-conditional denoiser under training: DDPM's loss, labels dropped for classifier-free guidance.

    Attributes:
        network: the denoiser.
        num_classes: the null label, which stands for a dropped one.
    """

    def __init__(self, network: Denoiser, num_classes: int, config: PriorTraining) -> None:
        """Take a network, where it is; each rank has a copy."""
        self.network, self.num_classes, self.config = network, num_classes, config
        self.device = next(network.parameters()).device
        # Stays in eval mode: diffusers' DiT drops labels by itself while training, in each block apart and from the
        # global generator; labels are dropped here instead, for the whole network. There is no other dropout.
        network.eval()
        self.scheduler = scheduler_of(config)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=1e-2, betas=(0.9, 0.99))
        self.average = Average(network, config.ema)
        (self._predict,) = compiled((network,), config.compile)

    def step(self, latents: Tensor, labels: Tensor, step: int, rate: float, part: Part) -> dict[str, float]:
        """One step.

        Args:
            latents: float32 [B, C, h, w] of about unit deviation, this rank's part of the batch.
            labels: int64 [B], 0 .. num_classes - 1.
            step: its number, which keys noise, times and dropped labels.
            rate: the learning rate.
            part: which one it is.

        Returns:
            The loss over the batch: mse of the prediction, weighted by `min_snr` where that is given.
        """
        generator = generator_of(self.config.seed, "denoiser", step)
        z, n = latents, part.size
        noise = part.of(torch.randn((n, *z.shape[1:]), generator=generator)).to(self.device)
        times = part.of(torch.randint(self.scheduler.config["num_train_timesteps"], (n,), generator=generator))
        dropped = part.of(torch.rand(n, generator=generator)) < self.config.label_dropout
        y = torch.where(dropped.to(self.device), self.num_classes, labels)
        t = times.to(self.device)
        noisy = self.scheduler.add_noise(z, noise, t)
        target = noise
        if self.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(z, noise, t)
        with arithmetic(self.device, self.config.precision):
            output = self._predict(noisy, timestep=t, class_labels=y).sample
        squared = (output.float() - target).square().flatten(1).mean(1)
        loss = (squared * self._weights(times).to(self.device)).mean()
        descend(loss, self.optimizer, rate, part, cut=1.0)
        self.average.update(step)
        return part.told({"loss": loss})

    def _weights(self, times: Tensor) -> Tensor:
        """Min-SNR-gamma: min(SNR, gamma) on the clean latent's error (Hang et al., ICCV 2023, arXiv 2303.09556)."""
        gamma = self.config.min_snr
        if gamma is None:
            return torch.ones(len(times))
        signal = self.scheduler.alphas_cumprod[times]
        snr = signal / (1 - signal).clamp_min(1e-12)
        # The error of eps is SNR times the clean latent's, the error of v is SNR + 1 times.
        scale = snr + 1 if self.config.prediction_type == "v_prediction" else snr.clamp_min(1e-12)
        return snr.clamp_max(gamma) / scale

    def finish(self) -> Denoiser:
        """The network with its averaged weights."""
        self.average.apply()
        return self.network


def build_denoiser(latent_shape: tuple[int, int, int], num_classes: int, config: PriorTraining) -> Denoiser:
    """A freshly initialised denoiser of latents [C, h, w]."""
    channels, size, _ = latent_shape
    if config.denoiser == "dit":
        return DiTTransformer2DModel(
            num_attention_heads=config.dit_heads,
            attention_head_dim=config.dit_width // config.dit_heads,
            in_channels=channels,
            out_channels=channels,
            num_layers=config.dit_layers,
            norm_num_groups=1,
            sample_size=size,
            patch_size=config.dit_patch,
            num_embeds_ada_norm=num_classes,
        )
    levels = len(config.unet_widths)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=config.unet_layers,
        block_out_channels=config.unet_widths,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        norm_num_groups=GROUPS,
        num_class_embeds=num_classes + 1,  # the last row is the null label
    )


def scheduler_of(config: PriorTraining) -> DDIMScheduler:
    """The noise schedule that the denoiser learns, and is sampled with."""
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if config.zero_snr else {}
    return DDIMScheduler(
        # clip_sample, diffusers' default, cuts at +-1: right for pixels, ruinous for latents of unit deviation.
        clip_sample=False,
        prediction_type=config.prediction_type,
        beta_schedule=config.beta_schedule,
        **zero,
    )
