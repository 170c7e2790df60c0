"""Train a small class-conditional prior: a KL autoencoder, then a diffusion model on its latents.

Meant for small images (the shipped digits prior, CIFAR-sized sets); for photographs use a published prior such as
facebook/DiT-XL-2-256. Everything is seeded by keys of its own, and goes on from a checkpoint where it was stopped.

Shape suffixes: N images, B batch, C latent channels, h w latent size, S image size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ddoq_ray.config.network_training import PriorTraining
from ddoq_ray.models.classifiers import Classifier
from ddoq_ray.models.features import FeatureLevels
from ddoq_ray.models.folders import check_free, published_folder
from ddoq_ray.models.priors.class_conditional import ClassConditionalPrior
from ddoq_ray.models.training.autoencoder import AutoencoderTraining, build_autoencoder
from ddoq_ray.models.training.checkpoints import Checkpoints
from ddoq_ray.models.training.course import Course, Passes
from ddoq_ray.models.training.denoiser import Denoiser, DenoiserTraining, build_denoiser, scheduler_of

Progress = Callable[[str, int, int, float], None]
_REPORT_EVERY = 50
_ENCODED_AT_ONCE = 256


def train_prior(
    images: np.ndarray,
    class_ids: np.ndarray,
    classes: Sequence[str],
    out: str | os.PathLike[str],
    *,
    config: PriorTraining | None = None,
    teacher: Classifier | None = None,
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
        out: folder to write, whole or not at all. A stopped training is kept in `<out>.training`, and goes on from
            there.
        config: see `PriorTraining`.
        teacher: a classifier of such images; the autoencoder then keeps what it sees (`feature_weight`).
        device: where to train.
        on_progress: called with (phase, step, steps, loss) now and then; phases "autoencoder" and "denoiser".
        overwrite: replace an existing folder.
        extra: kept in ddoq_prior.json, such as the data's name.
        run_by: settings of a run that belong to this prior, as groups of keys, kept in ddoq_prior.json.

    Returns:
        What ddoq_prior.json records under "training": the configuration, versions and final losses.

    Raises:
        ValueError: images and labels that do not fit, an existing `out`, or a stopped training of other settings.
    """
    config = config or PriorTraining()
    check_free(out, overwrite=overwrite)
    check_images(images, class_ids, classes)
    size = images.shape[-1]
    factor = 2 ** (len(config.autoencoder_widths) - 1)
    if size % factor:
        raise ValueError(f"prior training: images of {size} px are not divisible by {factor} (autoencoder_widths)")
    order, digest = canonical_order(images, class_ids)
    identity = {
        "options": {**asdict(config), "autoencoder_widths": list(config.autoencoder_widths),
                    "unet_widths": list(config.unet_widths)},
        "images": digest, "classes": list(classes), "teacher": None if teacher is None else teacher.id,
        "torch": str(torch.__version__), "diffusers": str(diffusers.__version__),
        "device": torch.device(device).type, "threads": torch.get_num_threads(),
    }  # fmt: skip
    training = _Training(
        Pictures(images, class_ids, order),
        config,
        torch.device(device),
        Checkpoints(out, identity, overwrite=overwrite),
        on_progress or (lambda phase, step, steps, loss: None),
    )
    training.open()
    vae = training.autoencoder(size, None if teacher is None else FeatureLevels(teacher.to(device)))
    denoiser = training.denoiser(vae, len(classes))
    record = {
        **identity, "images": len(images), "images_digest": digest, **training.facts, **(extra or {}),
    }  # fmt: skip
    prior = ClassConditionalPrior(vae, denoiser, scheduler_of(config), classes=list(classes), device=device)
    with published_folder(out, overwrite=overwrite) as work:
        prior.save(work, {**(run_by or {}), "training": record}, dtype=config.dtype)
    training.checkpoints.remove()
    return record


@dataclass(frozen=True)
class Pictures:
    """Training images in an order that does not depend on the shards'.

    Attributes:
        images: uint8 [N, 3, S, S].
        class_ids: int64 [N].
        order: int64 [N], the row of `images` that stands at each place.
    """

    images: npt.NDArray[np.uint8]
    class_ids: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.order)

    def pixels(self, places: npt.NDArray[np.int64], device: torch.device) -> Tensor:
        """float32 [B, 3, S, S] in [-1, 1] at some places."""
        rows = np.ascontiguousarray(self.images[self.order[places]])
        return torch.from_numpy(rows).to(device).float() / 127.5 - 1.0

    def labels(self, places: npt.NDArray[np.int64], device: torch.device) -> Tensor:
        """int64 [B] at some places."""
        return torch.from_numpy(self.class_ids[self.order[places]].astype(np.int64)).to(device)


