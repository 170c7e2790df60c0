"""A worker of the training run: it keeps the decoded image sets and trains the students one after another.

Batches are cut from one global order an epoch, keyed by (seed, epoch), so the sequence of images does not depend on the
number of workers; within a row the workers resume from the last checkpoint. Random layers (dropout, stochastic depth)
draw from generators that are seeded anew each epoch by (student's seed, epoch, rank), so that a row that is resumed, or
that follows another row, draws what it would have drawn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ddoq_ray.config import RunConfig
from ddoq_ray.stages.cells import Cell
from ddoq_ray.stages.evaluate.validation import Validation
from ddoq_ray.stages.label.step import for_teacher, view_spec
from ddoq_ray.stages.train import state as train_state
from ddoq_ray.stages.train.ranks import Ranks, share
from ddoq_ray.stages.train.sets import Sets, SoftLabels
from ddoq_ray.stages.train.state import Student
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder

# A report with a checkpoint is a barrier that costs about two seconds; a row that is shorter is simply trained again.
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """All that a training worker is told; small and picklable."""

    run: Folder
    config: RunConfig
    rows: tuple[tuple[Cell, dict[str, Any]], ...]
    train_urls: tuple[str, ...]
    validation: Validation
    teacher_index: tuple[int, ...]
    class_counts: tuple[int, ...]
    outputs: int


class Trainer:
    """One worker of the training run: it goes through the rows."""

    def __init__(self, job: Job, ranks: Ranks, clock: Callable[[], float] = time.monotonic) -> None:
        import torch

        self.job, self.config, self.ranks, self.clock = job, job.config, ranks, clock
        self.protocol = job.config.protocol
        self.device = ranks.device
        torch.set_num_threads(job.config.cluster.trainer.threads)
        torch.backends.cudnn.benchmark = False
        self.columns = torch.tensor(job.teacher_index, device=self.device)
        self.sets = Sets(job.run, job.config, len(job.teacher_index), self.device)
        self.labels = SoftLabels(job.run, job.outputs, self.device)
        self.teacher: Any = None
        self._val: Any = None
        self.reported = clock()

    def all_rows(self) -> None:
        rows = self.job.rows
        artifacts = [Artifact(self.job.run / row.folder, "train") for row, _ in rows]
        resume = train_state.latest(self.device)
        # What rank 0 sees published is what all skip: on a shared disk another rank may see it seconds later.
        done = self.ranks.decide(lambda: [a.manifest() is not None for a in artifacts])
        for (row, facts), artifact, finished in zip(rows, artifacts, done, strict=True):
            if not finished:
                self.one_row(row, artifact, facts, self._resumed(resume, facts))

    def _resumed(self, state: dict[str, Any] | None, facts: dict[str, Any]) -> dict[str, Any] | None:
        """The checkpoint, where it is of exactly this row: same folder, configuration and inputs."""
        wanted = digest_of(facts)
        mine = state["epoch"] if state is not None and state.get("identity") == wanted else None
        epoch = self.ranks.decide(lambda: mine)
        if epoch is None:
            return None
        if epoch != mine:
            raise RuntimeError(f"rank {self.ranks.rank} has a checkpoint of epoch {mine}, and rank 0 one of {epoch}")
        return state

    def one_row(self, row: Cell, artifact: Artifact, facts: dict[str, Any], state: dict[str, Any] | None) -> None:
        """Train and publish one student; it ends early where the loss is no longer a finite number."""
        start = time.time()
        student = self._begin(row, state)
        points = train_state.eval_epochs(self.protocol, student.epochs)
        while student.epoch < student.epochs and not student.diverged:
            rate = train_state.learning_rate(self.protocol, student.epoch, student.epochs)
            loss = self._epoch(student, rate)
            student.diverged = not math.isfinite(loss)
            student.epoch += 1
            if student.diverged or student.epoch not in points:
                continue
            top1, top5 = self.evaluate(student.model)
            point = {"lr": rate, "train_loss": loss, "top1_pct": top1, "top5_pct": top5}
            student.metrics.append({"epoch": student.epoch, **point})
            # One clock's word: whoever reports waits for all the others to report too.
            due = self.ranks.decide(lambda: self.clock() - self.reported > CHECKPOINT_SECONDS)
            if due and student.epoch < student.epochs:
                self._checkpoint(student, facts)
        # The last step may have been the one: its weights were never put to a loss.
        student.diverged = student.diverged or not self.ranks.decide(lambda: _finite(student.model))
        if self.ranks.rank == 0:
            train_state.publish(student, artifact, facts, self.config, time.time() - start)

    def _begin(self, row: Cell, state: dict[str, Any] | None) -> Student:
        import torch

        from ddoq_ray.core.losses import image_weights

        found = self.sets.get(row.images, self.job.train_urls)
        weights = image_weights(
            found.weights,
            found.class_ids,
            row.scheme,
            self.config.weights.across_classes,
            np.asarray(self.job.class_counts, np.float64),
        )
        model = self._student(row.seed)
        student = Student(
            row=row,
            set=found,
            loss_weights=torch.from_numpy(weights).float().to(self.device),
            model=model,
            wrapped=self._wrap(model),
            optimizer=train_state.optimizer(self.protocol, model),
            epochs=self.protocol.epochs_for(len(found.images), full=row.images is None),
        )
        if state is not None:
            model.load_state_dict(state["model"])
            student.optimizer.load_state_dict(state["optimizer"])
            student.epoch, student.metrics = state["epoch"], state["metrics"]
        return student

    def _epoch(self, student: Student, rate: float) -> float:
        """Train one epoch; its mean loss, or the first one that is not finite."""
        import torch

        from ddoq_ray.core.rng import philox
        from ddoq_ray.core.views.params import epoch_order

        for group in student.optimizer.param_groups:
            group["lr"] = rate
        key = philox("random layers", student.row.seed, student.epoch, self.ranks.rank)
        torch.manual_seed(int(key.integers(2**63)))
        order = epoch_order(student.row.seed, student.epoch, len(student.set.images))
        packed = self.labels.read(student.row.labels, student.epoch) if student.row.labels else None
        student.model.train()
        total = 0.0
        for first in range(0, len(order), self.protocol.batch):
            batch = order[first : first + self.protocol.batch]
            loss = self.loss(student, batch, packed)
            student.optimizer.zero_grad()
            loss.backward()
            student.optimizer.step()
            mean = self.ranks.mean(loss.detach())
            if not math.isfinite(mean):
                return mean
            total += mean * len(batch)
        return total / len(order)

    def loss(self, student: Student, batch: npt.NDArray[np.int64], packed: Any) -> Any:
        """This rank's part of the loss of a batch; its mean over the ranks is the mean over the batch."""
        import torch

        from ddoq_ray.core.losses import weighted_kl
        from ddoq_ray.core.views.render import batch_views

        mine = share(batch, self.ranks.rank, self.ranks.world)
        spec = view_spec(self.protocol, self.config.student.image_size)
        looked_at = mine if len(mine) else np.repeat(batch[:1], 2)
        pixels, _, _ = batch_views(student.set.images, looked_at, spec, self.config.seed, student.epoch)
        logits = student.wrapped(pixels)
        if not len(mine):  # it has no image, but DDP's collectives want its (zero) gradients
            return logits.sum() * 0.0
        weights = student.loss_weights[torch.from_numpy(mine).to(self.device)]
        loss = weighted_kl(logits, self._targets(student, pixels, packed, mine), weights, self.protocol.temperature)
        return loss * (len(mine) * self.ranks.world / len(batch))

    def _targets(self, student: Student, pixels: Any, packed: Any, index: npt.NDArray[np.int64]) -> Any:
        import torch

        if packed is not None:
            return self.labels.decode(student.row.labels, packed[index])
        if self.teacher is None:
            from ddoq_ray.models.classifiers import load_classifier

            self.teacher = load_classifier(self.config.teacher.path, self.device)
        with torch.no_grad():
            return self.teacher(for_teacher(pixels, self.teacher.image_size))

    def _student(self, seed: int) -> Any:
        from ddoq_ray.core.rng import philox
        from ddoq_ray.models.classifiers import IMAGENET_MEAN, IMAGENET_STD, build_classifier

        key = int(philox("student", seed).integers(2**31))
        student = self.config.student
        return build_classifier(
            student.arch, self.job.outputs, student.image_size, IMAGENET_MEAN, IMAGENET_STD, seed=key
        ).to(self.device)

    def _wrap(self, model: Any) -> Any:
        if self.ranks.world == 1:
            return model
        import torch

        ids = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def evaluate(self, model: Any) -> tuple[float, float]:
        """(top-1, top-5) in % on the real validation images, over the classes of the data."""
        import torch

        from ddoq_ray.stages.evaluate.validation import Refused, accuracy, load_scored

        if self._val is None:
            images, class_ids = load_scored(self.job.validation, self.config.student.image_size, Refused())
            self._val = (torch.from_numpy(images).to(self.device), torch.from_numpy(class_ids).to(self.device))
        return accuracy(model, *self._val, self.columns)

    def _checkpoint(self, student: Student, facts: dict[str, Any]) -> None:
        """Hand the row's state to Ray Train, which gives it back after a failure."""
        train_state.report(student, facts, self.ranks.rank)
        self.reported = self.clock()


def _finite(model: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in model.state_dict().values() if t.is_floating_point())


def train_loop(settings: dict[str, Any]) -> None:
    """What Ray Train runs in each worker: train the job's rows."""
    from ray.train import get_context
    from ray.train.torch import get_device

    context = get_context()
    Trainer(settings["job"], Ranks(context.get_world_rank(), context.get_world_size(), get_device())).all_rows()
