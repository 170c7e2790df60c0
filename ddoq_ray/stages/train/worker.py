"""A worker of the training run: it keeps the decoded image sets and trains the students one after another.

How one is trained is in `models/training/student.py`. Within a row the workers resume from the last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ddoq_ray.config import RunConfig
from ddoq_ray.data.soft_labels import SoftLabels
from ddoq_ray.stages.cells import Cell
from ddoq_ray.stages.evaluate.validation import Refused, Validation, load_scored
from ddoq_ray.stages.train import state as train_state
from ddoq_ray.stages.train.dealing import Dealing
from ddoq_ray.stages.train.memory import Room, room_here
from ddoq_ray.stages.train.ranks import Ranks
from ddoq_ray.stages.train.sets import Real, Sets
from ddoq_ray.stages.train.state import Student
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder

if TYPE_CHECKING:  # torch: only in the worker
    from torch import Tensor

    from ddoq_ray.models.classifiers import Classifier
    from ddoq_ray.models.ensemble import Teacher
    from ddoq_ray.models.training.student import StudentTraining, Targets

# A report with a checkpoint is a barrier that costs about two seconds; a row that is shorter is simply trained again.
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """All that the training workers of a group are told; small and picklable."""

    run: Folder
    config: RunConfig
    rows: tuple[tuple[Cell, dict[str, Any]], ...]
    real: Real
    validation: Validation
    teacher_index: tuple[int, ...]
    class_counts: tuple[int, ...]
    outputs: int
    group: int = 0


class Trainer:
    """One worker of the training run, with what it has read for the rows of a job."""

    def __init__(
        self, job: Job, ranks: Ranks, clock: Callable[[], float] = time.monotonic, room: Room | None = None
    ) -> None:
        import torch

        self.job, self.config, self.ranks, self.clock = job, job.config, ranks, clock
        self.protocol, self.how = job.config.protocol, job.config.cluster.trainer
        self.device = ranks.device
        torch.set_num_threads(self.how.threads)
        torch.backends.cudnn.benchmark = False
        self.columns = torch.tensor(job.teacher_index, device=self.device)
        self.sets = Sets(job.run, job.config, len(job.teacher_index), ranks, room or Room(), job.group)
        self._labels: tuple[str, SoftLabels] | None = None
        self.teacher: Teacher | None = None
        self._val: tuple[Tensor, Tensor] | None = None
        self.reported = clock()

    def row(self, number: int, resume: dict[str, Any] | None) -> None:
        """Train a row, unless it is published; `resume` is the checkpoint that the group's workers began with."""
        row, facts = self.job.rows[number]
        artifact = Artifact(self.job.run / row.folder, "train")
        # What rank 0 sees published is what all skip: on a shared disk another rank may see it seconds later.
        if not self.ranks.decide(lambda: artifact.manifest() is not None):
            self.one_row(row, artifact, facts, self._resumed(resume, facts))

    def take_over(self, before: Trainer) -> None:
        """Keep what the trainer of the job before has read, where it is the same: the images that are scored."""
        size = self.config.student.image_size
        if before.job.validation == self.job.validation and before.config.student.image_size == size:
            self._val = before._val

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
        from ddoq_ray.models.training.student import learning_rate

        start = time.time()
        student = self._begin(row, state, facts.get("images"))
        points = train_state.eval_epochs(self.protocol, student.epochs)
        training = student.training
        while student.epoch < student.epochs and not student.diverged:
            rate = learning_rate(self.protocol, student.epoch, student.epochs)
            loss = training.train_epoch(rate, self._targets(student))
            student.diverged = not math.isfinite(loss)
            if student.diverged or student.epoch not in points:
                continue
            top1, top5 = self.evaluate(training)
            point = {"lr": rate, "train_loss": loss, "top1_pct": top1, "top5_pct": top5}
            student.metrics.append({"epoch": student.epoch, **point})
            # One clock's word: whoever reports waits for all the others to report too.
            due = self.ranks.decide(lambda: self.clock() - self.reported > CHECKPOINT_SECONDS)
            if due and student.epoch < student.epochs:
                self._checkpoint(student, facts)
        # The last step may have been the one: its weights were never put to a loss.
        student.diverged = student.diverged or not self.ranks.decide(training.finite)
        if self.ranks.rank == 0:
            train_state.publish(student, artifact, facts, self.config, time.time() - start)

    def _begin(self, row: Cell, state: dict[str, Any] | None, digest: object = None) -> Student:
        from ddoq_ray.core.losses import image_weights
        from ddoq_ray.core.transfers import on_device
        from ddoq_ray.models.protocol_views import view_spec
        from ddoq_ray.models.training.student import StudentTraining

        found = self.sets.get(row.images, self.job.real, digest)
        across = self.config.weights
        weights = image_weights(
            found.weights,
            found.class_ids,
            row.scheme,
            across.across_classes,
            np.asarray(self.job.class_counts, np.float64),
            across.normalize,
        )
        model = self._student(row.seed)
        training = StudentTraining(
            model=model,
            wrapped=self._wrap(model),
            images=found.images,
            weights=on_device(weights.astype(np.float32), self.device),
            protocol=self.protocol,
            spec=view_spec(self.protocol, self.config.student.image_size),
            seed=row.seed,
            view_seed=self.config.seed,
            ranks=self.ranks,
            how=self.how,
            cutmix_weight=across.cutmix,
        )
        epochs = self.protocol.epochs_for(len(found.images), full=row.images is None)
        student = Student(row, found, training, epochs)
        if state is not None:
            training.restore(state)
            student.metrics = state["metrics"]
        return student

    def _targets(self, student: Student) -> Targets:
        """What the student is to answer in the epoch that comes: classes, stored labels, or the teacher's own."""
        from ddoq_ray.core.transfers import on_device
        from ddoq_ray.models.ensemble import load_teacher
        from ddoq_ray.models.training.student import HardTargets, StoredTargets, TeacherTargets

        if self.config.labels.mode == "hard":
            outputs = np.asarray(self.job.teacher_index, np.int64)[student.set.class_ids]
            return HardTargets(on_device(outputs, self.device), self.job.outputs)
        labels = student.row.labels
        if labels is not None:
            if self._labels is None or self._labels[0] != labels:
                self._labels = (labels, SoftLabels(self.job.run / labels))
            stored = self._labels[1]
            student.training.view_epochs = stored.store.grid.epochs
            packed = stored.epoch(student.epoch % stored.store.grid.epochs)
            return StoredTargets(lambda index: stored.decode(packed[index], self.device))
        if self.teacher is None:
            paths = self.config.teacher.paths
            assert paths, "a student has no stored labels, and there is no teacher"
            self.teacher = load_teacher(paths, self.device, self.protocol.temperature)
        return TeacherTargets(self.teacher)

    def _student(self, seed: int) -> Classifier:
        from ddoq_ray.models.training.student import build_student

        return build_student(self.config.student, self.job.outputs, seed).to(self.device)

    def _wrap(self, model: Any) -> Any:
        import torch

        from ddoq_ray.models.compiling import check_compiler

        if self.how.compile:
            check_compiler("cluster.trainer.compile")
        called = torch.compile(model) if self.how.compile else model
        if self.ranks.world == 1:
            return called
        ids = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(called, device_ids=ids)

    def evaluate(self, training: StudentTraining) -> tuple[float, float]:
        """(top-1, top-5) in % on the real validation images, over the classes of the data.

        Each rank scores its own images; what is added up are counts, so that their number changes nothing.
        """
        import torch

        from ddoq_ray.core.metrics import top_pct
        from ddoq_ray.models.accuracy import correct_counts

        if self._val is None:
            mine = self.job.validation.of_rank(self.ranks.rank, self.ranks.world)
            images, class_ids = load_scored(mine, self.config.student.image_size, Refused())
            self._val = (torch.from_numpy(images), torch.from_numpy(class_ids))
            if self.device.type != "cpu" and self.sets.fits_device(images.nbytes):
                self._val = (self._val[0].to(self.device), self._val[1].to(self.device))
        self.ranks.share_buffers(training.model)
        with training.scored() as model:
            correct = correct_counts(model, *self._val, self.columns)
        scored = torch.tensor([len(self._val[1])], device=correct.device)
        top1, top5, seen = self.ranks.total(torch.cat([correct, scored]))
        return top_pct(top1, seen), top_pct(top5, seen)

    def _checkpoint(self, student: Student, facts: dict[str, Any]) -> None:
        """Hand the row's state to Ray Train, which gives it back after a failure."""
        train_state.report(student, facts, self.ranks.rank)
        self.reported = self.clock()


def train_rows(
    jobs: Sequence[Job], dealing: Dealing, ranks: Ranks, clock: Callable[[], float] = time.monotonic
) -> None:
    """Train what a group is dealt of its jobs' rows, one after another."""
    group = jobs[0].group
    resume = train_state.latest(ranks.device)
    ranks.decide(lambda: dealing.begin(group, None if resume is None else resume.get("identity")))
    trainer: Trainer | None = None
    while (dealt := ranks.decide(lambda: dealing.next(group))) is not None:
        job = jobs[dealt.job]
        if trainer is None or trainer.job is not job:
            before, trainer = trainer, Trainer(job, ranks, clock, room_here(job.config.cluster.trainer))
            if before is not None:
                before.sets.close()
                trainer.take_over(before)
        trainer.row(dealt.row, resume)
    if trainer is not None:
        trainer.sets.close()


def train_loop(settings: dict[str, Any]) -> None:
    """What Ray Train runs in each worker of a group."""
    from ray.train import get_context
    from ray.train.torch import get_device

    context = get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), get_device())
    train_rows(settings["jobs"], settings["dealing"], ranks)
