"""A worker of the training run: it keeps the decoded image sets and trains the students one after another.

Batches are cut from one global order an epoch, keyed by (seed, epoch), so the sequence of images does not depend on the
number of workers; within a row the workers resume from the last checkpoint.
"""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddoq_ray.artifacts import Artifact, Folder
from ddoq_ray.config import RunConfig
from ddoq_ray.config.training import ProtocolConfig
from ddoq_ray.records import StudentRow
from ddoq_ray.stages.label import for_teacher, read_labels, view_spec


@dataclass(frozen=True)
class Job:
    """All that a training worker is told; small and picklable."""

    run: Folder
    config: RunConfig
    rows: tuple[tuple[StudentRow, dict[str, Any]], ...]
    train_urls: tuple[str, ...]
    val_urls: tuple[str, ...]
    teacher_index: tuple[int, ...]
    class_counts: tuple[int, ...]
    outputs: int
    codec: str


# A report with a checkpoint is a barrier that costs about two seconds; a row that is shorter is simply trained again.
CHECKPOINT_SECONDS = 60.0


def learning_rate(protocol: ProtocolConfig, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch (constant within it), as D4M's and the paper's scripts step it."""
    if protocol.schedule == "cosine":
        return protocol.lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if protocol.schedule == "step":
        return protocol.lr * protocol.step_factor ** sum(epoch >= at for at in protocol.step_at)
    return protocol.lr


def eval_epochs(protocol: ProtocolConfig, epochs: int) -> set[int]:
    """Epochs (1-based) after which the validation curve has a point; always the last."""
    every = protocol.eval_every or max(1, epochs // 10)
    return {*range(every, epochs + 1, every), epochs}


class _Trainer:
    """One worker of the training run: it keeps the decoded image sets and goes through the rows."""

    def __init__(self, job: Job) -> None:
        import torch
        from ray.train import get_context
        from ray.train.torch import get_device

        self.job, self.config = job, job.config
        self.protocol = job.config.protocol
        self.rank, self.world = get_context().get_world_rank(), get_context().get_world_size()
        self.device = get_device()
        torch.set_num_threads(job.config.cluster.trainer.threads)
        torch.backends.cudnn.benchmark = False
        self.columns = torch.tensor(job.teacher_index, device=self.device)
        self.teacher: Any = None
        self._sets: dict[str, Any] = {}
        self._labels: dict[tuple[str, int], Any] = {}
        self._val: Any = None
        self._codec: Any = None
        self.reported = time.monotonic()

    def all_rows(self) -> None:
        resume = _load_checkpoint(self.device)
        for row, facts in self.job.rows:
            artifact = Artifact(self.job.run / row.folder, "train")
            if artifact.manifest() is not None:
                continue
            state = resume if resume is not None and resume["folder"] == row.folder else None
            self.one_row(row, artifact, facts, state)

    def one_row(
        self, row: StudentRow, artifact: Artifact, facts: dict[str, Any], state: dict[str, Any] | None
    ) -> dict[str, Any]:
        import torch

        from ddoq_ray.core.losses import image_weights, weighted_kl
        from ddoq_ray.core.views import batch_views, epoch_order

        start = time.time()
        protocol, config = self.protocol, self.config
        arrays, images = self._set(row)
        weights = image_weights(
            arrays.weights,
            arrays.class_ids,
            row.scheme,
            config.weights.across_classes,
            np.asarray(self.job.class_counts, np.float64),
        )
        loss_weights = torch.from_numpy(weights).float().to(self.device)
        model = self._student(row.seed)
        wrapped = self._wrap(model)
        optimizer = _optimizer(protocol, model)
        spec = view_spec(protocol, config.student.image_size)
        n = len(images)
        epochs = protocol.epochs_for(n, full=row.images == "data")
        points = eval_epochs(protocol, epochs)
        metrics: list[dict[str, float]] = []
        first_epoch = 0
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first_epoch, metrics = state["epoch"], state["metrics"]
        for epoch in range(first_epoch, epochs):
            rate = learning_rate(protocol, epoch, epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            order = epoch_order(row.seed, epoch, n)
            packed = self._epoch_labels(row, epoch)
            model.train()
            total = 0.0
            for first in range(0, n, protocol.batch):
                batch = order[first : first + protocol.batch]
                mine = batch[self.rank :: self.world]
                if len(mine):
                    pixels, _, _ = batch_views(images, mine, spec, config.seed, epoch)
                    target = self._targets(pixels, packed, mine)
                    loss = weighted_kl(
                        wrapped(pixels),
                        target,
                        loss_weights[torch.from_numpy(mine).to(self.device)],
                        protocol.temperature,
                    )
                    # DDP averages over ranks: scaled so that the average is the mean over the global batch.
                    loss = loss * (len(mine) * self.world / len(batch))
                else:
                    loss = wrapped(images[:1].float() / 255).sum() * 0.0
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += float(loss.detach()) * len(batch)
            if epoch + 1 in points:
                top1, top5 = self.evaluate(model)
                metrics.append(
                    {"epoch": epoch + 1, "lr": rate, "train_loss": total / n, "top1_pct": top1, "top5_pct": top5}
                )
                if epoch + 1 < epochs and time.monotonic() - self.reported > CHECKPOINT_SECONDS:
                    self._checkpoint(row, epoch + 1, model, optimizer, metrics)
        best = max(metrics, key=lambda m: m["top1_pct"])
        result = {
            "method": row.method,
            "ipc": config.ipc,
            "student": config.student.arch,
            "seed": row.seed,
            "epochs": epochs,
            "train_images": n,
            "best_top1_pct": best["top1_pct"],
            "best_epoch": best["epoch"],
            "seconds": round(time.time() - start, 3),
            "items": n * epochs,
            "unit": "views",
            "bytes": 0,
        }
        if self.rank == 0:
            import safetensors.torch

            tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
            weights_file = safetensors.torch.save(tensors)
            result["bytes"] = len(weights_file)
            folder = artifact.folder
            folder.publish("model.safetensors", weights_file)
            folder.publish("config.json", (json.dumps(model.config(), indent=1) + "\n").encode())
            folder.publish("metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics).encode())
            artifact.finish(facts, **result)
        return result

    def _student(self, seed: int) -> Any:
        from ddoq_ray.core.rng import philox
        from ddoq_ray.models.classifiers import IMAGENET_MEAN, IMAGENET_STD, build_classifier

        key = int(philox("student", seed).integers(2**31))
        student = self.config.student
        return build_classifier(
            student.arch, self.job.outputs, student.image_size, IMAGENET_MEAN, IMAGENET_STD, seed=key
        ).to(self.device)

    def _wrap(self, model: Any) -> Any:
        if self.world == 1:
            return model
        import torch

        ids = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def _set(self, row: StudentRow) -> tuple[Any, Any]:
        """The row's images, decoded once at the student's resolution: (arrays, uint8 tensor on the device)."""
        import torch

        from ddoq_ray.distilled import ImageArrays, load_image_arrays
        from ddoq_ray.samples import load_arrays

        if row.images not in self._sets:
            self._sets.clear()  # one set at a time: rows of a set follow one another
            size = self.config.student.image_size
            if row.images == "data":
                classes, resize = len(self.job.teacher_index), self.config.encoder.resize
                pixels, class_ids, _ = load_arrays(self.job.train_urls, size, classes, resize=resize)
                per_class = np.bincount(class_ids, minlength=len(self.job.teacher_index))
                arrays = ImageArrays(pixels, class_ids, 1.0 / per_class[class_ids])
            else:
                images = self.job.run / row.images
                arrays = load_image_arrays([images.path(name) for name in images.names("images-*.tar")], size)
            self._sets[row.images] = (arrays, torch.from_numpy(arrays.images).to(self.device))
        return self._sets[row.images]

    def _epoch_labels(self, row: StudentRow, epoch: int) -> Any:
        """The stored labels of an epoch; None when the teacher labels online."""
        if row.labels is None:
            return None
        key = (row.labels, epoch)
        if key not in self._labels:
            if self._labels and next(iter(self._labels))[0] != row.labels:
                self._labels.clear()
            self._labels[key] = read_labels(self.job.run / row.labels, epoch)
        return self._labels[key]

    def _targets(self, pixels: Any, packed: Any, index: np.ndarray) -> Any:
        import torch

        if packed is None:
            teacher = self._teacher()
            with torch.no_grad():
                return teacher(for_teacher(pixels, teacher.image_size))
        if self._codec is None:
            from ddoq_ray.core.labels import make_codec

            teacher = self._teacher() if self.job.codec == "features" else None
            dim = teacher.head.in_features if teacher is not None else None
            self._codec = (make_codec(self.job.codec, self.job.outputs, dim), teacher.head if teacher else None)
        codec, head = self._codec
        with torch.no_grad():
            return codec.decode(packed[index], head).to(self.device)

    def _teacher(self) -> Any:
        from ddoq_ray.models.classifiers import load_classifier

        if self.teacher is None:
            self.teacher = load_classifier(self.config.teacher.path, self.device)
        return self.teacher

    def evaluate(self, model: Any) -> tuple[float, float]:
        """(top-1, top-5) in % on the real validation images, over the classes of the data."""
        import torch

        from ddoq_ray.samples import load_arrays
        from ddoq_ray.stages.evaluate import accuracy

        if self._val is None:
            size, resize = self.config.student.image_size, self.config.encoder.resize
            classes = len(self.job.teacher_index)
            images, class_ids, _ = load_arrays(self.job.val_urls, size, classes, resize=resize)
            self._val = (torch.from_numpy(images).to(self.device), torch.from_numpy(class_ids).to(self.device))
        return accuracy(model, *self._val, self.columns)

    def _checkpoint(self, row: StudentRow, epoch: int, model: Any, optimizer: Any, metrics: list) -> None:
        """Hand the row's state to Ray Train, which gives it back after a failure."""
        import ray.train
        import torch

        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self.rank == 0:
                state = {
                    "folder": row.folder,
                    "epoch": epoch,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "metrics": metrics,
                }
                torch.save(state, os.path.join(folder, "state.pt"))
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"row": row.folder, "epoch": epoch}, checkpoint=checkpoint)
        self.reported = time.monotonic()


def _load_checkpoint(device: Any) -> dict[str, Any] | None:
    import ray.train
    import torch

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder, open(os.path.join(folder, "state.pt"), "rb") as f:
        return torch.load(io.BytesIO(f.read()), map_location=device)


def _optimizer(protocol: ProtocolConfig, model: Any) -> Any:
    """AdamW or SGD; weight decay on matrices and filters only, as D4M's script separates them."""
    import torch

    decay = [p for p in model.parameters() if p.ndim > 1]
    plain_ = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": protocol.weight_decay}, {"params": plain_, "weight_decay": 0.0}]
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=protocol.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=protocol.lr)


def train_loop(settings: dict[str, Any]) -> None:
    """What Ray Train runs in each worker: train the job's rows."""
    _Trainer(settings["job"]).all_rows()
