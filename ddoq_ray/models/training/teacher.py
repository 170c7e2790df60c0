"""Train a classifier on real images, as teacher, alone or as one of several ranks that share each batch.

Teachers label views, so they are trained on the kind of views that `core.views` renders (crop, flip, CutMix). In memory
are the images of one step: all others may lie in a file.

Shape suffixes: N images, B batch, b of them on this rank, C classes, S image size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from ddoq_ray.config.network_training import TeacherTraining
from ddoq_ray.core.metrics import top_pct
from ddoq_ray.core.rng import philox
from ddoq_ray.core.transfers import on_device
from ddoq_ray.core.views.params import Int64, ViewSpec, view_params
from ddoq_ray.models.accuracy import correct_counts
from ddoq_ray.models.classifiers import Classifier, Normalisation, build_classifier, save_classifier
from ddoq_ray.models.folders import check_free
from ddoq_ray.models.training.averaging import Average, Resumable
from ddoq_ray.models.training.checkpoints import Checkpoints, machine
from ddoq_ray.models.training.course import Passes, arithmetic
from ddoq_ray.models.training.data import Destination, Progress, TrainingSet
from ddoq_ray.models.training.images import views_among, with_partners
from ddoq_ray.models.training.phases import Phases
from ddoq_ray.models.training.ranks import Alone, Part, Ranks, check_parts, descend

# Of uint8 [3, S, S]; each draws its own operation, from torch's global generator.
AUGMENTATIONS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "randaugment": v2.RandAugment,
    "trivialaugment": v2.TrivialAugmentWide,
}
_WARM_UP = 0.1
_CHUNK = 2**20  # values that are looked at together for their moments: 8 MB as whole numbers
_SCORED = 500  # held-out images of a forward pass


def train_teacher(
    data: TrainingSet,
    out: Destination,
    config: TeacherTraining | None = None,
    *,
    ranks: Ranks | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a classifier and publish it as a folder, which `load_classifier` reads.

    Args:
        data: what it learns.
        out: the folder. A stopped training is kept in `<folder>.training`, and goes on from there to the same bytes on
            one CPU process.
        config: see `TeacherTraining`.
        ranks: who trains it, and where: this process alone, or every rank by a call of its own.
        on_progress: called with ("teacher", step, steps, loss) now and then.

    Returns:
        What config.json records under "training". Rank 0 alone publishes; the others give nothing.

    Raises:
        ValueError: images and labels that do not fit, an existing folder, an unfinished training with other settings,
            or losses that are no numbers.
    """
    config, ranks = config or TeacherTraining(), ranks or Alone()
    check_free(out.folder, overwrite=out.overwrite)
    data.check()
    check_parts(len(data.images), config.batch, ranks.world, "training.batch", least=2)
    order, digest = data.order()
    model = build_classifier(
        config.arch,
        len(data.classes),
        data.images.shape[-1],
        ranks.decide(lambda: _moments(data.images)),
        seed=config.seed,
        classes=data.classes,
    ).to(torch.device(ranks.device))
    versions = {"torch": str(torch.__version__), **machine(ranks)}
    identity = {"options": asdict(config), "data": digest, **versions}
    checkpoints = Checkpoints(out.folder, identity, overwrite=out.overwrite)
    phases = Phases(checkpoints, config.checkpoint_every, on_progress, ranks)
    phases.open()
    _train(model, data, order, config, phases)
    if ranks.rank:
        return {}
    record: dict[str, Any] = {
        **identity,
        "images": len(order),
        "steps": phases.facts["teacher_steps"],
        "loss": phases.facts["teacher_losses"]["loss"],
        **out.extra,
    }
    if data.held_out is not None:
        record["held_out_images"] = len(data.held_out[0])
        record["held_out_accuracy"] = _top1_pct(model, *data.held_out)
    save_classifier(model, out.folder, extra={"training": record}, dtype=config.dtype, overwrite=out.overwrite)
    phases.checkpoints.remove()
    return record


def _train(
    model: Classifier, data: TrainingSet, order: npt.NDArray[np.int64], config: TeacherTraining, phases: Phases
) -> None:
    """Train to the end, and leave the weights that are saved."""
    made = _Training(model, data, config)
    passes = Passes(len(order), config.batch, (config.seed, "teacher"))

    def step(number: int, rate: float) -> dict[str, float]:
        rows = order[passes.rows(number)]
        return made.step(rows, number, rate, Part(len(rows), phases.ranks))

    seconds = None if config.minutes is None else 60 * config.minutes
    steps = max(2, config.epochs * len(order) // min(config.batch, len(order)))
    phases.run("teacher", made, step, phases.course("teacher", steps, seconds), config.lr, warm_up=_WARM_UP)
    made.average.apply()
    model.eval()


def _top1_pct(model: Classifier, images: npt.NDArray[np.uint8], class_ids: npt.NDArray[np.integer]) -> float:
    """Accuracy on images uint8 [N, 3, S, S], some at a time: all of them may lie in a file."""
    right = 0
    for first in range(0, len(images), _SCORED):
        some = slice(first, first + _SCORED)
        pixels, truth = (torch.from_numpy(np.array(part[some])) for part in (images, class_ids))
        right += int(correct_counts(model, pixels, truth, batch=_SCORED)[0])
    return top_pct(right, len(images))


def _moments(images: np.ndarray) -> Normalisation:
    """Of uint8 [N, 3, S, S], some at a time: whole numbers are added up, so that their order changes nothing."""
    total, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
    step = max(1, _CHUNK // images[0].size)
    for first in range(0, len(images), step):
        part = np.asarray(images[first : first + step], np.int64)
        total += part.sum(axis=(0, 2, 3))
        squares += np.square(part).sum(axis=(0, 2, 3))
    pixels = images.size // 3
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 0)) / 255
    return Normalisation(
        tuple(round(float(m) / 255, 7) for m in mean), tuple(round(max(float(d), 1e-3), 7) for d in std)
    )


