"""Ranks of a student in processes of their own: a module by itself, since each of them imports it."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import torch
from support.students import small_job

from ddoq_ray.stages.train.ranks import Ranks
from ddoq_ray.stages.train.worker import Trainer
from ddoq_ray.storage.artifact import Artifact

SLOW_TO_IMPORT = ["ddoq_ray.stages.train.worker", "ddoq_ray.models.training.student"]
KEYS = ("protocol.batch=5", "protocol.optimizer=sgd", "protocol.steps=6", "cluster.trainer.micro_batch=3")


def _rank(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    job = small_job(Path(folder) / str(rank), *KEYS)
    (row, facts) = job.rows[0]
    artifact = Artifact(job.run / row.folder, "train")
    Trainer(job, Ranks(rank, world, torch.device("cpu"))).one_row(row, artifact, facts, None)
    torch.distributed.destroy_process_group()


def train(folder: Path, world: int) -> Path:
    """The small job's student, trained by so many ranks over gloo; the folder of rank 0's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_TO_IMPORT)
    folder.mkdir()
    ranks = [context.Process(target=_rank, args=(rank, world, str(folder))) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0
    return folder / "0" / "students/s-t-p-8px-seed0"
