"""A student's points of the validation curve, its checkpoint with Ray Train, and what is published of it in the end."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ddoq_ray.config import RunConfig
from ddoq_ray.config.training import ProtocolConfig
from ddoq_ray.stages.cells import Cell
from ddoq_ray.stages.train.sets import Set
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact, digest_of

if TYPE_CHECKING:  # torch: only where a student is trained
    from ddoq_ray.models.training.student import StudentTraining


@dataclass
class Student:
    """A row while it is trained."""

    row: Cell
    set: Set
    training: StudentTraining
    epochs: int
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    diverged: bool = False

    @property
    def epoch(self) -> int:
        """Finished ones."""
        return self.training.epoch


def eval_epochs(protocol: ProtocolConfig, epochs: int) -> set[int]:
    """Epochs (1-based) after which the validation curve has a point; always the last."""
    every = protocol.eval_every or max(1, epochs // 10)
    return {*range(every, epochs + 1, every), epochs}


def report(student: Student, facts: dict[str, Any], rank: int) -> None:
    """Give Ray Train the student's state: a barrier for all ranks, to which rank 0 brings the file.

    It carries the digest of the row's identity: after `overwrite=true` the same folder is another student.
    """
    import ray.train
    import torch

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            state = {
                "identity": digest_of(facts),
                "metrics": student.metrics,
                **student.training.state(),
            }
            torch.save(state, os.path.join(folder, "state.pt"))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"row": student.row.folder, "epoch": student.epoch}, checkpoint=checkpoint)


def latest(device: Any) -> dict[str, Any] | None:
    """The state that was reported last, in this run or in one that was cut off."""
    import ray.train
    import torch

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder, open(os.path.join(folder, "state.pt"), "rb") as f:
        state: dict[str, Any] = torch.load(io.BytesIO(f.read()), map_location=device)
    return state


def publish(student: Student, artifact: Artifact, facts: dict[str, Any], config: RunConfig, seconds: float) -> None:
    """The student's files, its manifest last. Of one that diverged there are no weights, which nobody could use."""
    import safetensors.torch

    points = student.metrics
    best = max(points, key=lambda m: m["top1_pct"]) if points and not student.diverged else None
    folder, size = artifact.folder, 0
    if not student.diverged:
        with student.training.scored() as model:
            tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
            weights = safetensors.torch.save(tensors)
        size = len(weights)
        folder.publish(layout.WEIGHTS, weights)
    folder.publish(layout.NETWORK, (json.dumps(student.training.model.config(), indent=1) + "\n").encode())
    lines = [json.dumps(m, allow_nan=False) + "\n" for m in points]
    folder.publish(layout.METRICS, "".join(lines).encode())
    images = len(student.set.images)
    artifact.finish(
        facts,
        method=student.row.method,
        ipc=config.ipc,
        student=config.student.arch,
        seed=student.row.seed,
        epochs=student.epochs,
        train_images=images,
        refused_images=student.set.refused,
        best_top1_pct=best["top1_pct"] if best else None,
        best_epoch=best["epoch"] if best else None,
        diverged=student.diverged,
        diverged_epoch=student.epoch if student.diverged else None,
        seconds=round(seconds, 3),
        items=images * student.epoch,
        unit="views",
        bytes=size,
    )