class _Training(Resumable):
    """A classifier under training; each rank has a copy."""

    network: Classifier

    def __init__(self, model: Classifier, data: TrainingSet, config: TeacherTraining) -> None:
        self.network, self.data, self.config, self.outputs = model, data, config, model.num_classes
        self.average = Average(model, config.ema)
        lr, decay = config.lr, config.weight_decay
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay, momentum=0.9, nesterov=True)
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
        cutmix = config.cutmix
        self.spec = ViewSpec(size=model.image_size, min_scale=config.min_scale, flip=config.flip, cutmix=cutmix)
        self.augment = AUGMENTATIONS[config.augment]() if config.augment != "none" else None

    def step(self, rows: Int64, number: int, rate: float, part: Part) -> dict[str, float]:
        """One step at a learning rate on images int64 [B] of the data; what it draws depends on its number alone.

        Random layers are drawn by each rank for its own part of the batch.
        """
        model, config = self.network, self.config
        model.train()
        with torch.random.fork_rng(devices=[]):
            pixels, shares = self._batch(rows, number, part)
            # Before there were ranks there was no rank in the key.
            own = (part.ranks.rank,) if part.ranks.rank else ()
            torch.manual_seed(int(philox(config.seed, "teacher step", number, *own).integers(2**63)))
            # Entered anew in each step: weights that were cast once would not see the optimizer's steps.
            with arithmetic(pixels.device, config.precision):
                logits = model(pixels)
            loss = F.cross_entropy(logits.float(), shares, label_smoothing=config.label_smoothing)
            descend(loss, self.optimizer, rate, part)
        self.average.update(number)
        return part.told({"loss": loss})

    def _batch(self, rows: Int64, number: int, part: Part) -> tuple[Tensor, Tensor]:
        """Views float32 [b, 3, S, S] of this rank's part of a step, and each class's share in them, float32 [b, C].

        Partners of CutMix and MixUp are of the same batch, the whole of it. The step stands for the epoch: a batch may
        straddle two passes, and no view may come twice.
        """
        config, device = self.config, next(self.network.parameters()).device
        mine, weight, other = part.of(np.arange(len(rows))), 1.0, None
        if config.mixup:
            draw = philox(config.seed, "mixup", number)
            weight, other = float(draw.beta(config.mixup, config.mixup)), draw.permutation(len(rows))
        seen = mine if other is None else np.unique(np.concatenate([mine, other[mine]]))  # by this rank
        shape = (len(rows), *self.data.images.shape[2:])
        params_of = partial(view_params, self.spec, config.seed, number, stored=shape)
        params = params_of(seen)
        held = with_partners(seen, params)
        images = np.ascontiguousarray(self.data.images[rows[held]])
        views = views_among(self._augmented(images, held, number), held, seen, params, params_of, self.spec.size)
        classes = torch.from_numpy(np.asarray(self.data.class_ids[rows], np.int64))
        own = F.one_hot(classes, self.outputs).float().to(device)
        share = on_device(params.lam.astype(np.float32), device).unsqueeze(1)
        shares = share * own[on_device(seen, device)] + (1 - share) * own[on_device(params.partner.clip(0), device)]
        pixels = views.pixels
        if other is not None:
            here, there = (on_device(np.searchsorted(seen, at), device) for at in (mine, other[mine]))
            pixels = weight * pixels[here] + (1 - weight) * pixels[there]
            shares = weight * shares[here] + (1 - weight) * shares[there]
        return pixels, shares

    def _augmented(self, images: npt.NDArray[np.uint8], places: Int64, number: int) -> Tensor:
        """Images uint8 [n, 3, S, S] of these places in a batch on the device, each augmented by a key of its own."""
        device = next(self.network.parameters()).device
        if self.augment is None:
            return on_device(images, device)
        made = []
        for image, place in zip(torch.from_numpy(images), places.tolist(), strict=True):
            torch.manual_seed(int(philox(self.config.seed, "augment", number, place).integers(2**63)))
            made.append(self.augment(image))
        return torch.stack(made).to(device)
