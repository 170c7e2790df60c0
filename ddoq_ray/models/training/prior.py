"""Train a small class-conditional prior: a KL autoencoder, then a diffusion model on its latents.

Meant for small images (the shipped digits prior, CIFAR-sized sets) in one process; for photographs use a
published prior such as facebook/DiT-XL-2-256. Everything is seeded by generators of its own.

Shape suffixes: N images, B batch, C latent channels, h w latent size, S image size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

from ddoq_ray.config.network_training import GROUPS, PriorTraining
from ddoq_ray.models.folders import check_free, published_folder
from ddoq_ray.models.priors.class_conditional import ClassConditionalPrior
from ddoq_ray.models.priors.loading import Loading

Progress = Callable[[str, int, int, float], None]
_REPORT_EVERY = 50


def train_prior(
    images: np.ndarray,
    class_ids: np.ndarray,
    classes: Sequence[str],
    out: str | os.PathLike[str],
    *,
    config: PriorTraining | None = None,
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
    overwrite: bool = False,
    extra: dict[str, Any] | None = None,
    run_by: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a prior and publish it as the folder `out`, which `load_prior` reads.

    Args:
        images: uint8 [N, 3, S, S].
        class_ids: int64 [N], labels 0 .. len(classes) - 1.
        classes: names in label order.
        out: folder to write, whole or not at all.
        config: see `PriorTraining`.
        device: where to train.
        on_progress: called with (phase, step, steps, loss) now and then; phases "autoencoder" and "denoiser".
        overwrite: replace an existing folder.
        extra: kept in ddoq_prior.json, such as the data's name.
        run_by: settings of a run that belong to this prior, as groups of keys, kept in ddoq_prior.json.

    Returns:
        What ddoq_prior.json records under "training": the configuration, versions and final losses.

    Raises:
        ValueError: images and labels that do not fit, or an existing `out`.
    """
    config = config or PriorTraining()
    check_free(out, overwrite=overwrite)
    check_images(images, class_ids, classes)
    order = canonical_order(images, class_ids)
    images, class_ids = images[order], class_ids[order]
    size = images.shape[-1]
    factor = 2 ** (len(config.autoencoder_widths) - 1)
    if size % factor:
        raise ValueError(f"prior training: images of {size} px are not divisible by {factor} (autoencoder_widths)")
    device = torch.device(device)
    report = on_progress or (lambda phase, step, steps, loss: None)
    pixels = (torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1.0).to(device)
    labels = torch.from_numpy(np.ascontiguousarray(class_ids)).long().to(device)

    vae, reconstruction = _train_autoencoder(pixels, config, report)
    with torch.inference_mode():
        sides = [pixels] + ([pixels.flip(-1)] if config.flip else [])
        latents = torch.cat([vae.encode(b).latent_dist.mode() for side in sides for b in side.split(256)])
    vae.register_to_config(scaling_factor=float(1.0 / latents.std()))
    denoiser, loss = _train_denoiser(
        latents.clone() * vae.config["scaling_factor"],
        labels.repeat(len(sides)),
        len(classes),
        config,
        report,
    )
    record = {
        "options": asdict(config),
        "images": len(images),
        "pixel_mse": reconstruction,
        "denoising_loss": loss,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        **(extra or {}),
    }
    prior = ClassConditionalPrior(vae, denoiser, _scheduler(config), classes=list(classes), how=Loading(device=device))
    with published_folder(out, overwrite=overwrite) as work:
        prior.save(work, {**(run_by or {}), "training": record}, dtype=config.dtype)
    return record


def check_images(images: np.ndarray, class_ids: np.ndarray, classes: Sequence[str]) -> None:
    """Raise a ValueError unless images are uint8 [N, 3, S, S] and labels int [N] in 0 .. len(classes) - 1."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or images.dtype != np.uint8:
        raise ValueError(f"training: expected images uint8 [N, 3, S, S], got {images.dtype} {images.shape}")
    if class_ids.shape != images.shape[:1] or not np.issubdtype(class_ids.dtype, np.integer):
        raise ValueError(f"training: expected {len(images)} integer labels, got {class_ids.dtype} {class_ids.shape}")
    if len(images) == 0:
        raise ValueError("training: expected at least one image, got none")
    if class_ids.min() < 0 or class_ids.max() >= len(classes):
        raise ValueError(
            f"training: labels must lie in 0 .. {len(classes) - 1}, got {class_ids.min()} .. {class_ids.max()}"
        )


def canonical_order(images: np.ndarray, class_ids: np.ndarray) -> np.ndarray:
    """int64 [N]: rows by class, then by content, so that training does not depend on the shards' order."""
    keys = [
        (int(c), hashlib.blake2b(x.tobytes(), digest_size=16).digest()) for c, x in zip(class_ids, images, strict=True)
    ]
    return np.asarray(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def batches(n: int, batch: int, steps: int, generator: torch.Generator) -> Any:
    """`steps` index batches from endless shuffled passes over n rows; never smaller than min(n, batch)."""
    batch = min(n, batch)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(n, generator=generator)])
        yield order[:batch]
        order = order[batch:]


