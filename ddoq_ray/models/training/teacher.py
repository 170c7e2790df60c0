"""Train a classifier on real images, as teacher or as the full-data baseline, in one process.

Teachers label views, so they are trained on the kind of views that `core.views` renders (crop, flip, CutMix). In memory
are the images of one step: all others may lie in a file.

Shape suffixes: N images, B batch, C classes, S image size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from ddoq_ray.config.network_training import TeacherTraining
from ddoq_ray.core.rng import philox
from ddoq_ray.core.views.params import ViewSpec
from ddoq_ray.core.views.render import batch_views
from ddoq_ray.models.accuracy import top1_top5
from ddoq_ray.models.classifiers import Classifier, Normalisation, build_classifier, save_classifier
from ddoq_ray.models.folders import check_free
from ddoq_ray.models.training.averaging import Average, Resumable
from ddoq_ray.models.training.checkpoints import Checkpoints
from ddoq_ray.models.training.course import Passes, arithmetic
from ddoq_ray.models.training.data import Destination, Progress, TrainingSet
from ddoq_ray.models.training.phases import Phases
from ddoq_ray.models.training.ranks import Alone

# Of uint8 [3, S, S]; each draws its own operation, from torch's global generator.
AUGMENTATIONS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "randaugment": v2.RandAugment,
    "trivialaugment": v2.TrivialAugmentWide,
}
_WARM_UP = 0.1
_CHUNK = 1024  # images that are looked at together for their moments


def train_teacher(
    data: TrainingSet,
    out: Destination,
    config: TeacherTraining | None = None,
    *,
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a classifier and publish it as a folder, which `load_classifier` reads.

    Args:
        data: what it learns.
        out: the folder. A stopped training is kept in `<folder>.training`, and goes on from there to the same bytes on
            one CPU process.
        config: see `TeacherTraining`.
        device: where to train.
        on_progress: called with ("teacher", step, steps, loss) now and then.

    Returns:
        What config.json records under "training".

    Raises:
        ValueError: images and labels that do not fit, an existing folder, an unfinished training with other settings,
            or losses that are no numbers.
    """
    config = config or TeacherTraining()
    check_free(out.folder, overwrite=out.overwrite)
    data.check()
    order, digest = data.order()
    model = build_classifier(
        config.arch,
        len(data.classes),
        data.images.shape[-1],
        _moments(data.images),
        seed=config.seed,
        classes=data.classes,
    ).to(device)
    identity = {
        "options": asdict(config), "data": digest, "torch": str(torch.__version__), "device": torch.device(device).type,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    checkpoints = Checkpoints(out.folder, identity, overwrite=out.overwrite)
    phases = Phases(checkpoints, config.checkpoint_every, on_progress, Alone())
    phases.open()
    _train(model, data, order, config, phases)
    record: dict[str, Any] = {
        **identity,
        "images": len(order),
        "steps": phases.facts["teacher_steps"],
        "loss": phases.facts["teacher_losses"]["loss"],
        **out.extra,
    }
    if data.held_out is not None:
        scored, truth = (torch.from_numpy(np.array(part)) for part in data.held_out)
        record["held_out_images"] = len(scored)
        record["held_out_accuracy"], _ = top1_top5(model, scored, truth)
    save_classifier(model, out.folder, extra={"training": record}, dtype=config.dtype, overwrite=out.overwrite)
    phases.checkpoints.remove()
    return record


def _train(
    model: Classifier, data: TrainingSet, order: npt.NDArray[np.int64], config: TeacherTraining, phases: Phases
) -> None:
    """Train to the end, and leave the weights that are saved."""
    made = _Training(model, config)
    passes = Passes(len(order), config.batch, (config.seed, "teacher"))

    def step(number: int, rate: float) -> dict[str, float]:
        rows = order[passes.rows(number)]
        return made.step(data.images[rows], data.class_ids[rows], number, rate)

    seconds = None if config.minutes is None else 60 * config.minutes
    steps = max(2, config.epochs * len(order) // min(config.batch, len(order)))
    phases.run("teacher", made, step, phases.course("teacher", steps, seconds), config.lr, warm_up=_WARM_UP)
    made.average.apply()
    model.eval()


def _moments(images: np.ndarray) -> Normalisation:
    """Of uint8 [N, 3, S, S], some at a time: whole numbers are added up, so that their order changes nothing."""
    total, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
    for first in range(0, len(images), _CHUNK):
        part = np.asarray(images[first : first + _CHUNK], np.int64)
        total += part.sum(axis=(0, 2, 3))
        squares += np.square(part).sum(axis=(0, 2, 3))
    pixels = images.size // 3
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 0)) / 255
    return Normalisation(
        tuple(round(float(m) / 255, 7) for m in mean), tuple(round(max(float(d), 1e-3), 7) for d in std)
    )


class _Training(Resumable):
    """A classifier under training."""

    network: Classifier

    def __init__(self, model: Classifier, config: TeacherTraining) -> None:
        self.network, self.config, self.outputs = model, config, model.num_classes
        self.average = Average(model, config.ema)
        lr, decay = config.lr, config.weight_decay
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay, momentum=0.9, nesterov=True)
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
        cutmix = config.cutmix
        self.spec = ViewSpec(size=model.image_size, min_scale=config.min_scale, flip=config.flip, cutmix=cutmix)
        self.augment = AUGMENTATIONS[config.augment]() if config.augment != "none" else None

    def step(self, images: np.ndarray, class_ids: np.ndarray, number: int, rate: float) -> dict[str, float]:
        """One step at a learning rate on images uint8 [B, 3, S, S]; what it draws depends on its number alone."""
        model, config = self.network, self.config
        model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(philox(config.seed, "teacher step", number).integers(2**63)))
            pixels, shares = self._batch(torch.from_numpy(np.ascontiguousarray(images)), class_ids, number)
            # Entered anew in each step: weights that were cast once would not see the optimizer's steps.
            with arithmetic(pixels.device, config.precision):
                logits = model(pixels)
            loss = F.cross_entropy(logits.float(), shares, label_smoothing=config.label_smoothing)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        self.average.update(number)
        return {"loss": float(loss.detach())}

    def _batch(self, images: Tensor, class_ids: np.ndarray, number: int) -> tuple[Tensor, Tensor]:
        """Views float32 [B, 3, S, S] of a step, and the share of each class in them, float32 [B, C].

        Partners of CutMix and MixUp are of the same batch. The step stands for the epoch: a batch may straddle two
        passes, and no view may come twice.
        """
        config, device = self.config, next(self.network.parameters()).device
        if self.augment is not None:
            images = torch.stack([self.augment(image) for image in images])
        rows = np.arange(len(images))
        pixels, partner, kept = batch_views(images.to(device), rows, self.spec, config.seed, number)
        classes = torch.from_numpy(np.asarray(class_ids, np.int64)).to(device)
        own = F.one_hot(classes, self.outputs).float()
        share = torch.as_tensor(kept, dtype=torch.float32, device=device).unsqueeze(1)
        shares = share * own + (1 - share) * own[torch.as_tensor(partner, device=device).clamp_min(0)]
        if config.mixup:
            draw = philox(config.seed, "mixup", number)
            weight, other = float(draw.beta(config.mixup, config.mixup)), draw.permutation(len(images))
            there = torch.from_numpy(other).to(device)
            pixels = weight * pixels + (1 - weight) * pixels[there]
            shares = weight * shares + (1 - weight) * shares[there]
        return pixels, shares
