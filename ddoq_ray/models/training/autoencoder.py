"""Training of an autoencoder: what one step does, whoever drives it.

Shape suffixes: B batch, S image size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ddoq_ray.config.network_training import GROUPS, PriorTraining
from ddoq_ray.models.features import FeatureLevels
from ddoq_ray.models.training.averaging import Average, Resumable
from ddoq_ray.models.training.course import arithmetic, compiled, generator_of
from ddoq_ray.models.training.ranks import Part, descend


class AutoencoderTraining(Resumable):
    """An AutoencoderKL under training: pixels, KL, and, with a teacher, what the teacher sees.

    Attributes:
        network: the autoencoder; what is trained of it is `trained`.
        trained: the whole network, or its decoder alone, so that latents stay what they are.
    """

    network: AutoencoderKL

    def __init__(
        self,
        network: AutoencoderKL,
        config: PriorTraining,
        teacher: FeatureLevels | None = None,
        *,
        decoder_only: bool = False,
    ) -> None:
        """Take a network, where it is; each rank has a copy."""
        self.network, self.config, self.teacher = network, config, teacher
        self.device = next(network.parameters()).device
        if config.precision == "bfloat16":
            nn.Module.to(network, memory_format=torch.channels_last)
        parts = [network.decoder, network.post_quant_conv] if decoder_only else [network]
        self.decoder_only = decoder_only
        self.trained = nn.ModuleList([part for part in parts if part is not None])
        network.requires_grad_(False)
        self.trained.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=0.0, weight_decay=1e-2, betas=(0.9, 0.99))
        self.average = Average(self.trained, config.autoencoder_ema)
        self._encode, self._decode = compiled((network.encode, network.decode), config.compile)

    def step(self, pixels: Tensor, step: int, rate: float, part: Part) -> dict[str, float]:
        """One step.

        Args:
            pixels: float32 [B, 3, S, S] in [-1, 1], this rank's part of the batch.
            step: its number, which keys the noise.
            rate: the learning rate.
            part: which one it is.

        Returns:
            The loss over the batch and its parts: mse (in [-1, 1]'s scale), kl (nats a latent value), features
            and logits (relative).
        """
        generator = generator_of(self.config.seed, "autoencoder", step)
        x = mirrored(pixels, generator, part) if self.config.flip else pixels
        with arithmetic(self.device, self.config.precision):
            posterior = self._encode(x).latent_dist
            mean, variance = posterior.mean.float(), posterior.var.float()
            z = mean  # a decoder alone is tuned on what it will be given: latents without the posterior's noise
            if not self.decoder_only:
                # Noise from the CPU's generator: the same numbers on every device.
                noise = part.of(torch.randn((part.size, *mean.shape[1:]), generator=generator))
                z = mean + variance.sqrt() * noise.to(self.device)
            output = self._decode(z).sample
            terms = {"mse": F.mse_loss(output.float(), x)}
            if not self.decoder_only:
                terms["kl"] = 0.5 * (mean.square() + variance - 1.0 - posterior.logvar.float()).mean()
            if self.teacher is not None:
                terms["features"], logits = self.teacher.distances(output / 2 + 0.5, x / 2 + 0.5)
                terms |= {"logits": logits} if self.config.logit_weight else {}
        weights = {
            "mse": 1.0, "kl": self.config.kl_weight, "features": self.config.feature_weight,
            "logits": self.config.logit_weight,
        }  # fmt: skip
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        descend(loss, self.optimizer, rate, part, cut=1.0)
        self.average.update(step)
        return part.told({"loss": loss, **terms})

    def finish(self) -> AutoencoderKL:
        """The network with its averaged weights, in eval mode."""
        self.average.apply()
        return self.network.eval().requires_grad_(False)


def build_autoencoder(size: int, config: PriorTraining) -> AutoencoderKL:
    """A freshly initialised autoencoder of images of `size` px."""
    levels = len(config.autoencoder_widths)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.autoencoder_widths,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=GROUPS,
        sample_size=size,
        mid_block_add_attention=False,
    )


def mirrored(x: Tensor, generator: torch.Generator, part: Part) -> Tensor:
    """x [B, 3, S, S], about half of the images left to right."""
    chosen = part.of(torch.rand(part.size, generator=generator) < 0.5).to(x.device)
    return torch.where(chosen[:, None, None, None], x.flip(-1), x)