def _train_autoencoder(pixels: Tensor, config: PriorTraining, report: Progress) -> tuple[AutoencoderKL, float]:
    levels = len(config.autoencoder_widths)
    vae = _seeded(
        config.seed,
        lambda: AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.autoencoder_widths,
            layers_per_block=1,
            latent_channels=config.latent_channels,
            norm_num_groups=GROUPS,
            sample_size=pixels.shape[-1],
            mid_block_add_attention=False,
        ),
    ).to(pixels.device)
    optimizer, schedule = _optimizer(vae, config.autoencoder_lr, config.autoencoder_steps)
    generator = torch.Generator().manual_seed(config.seed)
    running, steps = 0.0, config.autoencoder_steps
    for step, index in enumerate(batches(len(pixels), config.autoencoder_batch, steps, generator), start=1):
        x = pixels[index.to(pixels.device)]
        if config.flip:
            mirrored = torch.rand(len(x), generator=generator).to(x.device) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        posterior = vae.encode(x).latent_dist
        # Noise from the CPU's generator: the same numbers on every device.
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        z = posterior.mean + posterior.std * noise
        error = F.mse_loss(vae.decode(z).sample, x)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        _step(error + config.kl_weight * kl, vae, optimizer, schedule)
        running = error.item() if step == 1 else 0.98 * running + 0.02 * error.item()
        if step % _REPORT_EVERY == 0 or step == steps:
            report("autoencoder", step, steps, running)
    return vae.eval(), running


def _train_denoiser(
    latents: Tensor, labels: Tensor, num_classes: int, config: PriorTraining, report: Progress
) -> tuple[UNet2DModel | DiTTransformer2DModel, float]:
    channels, size = latents.shape[1], latents.shape[2]
    model = _seeded(config.seed + 1, lambda: _build_denoiser(channels, size, num_classes, config)).to(latents.device)
    # Stays in eval mode: diffusers' DiT drops labels by itself while training, in each block apart and from
    # the global generator; labels are dropped here instead, for the whole network. There is no other dropout.
    model.eval()
    average = [p.detach().clone() for p in model.parameters()]
    optimizer, schedule = _optimizer(model, config.denoiser_lr, config.denoiser_steps)
    scheduler = _scheduler(config)
    generator = torch.Generator().manual_seed(config.seed + 1)
    running, steps = 0.0, config.denoiser_steps
    for step, index in enumerate(batches(len(latents), config.denoiser_batch, steps, generator), start=1):
        z = latents[index.to(latents.device)]
        y = labels[index.to(latents.device)]
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        t = torch.randint(scheduler.config["num_train_timesteps"], (len(z),), generator=generator).to(z.device)
        dropped = (torch.rand(len(z), generator=generator) < config.label_dropout).to(z.device)
        y = torch.where(dropped, num_classes, y)
        noisy = scheduler.add_noise(z, noise, t)
        target = noise if config.prediction_type == "epsilon" else scheduler.get_velocity(z, noise, t)
        loss = F.mse_loss(model(noisy, timestep=t, class_labels=y).sample, target)
        _step(loss, model, optimizer, schedule)
        with torch.no_grad():
            # The first averages would otherwise remember the initialisation.
            decay = min(config.ema, step / (step + 10))
            torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1.0 - decay)
        running = loss.item() if step == 1 else 0.99 * running + 0.01 * loss.item()
        if step % _REPORT_EVERY == 0 or step == steps:
            report("denoiser", step, steps, running)
    with torch.no_grad():
        for parameter, mean in zip(model.parameters(), average, strict=True):
            parameter.copy_(mean)
    return model, running


def _build_denoiser(
    channels: int, size: int, num_classes: int, config: PriorTraining
) -> UNet2DModel | DiTTransformer2DModel:
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


def _scheduler(config: PriorTraining) -> DDIMScheduler:
    # clip_sample, diffusers' default, cuts at +-1: right for pixels, ruinous for latents of unit deviation.
    return DDIMScheduler(clip_sample=False, prediction_type=config.prediction_type, beta_schedule=config.beta_schedule)


def _seeded(seed: int, build: Callable[[], Any]) -> Any:
    """Build a network from `seed`, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return build()


def _optimizer(model: nn.Module, lr: float, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2, betas=(0.9, 0.99))
    return optimizer, one_cycle(optimizer, lr, max(steps, 2), warm_up=0.05)


def one_cycle(optimizer: torch.optim.Optimizer, lr: float, steps: int, *, warm_up: float) -> Any:
    """A cosine up to `lr` over the share `warm_up` of the steps, then down to about zero; momentum stays.

    OneCycleLR divides by zero where the warm-up is exactly one step (20 steps at 0.05), so it is a little longer there.
    """
    share = 1.5 * warm_up if warm_up * steps == 1.0 else warm_up
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=share, cycle_momentum=False
    )


def _step(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
