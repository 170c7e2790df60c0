"""Train a small class-conditional prior: a KL autoencoder, then a diffusion model on its latents.

Meant for small images (the shipped digits prior, CIFAR-sized sets); for photographs use a published prior such as
facebook/DiT-XL-2-256. Everything is seeded by keys of its own, and goes on from a checkpoint where it was stopped.

Shape suffixes: N images, B batch, C latent channels, h w latent size, S image size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ddoq_ray.config.network_training import PriorTraining
from ddoq_ray.models.classifiers import Classifier
from ddoq_ray.models.features import FeatureLevels
from ddoq_ray.models.folders import check_free, published_folder
from ddoq_ray.models.priors.class_conditional import ClassConditionalPrior
from ddoq_ray.models.priors.loading import Loading
from ddoq_ray.models.training.autoencoder import AutoencoderTraining, build_autoencoder
from ddoq_ray.models.training.checkpoints import Checkpoints, machine, options
from ddoq_ray.models.training.course import Course, Passes
from ddoq_ray.models.training.data import Destination, Progress, TrainingSet
from ddoq_ray.models.training.denoiser import Denoiser, DenoiserTraining, build_denoiser, scheduler_of
from ddoq_ray.models.training.phases import Phases
from ddoq_ray.models.training.pictures import Pictures
from ddoq_ray.models.training.ranks import Alone, Part, Ranks, check_parts
from ddoq_ray.models.training.samples import draw, grid
from ddoq_ray.models.training.seen_by import LOOKED_AT, Classifiers

_ENCODED_AT_ONCE = 256


def train_prior(
    data: TrainingSet,
    out: Destination,
    config: PriorTraining | None = None,
    *,
    seen_by: Classifiers | None = None,
    ranks: Ranks | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a prior and publish it as a folder, which `load_prior` reads.

    Args:
        data: what it learns.
        out: the folder. A stopped training is kept in `<folder>.training`, and goes on from there.
        config: see `PriorTraining`.
        seen_by: classifiers of such images.
        ranks: who trains it, and where: this process alone, or every rank by a call of its own.
        on_progress: called with (phase, step, steps, loss) now and then; phases "autoencoder" and "denoiser".

    Returns:
        What ddoq_prior.json records under "training": the configuration, versions, final losses and, with classifiers,
        what they see in its images. Rank 0 alone publishes; the others give nothing.

    Raises:
        ValueError: images and labels that do not fit, an existing folder, or a stopped training of other settings.
    """
    config, seen_by, ranks = config or PriorTraining(), seen_by or Classifiers(), ranks or Alone()
    check_free(out.folder, overwrite=out.overwrite)
    data.check()
    size = data.images.shape[-1]
    factor = 2 ** (len(config.autoencoder_widths) - 1)
    if size % factor:
        raise ValueError(f"prior training: images of {size} px are not divisible by {factor} (autoencoder_widths)")
    for key in ("autoencoder_batch", "denoiser_batch"):
        check_parts(len(data.images), getattr(config, key), ranks.world, f"training.{key}")
    order, digest = data.order()
    identity = _identity(config, data, digest, seen_by.perceptual, ranks)
    checkpoints = Checkpoints(out.folder, identity, overwrite=out.overwrite)
    phases = Phases(checkpoints, config.checkpoint_every, on_progress, ranks)
    phases.open()
    pictures = Pictures(data.images, data.class_ids, order)
    training = _Training(pictures, config, ranks, phases)
    levels = None if seen_by.perceptual is None else FeatureLevels(seen_by.perceptual.to(training.device))
    vae = training.autoencoder(size, levels)
    denoiser = training.denoiser(vae, data.classes)
    if ranks.rank:
        return {}
    prior = ClassConditionalPrior(
        vae, denoiser, scheduler_of(config), classes=list(data.classes), how=Loading(device=training.device)
    )
    if seen_by.any:
        phases.report("judge", 0, min(LOOKED_AT, len(data.images)))
    record = {**identity, "images": len(data.images), **phases.facts, **seen_by.judged(prior, data), **out.extra}
    with published_folder(out.folder, overwrite=out.overwrite) as work:
        prior.save(work, {**out.run_by, "training": record}, dtype=config.dtype)
        Image.fromarray(grid(prior, data.classes)).save(work / "samples.png")
    checkpoints.remove()
    return record


def _identity(
    config: PriorTraining, data: TrainingSet, digest: str, perceptual: Classifier | None, ranks: Ranks
) -> dict[str, Any]:
    """What a training's bytes follow from."""
    return {
        "options": {key: list(v) if isinstance(v, tuple) else v for key, v in options(config).items()},
        "data": digest,
        "classes": list(data.classes),
        "perceptual": None if perceptual is None else perceptual.id,
        "torch": str(torch.__version__),
        "diffusers": str(diffusers.__version__),
        **machine(ranks),
    }


