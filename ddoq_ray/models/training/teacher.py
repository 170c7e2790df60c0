"""Train a classifier on real images, as teacher or as the full-data baseline, in one process.

Teachers label views, so they are trained on the kind of views that `core.views` renders (crop, flip, CutMix).

Shape suffixes: N images, B batch, C classes, S image size.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddoq_ray.config.network_training import TeacherTraining
from ddoq_ray.core.views.params import ViewSpec
from ddoq_ray.core.views.render import batch_views
from ddoq_ray.models.accuracy import top1_top5
from ddoq_ray.models.classifiers import Classifier, Normalisation, build_classifier, save_classifier
from ddoq_ray.models.folders import check_free
from ddoq_ray.models.training.course import batches, one_cycle
from ddoq_ray.models.training.data import Destination, Progress, TrainingSet

_REPORT_EVERY = 20


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
        out: the folder.
        config: see `TeacherTraining`.
        device: where to train.
        on_progress: called with ("teacher", step, steps, loss) now and then.

    Returns:
        What config.json records under "training".

    Raises:
        ValueError: images and labels that do not fit, or an existing folder.
    """
    config = config or TeacherTraining()
    check_free(out.folder, overwrite=out.overwrite)
    data.check()
    order, _ = data.order()
    images, class_ids = data.images[order], data.class_ids[order]
    model = build_classifier(
        config.arch, len(data.classes), images.shape[-1], _moments(images), seed=config.seed, classes=data.classes
    ).to(device)
    loss = _train(model, images, class_ids, config, on_progress)
    record: dict[str, Any] = {
        "options": asdict(config),
        "images": len(images),
        "loss": loss,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **out.extra,
    }
    if data.held_out is not None:
        scored, truth = (torch.from_numpy(np.array(part)) for part in data.held_out)
        record["held_out_images"] = len(scored)
        record["held_out_accuracy"], _ = top1_top5(model, scored, truth)
    save_classifier(model, out.folder, extra={"training": record}, dtype=config.dtype, overwrite=out.overwrite)
    return record


def _moments(images: np.ndarray) -> Normalisation:
    """Of uint8 [N, 3, S, S]: one channel at a time, since float64 copies of all would be eight times the set."""
    moments = [(float(images[:, c].mean() / 255), float(images[:, c].std() / 255)) for c in range(3)]
    return Normalisation(
        tuple(round(mean, 7) for mean, _ in moments), tuple(round(max(std, 1e-3), 7) for _, std in moments)
    )


def _train(
    model: Classifier,
    images: np.ndarray,
    class_ids: np.ndarray,
    config: TeacherTraining,
    on_progress: Progress | None,
) -> float:
    """The running loss after the last step; the images go to the model's device."""
    device = model.mean.device
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    labels = torch.from_numpy(np.ascontiguousarray(class_ids)).long().to(device)
    steps = max(2, config.epochs * len(pixels) // min(config.batch, len(pixels)))
    lr, decay, parameters = config.lr, config.weight_decay, model.parameters()
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=lr, weight_decay=decay, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    schedule = one_cycle(optimizer, config.lr, steps, warm_up=0.1)
    spec = ViewSpec(size=images.shape[-1], min_scale=config.min_scale, flip=config.flip, cutmix=config.cutmix)
    generator = torch.Generator().manual_seed(config.seed)
    running = 0.0
    model.train()
    for step, index in enumerate(batches(len(pixels), config.batch, steps, generator), start=1):
        # The step stands for the epoch: a batch may straddle two passes, and no view may come twice.
        x, partner, kept = batch_views(pixels, index.numpy(), spec, config.seed, step)
        logits = model(x)
        loss = _cross_entropy(logits, labels[index.to(device)], config.label_smoothing)
        if config.cutmix:
            share = torch.as_tensor(kept, dtype=torch.float32, device=device)
            other = torch.as_tensor(partner, device=device).clamp_min(0)
            loss = share * loss + (1 - share) * _cross_entropy(logits, labels[other], config.label_smoothing)
        loss = loss.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if on_progress is not None and (step % _REPORT_EVERY == 0 or step == steps):
            on_progress("teacher", step, steps, running)
    model.eval()
    return running


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