class _Training:
    """The two phases, and the checkpoints between their steps."""

    def __init__(
        self,
        data: Pictures,
        config: PriorTraining,
        device: torch.device,
        checkpoints: Checkpoints,
        report: Progress,
    ) -> None:
        self.data, self.config, self.device = data, config, device
        self.checkpoints, self.report = checkpoints, report
        self.state: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}

    def open(self) -> None:
        """Take up what was saved."""
        self.state = self.checkpoints.open() or {}
        self.facts = self.state.get("facts", {})

    def autoencoder(self, size: int, teacher: FeatureLevels | None) -> AutoencoderKL:
        config = self.config
        vae = seeded(config.seed, lambda: build_autoencoder(size, config)).to(self.device)
        if "autoencoder" in self.state:  # this phase is over
            vae.load_state_dict(self.state["autoencoder"])
            return vae.eval().requires_grad_(False)
        training = AutoencoderTraining(vae, config, teacher)
        passes = Passes(len(self.data), config.autoencoder_batch, (config.seed, "autoencoder"))

        def step(number: int, rate: float) -> dict[str, float]:
            return training.step(self.data.pixels(passes.rows(number), self.device), number, rate)

        self._phase("autoencoder", training, step, config.autoencoder_steps, config.autoencoder_lr)
        vae = training.finish()
        self.state = {"autoencoder": vae.state_dict()}
        return vae

    def denoiser(self, vae: AutoencoderKL, num_classes: int) -> Denoiser:
        config = self.config
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
            rows = passes.rows(number)
            z = torch.from_numpy(latents[rows]).to(self.device).float()
            return training.step((z - shift) / scale, self.data.labels(rows % n, self.device), number, rate)

        self._phase("denoiser", training, step, config.denoiser_steps, config.denoiser_lr)
        return training.finish()

    def _latents(self, vae: AutoencoderKL, sides: int) -> tuple[npt.NDArray[np.float16], Any, Any]:
        """(float16 [sides N, C, h, w] in a file, mean, std float32 [C]); encoded once, mirrored ones behind."""
        file = self.checkpoints.folder / "latents.npy"
        if "moments" not in self.state or not file.exists():
            moments = write_latents(vae, self.data, sides, file, self.device)
            self.state["moments"] = [torch.from_numpy(m) for m in moments]
            self.checkpoints.save({**self.state, "facts": self.facts})
        mean, std = (m.numpy() for m in self.state["moments"])
        return np.load(file, mmap_mode="r"), mean, std

    def _phase(
        self,
        name: str,
        training: AutoencoderTraining | DenoiserTraining,
        step: Callable[[int, float], dict[str, float]],
        steps: int,
        peak: float,
    ) -> None:
        """Run a phase to its end, from where it was stopped."""
        config, running = self.config, {}
        seconds = None
        if config.minutes is not None:
            share = config.autoencoder_share if name == "autoencoder" else 1 - config.autoencoder_share
            seconds = 60 * config.minutes * share
        course = Course(steps, seconds)
        begun = self.state.get("running")
        if begun is not None and begun["phase"] == name:
            training.restore(begun["training"])
            course = Course(steps, seconds, **begun["course"])
            running = dict(begun["losses"])
        kept = {key: value for key, value in self.state.items() if key != "running"}
        for number in course:
            losses = step(number, course.rate(peak))
            if not all(np.isfinite(loss) for loss in losses.values()):
                raise ValueError(
                    f"prior training: the {name}'s loss is {losses} at step {number}; lower training.{name}_lr "
                    f"(now {peak:g})"
                )
            running = {key: loss + 0.99 * (running.get(key, loss) - loss) for key, loss in losses.items()}
            made = number + 1
            if made % _REPORT_EVERY == 0:
                self.report(name, made, course.expected, sum(running.values()))
            if made % config.checkpoint_every == 0:
                now = {"phase": name, "training": training.state(), "course": {"done": made, "spent": course.spent},
                       "losses": running}  # fmt: skip
                self.checkpoints.save({**kept, "running": now, "facts": self.facts})
        self.report(name, course.done, course.done, sum(running.values()))
        self.state = kept
        self.facts[f"{name}_steps"] = course.done
        self.facts[f"{name}_seconds"] = round(course.spent)
        self.facts[f"{name}_losses"] = running


@torch.inference_mode()
def write_latents(
    vae: AutoencoderKL, data: Pictures, sides: int, file: Path, device: torch.device
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Encode all images into the file; their mean and deviation by channel, float32 [C] each."""
    n, out, total, squares, count = len(data), None, 0.0, 0.0, 0
    for side in range(sides):
        for first in range(0, n, _ENCODED_AT_ONCE):
            places = np.arange(first, min(first + _ENCODED_AT_ONCE, n))
            x = data.pixels(places, device)
            z = vae.encode(x.flip(-1) if side else x).latent_dist.mode().float().cpu().numpy()
            if out is None:
                out = np.lib.format.open_memmap(file, "w+", np.float16, (sides * n, *z.shape[1:]))
            out[side * n + first : side * n + first + len(z)] = z
            z64 = z.astype(np.float64)
            total = total + z64.sum((0, 2, 3))
            squares = squares + np.square(z64).sum((0, 2, 3))
            count += z[:, 0].size
    assert out is not None, "check_images refuses an empty set"
    out.flush()
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 1e-12))
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)


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


def canonical_order(images: np.ndarray, class_ids: np.ndarray) -> tuple[npt.NDArray[np.int64], str]:
    """(int64 [N]: rows by class, then by content, so that training does not depend on the shards' order; a digest)."""
    keys = [
        (int(c), hashlib.blake2b(x.tobytes(), digest_size=16).digest()) for c, x in zip(class_ids, images, strict=True)
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    digest = hashlib.blake2b(digest_size=8)
    for row in order:
        digest.update(keys[row][0].to_bytes(8, "little") + keys[row][1])
    return np.asarray(order, dtype=np.int64), digest.hexdigest()


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    """Build a network from `seed`, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return build()


def batches(n: int, batch: int, steps: int, generator: torch.Generator) -> Any:
    """`steps` index batches from endless shuffled passes over n rows; never smaller than min(n, batch)."""
    batch = min(n, batch)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(n, generator=generator)])
        yield order[:batch]
        order = order[batch:]


def one_cycle(optimizer: torch.optim.Optimizer, lr: float, steps: int, *, warm_up: float) -> Any:
    """A cosine up to `lr` over the share `warm_up` of the steps, then down to about zero; momentum stays.

    OneCycleLR divides by zero where the warm-up is exactly one step (20 steps at 0.05), so it is a little longer there.
    """
    share = 1.5 * warm_up if warm_up * steps == 1.0 else warm_up
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=share, cycle_momentum=False
    )
