"""Ranks of a student in processes of their own: a module by itself, since each of them imports it."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from support.students import small_job

from ddoq_ray.stages.train.ranks import Ranks
from ddoq_ray.stages.train.worker import Trainer
from ddoq_ray.storage.artifact import Artifact

# The last is what optimizers import with their first step.
SLOW_TO_IMPORT = ["ddoq_ray.stages.train.worker", "ddoq_ray.models.training.student", "torch._dynamo"]
KEYS = ("protocol.batch=5", "protocol.optimizer=sgd", "protocol.steps=6", "cluster.trainer.micro_batch=3")


def _rank(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    job = small_job(Path(folder) / str(rank), *KEYS)
    (row, facts) = job.rows[0]
    artifact = Artifact(job.run / row.folder, "train")
    Trainer(job, Ranks(rank, world, torch.device("cpu"))).one_row(row, artifact, facts, None)
    torch.distributed.destroy_process_group()


def _some_epochs(rank: int, world: int, folder: str, epochs: int) -> None:
    """Go on from the state in the folder's parent, if there is one, and leave it there; note each step's images."""
    from ddoq_ray.models.training.student import learning_rate

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    job = small_job(Path(folder) / str(rank), *KEYS)
    left = Path(folder).parent / "state.pt"
    state = torch.load(left, weights_only=False) if left.exists() else None
    trainer = Trainer(job, Ranks(rank, world, torch.device("cpu")))
    student = trainer._begin(job.rows[0][0], state)
    training, seen = student.training, []
    parts_of = training.parts

    def noted(batch: Any) -> Any:
        parts = parts_of(batch)
        seen.append((student.epoch, [i for part in parts if part.counts for i in part.index.tolist()]))
        return parts

    training.parts = noted  # type: ignore[method-assign]
    for _ in range(epochs):
        rate = learning_rate(job.config.protocol, student.epoch, student.epochs)
        training.train_epoch(rate, trainer._targets(student))
    (Path(folder) / f"seen-{rank}.json").write_text(json.dumps(seen))
    trainer.ranks.decide(lambda: 0)  # all have read the state
    if rank == 0:
        torch.save({"metrics": [], **training.state()}, left)
    torch.distributed.destroy_process_group()


def train_in_parts(folder: Path, parts: list[tuple[int, int]]) -> tuple[list[tuple[int, list[int]]], dict[str, Any]]:
    """The small job's student in parts of (ranks, epochs), each from the state that the one before has left.

    Returns:
        (epoch, images) of every step, over all ranks; and the state at the end.
    """
    folder.mkdir()
    steps = []
    for number, (world, epochs) in enumerate(parts):
        place = folder / str(number)
        place.mkdir()
        _in_processes(_some_epochs, [(rank, world, str(place), epochs) for rank in range(world)])
        each = [json.loads((place / f"seen-{rank}.json").read_text()) for rank in range(world)]
        for same in zip(*each, strict=True):
            assert len({epoch for epoch, _ in same}) == 1
            steps.append((same[0][0], sorted(image for _, images in same for image in images)))
    return steps, torch.load(folder / "state.pt", weights_only=False)


def train(folder: Path, world: int) -> Path:
    """The small job's student, trained by so many ranks over gloo; the folder of rank 0's."""
    folder.mkdir()
    _in_processes(_rank, [(rank, world, str(folder)) for rank in range(world)])
    return folder / "0" / "students/s-t-p-8px-seed0"


def _in_processes(work: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_TO_IMPORT)
    ranks = [context.Process(target=work, args=given) for given in arguments]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0