class _Training:
    """The two phases of a prior."""

    def __init__(self, data: Pictures, config: PriorTraining, ranks: Ranks, phases: Phases) -> None:
        self.data, self.config, self.ranks, self.phases = data, config, ranks, phases
        self.device = torch.device(ranks.device)

    def _course(self, name: str, steps: int, share: float) -> Course:
        minutes = self.config.minutes
        return self.phases.course(name, steps, None if minutes is None else 60 * minutes * share)

    def autoencoder(self, size: int, teacher: FeatureLevels | None) -> AutoencoderKL:
        config = self.config
        vae = seeded(config.seed, lambda: build_autoencoder(size, config)).to(self.device)
        if "autoencoder" in self.phases.state:  # this phase is over
            vae.load_state_dict(self.phases.state["autoencoder"])
            return vae.eval().requires_grad_(False)
        training = AutoencoderTraining(vae, config, teacher)
        passes = Passes(len(self.data), config.autoencoder_batch, (config.seed, "autoencoder"))

        def step(number: int, rate: float) -> dict[str, float]:
            rows = passes.rows(number)
            part = Part(len(rows), self.ranks)
            return training.step(self.data.pixels(part.of(rows), self.device), number, rate, part)

        course = self._course("autoencoder", config.autoencoder_steps, config.autoencoder_share)
        self.phases.run("autoencoder", training, step, course, config.autoencoder_lr)
        vae = training.finish()
        self.phases.state["autoencoder"] = vae.state_dict()
        return vae

    def denoiser(self, vae: AutoencoderKL, classes: Sequence[str]) -> Denoiser:
        config, num_classes = self.config, len(classes)
        sides = 2 if config.flip else 1
        latents, mean, std = self._latents(vae, sides)
        # A mean and a deviation for each channel: the denoiser's noise schedule assumes 0 and 1.
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=1.0)
        shape = (int(latents.shape[1]), int(latents.shape[2]), int(latents.shape[3]))
        network = seeded(config.seed + 1, lambda: build_denoiser(shape, num_classes, config)).to(self.device)
        training = DenoiserTraining(network, num_classes, config)
        n = len(self.data)
        passes = Passes(sides * n, config.denoiser_batch, (config.seed, "denoiser"))
        shift, scale = (torch.from_numpy(x).view(1, -1, 1, 1).to(self.device) for x in (mean, std))

        def step(number: int, rate: float) -> dict[str, float]:
            batch = passes.rows(number)
            part = Part(len(batch), self.ranks)
            rows = part.of(batch)
            z = torch.from_numpy(latents[rows]).to(self.device).float()
            return training.step((z - shift) / scale, self.data.labels(rows % n, self.device), number, rate, part)

        def watch(made: int) -> None:
            if config.samples_every and made % config.samples_every == 0:
                with training.average.applied():
                    draw(self.phases.checkpoints.folder, (vae, network, training.scheduler), classes, made)

        self.phases.watch = watch
        course = self._course("denoiser", config.denoiser_steps, 1 - config.autoencoder_share)
        self.phases.run("denoiser", training, step, course, config.denoiser_lr)
        return training.finish()

    def _latents(self, vae: AutoencoderKL, sides: int) -> tuple[npt.NDArray[np.float16], Any, Any]:
        """(float16 [sides N, C, h, w] in a file, mean, std float32 [C]); encoded once, mirrored ones behind."""
        file, state = self.phases.checkpoints.folder / "latents.npy", self.phases.state
        if not self.ranks.decide(lambda: "moments" in state and file.exists()):
            moments = write_latents(vae, self.data, sides, file, self.ranks, partial(self.phases.report, "latents"))
            state["moments"] = [torch.from_numpy(m) for m in moments]
            self.phases.save()
        mean, std = (m.numpy() for m in state["moments"])
        return np.load(file, mmap_mode="r"), mean, std


@torch.inference_mode()
def write_latents(
    vae: AutoencoderKL,
    data: Pictures,
    sides: int,
    file: Path,
    ranks: Ranks,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Encode all images into the file, chunks dealt to the ranks; mean and deviation by channel, float32 [C] each.

    `told` is called with how many are encoded, by this rank's pace, and how many there are.
    """
    n, device = len(data), torch.device(ranks.device)
    chunks = [(side, first) for side in range(sides) for first in range(0, n, _ENCODED_AT_ONCE)]
    sums = []
    begin = ranks.decide(lambda: _begin_latents(vae, data, sides * n, file))
    with open(file, "r+b") as written:
        for number, (side, first) in list(enumerate(chunks))[ranks.rank :: ranks.world]:
            x = data.pixels(np.arange(first, min(first + _ENCODED_AT_ONCE, n)), device)
            z = vae.encode(x.flip(-1) if side else x).latent_dist.mode().float().cpu().numpy()
            # Not through a map: of a page that two nodes map, one would write over what the other wrote.
            written.seek(begin + (side * n + first) * z[0].size * 2)
            written.write(z.astype("<f2").tobytes())
            z64 = z.astype(np.float64)
            sums.append((number, z64.sum((0, 2, 3)), np.square(z64).sum((0, 2, 3)), z[:, 0].size))
            told(min(len(sums) * ranks.world * _ENCODED_AT_ONCE, sides * n), sides * n)
        written.flush()
        os.fsync(written.fileno())
    total, squares, count = 0.0, 0.0, 0
    # In the order of chunks, whoever had them: the same floats on any number of ranks.
    for _, of_chunk, of_squares, values in sorted(chain(*ranks.gather(sums)), key=itemgetter(0)):
        total, squares, count = total + of_chunk, squares + of_squares, count + values
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 1e-12))
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)


def _begin_latents(vae: AutoencoderKL, data: Pictures, rows: int, file: Path) -> int:
    """An empty file of latents float16 [rows, C, h, w]; where in it they begin."""
    side = data.images.shape[-1] // 2 ** (len(vae.config["block_out_channels"]) - 1)
    shape = (rows, vae.config["latent_channels"], side, side)
    return int(np.lib.format.open_memmap(file, "w+", np.float16, shape).offset)


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    """Build a network from `seed`, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return build()
