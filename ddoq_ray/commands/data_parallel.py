"""A training command on several workers: Ray Train starts them, each trains on its part of every batch.

What they share lies in the training's folder: images, latents, checkpoints, and how far rank 0 is, for the driver.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from ddoq_ray.commands.training_images import ReadImages
from ddoq_ray.config.cluster import ClusterConfig, TrainerResources
from ddoq_ray.config.network_training import TrainingCommand
from ddoq_ray.execution import signals
from ddoq_ray.execution.session import locate, may_grow, own_node, ray_session
from ddoq_ray.execution.workers import MAX_DEATHS, say
from ddoq_ray.models.training.checkpoints import CHECKPOINT, training_folder
from ddoq_ray.models.training.data import Progress, TrainingSet
from ddoq_ray.models.training.ranks import Ranks
from ddoq_ray.stages import demands
from ddoq_ray.stages.step import Ask
from ddoq_ray.stages.train import ranks as ray_ranks
from ddoq_ray.stages.train.fitting import RAY_TRAIN, fit
from ddoq_ray.storage.folder import Folder

TOLD = "told.json"  # in the training's folder: rank 0's last words
LOOK_SECONDS = 0.5

# Trains on images, among ranks, saying how far it is; gives what is recorded of it.
Train = Callable[[TrainingSet, Ranks, Progress], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """All that a worker is told; small and picklable.

    Attributes:
        prepare: loads what the command needs beside the images.
        command: its keys.
        images: where they lie.
    """

    prepare: Callable[[Any], Train]
    command: TrainingCommand
    images: ReadImages


def train_on_workers(name: str, job: Job, on_progress: Progress) -> dict[str, Any]:
    """Train on `command.workers` workers; what is recorded of it.

    Raises:
        ValueError: There is no room for them, or what one of them found that the user can mend.
    """
    command = with_whole_paths(job.command)
    gpus = 1.0 if command.device == "cuda" else 0.0
    threads = command.threads
    resources = TrainerResources(workers=command.workers, num_cpus=float(threads), num_gpus=gpus, threads=threads)
    cluster = ClusterConfig(address=command.address)
    where = locate(cluster)
    if where is None and not ray.is_initialized():
        check_room(resources, [own_node(cluster)])
    with ray_session(cluster, where), signals.own_ctrl_c():
        if not may_grow():
            check_room(resources, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        return fit_job(name, dataclasses.replace(job, command=command), resources, on_progress)


def fit_job(name: str, job: Job, resources: TrainerResources, on_progress: Progress) -> dict[str, Any]:
    """Train on workers of these resources, on the Ray that this process has joined."""
    folder = training_folder(job.command.out)
    told = folder / TOLD
    told.unlink(missing_ok=True)
    stop, seen = threading.Event(), [""]

    def look() -> None:
        text = told.read_text() if told.exists() else ""
        if text and text != seen[0]:
            seen[0] = text
            if "step" in (words := json.loads(text)):
                on_progress(words["phase"], words["step"], words["steps"], words["loss"])

    def watch() -> None:
        while not stop.wait(LOOK_SECONDS):
            look()

    def lost(reason: str, deaths: int) -> None:
        count = f"{deaths} of at most {MAX_DEATHS} before the next checkpoint"
        say(f"{name} a worker was lost ({count}: {reason}); goes on from the last one")

    own = Folder(str(folder)) / RAY_TRAIN
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        fit(train_loop, {"job": job}, resources, own, lost, reached=lambda: _saved_at(folder))
    finally:
        stop.set()
        watcher.join()
    facts: dict[str, Any] = json.loads(told.read_text())["facts"]
    return facts


def train_loop(settings: dict[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    job: Job = settings["job"]
    context = get_context()
    ranks = ray_ranks.Ranks(context.get_world_rank(), context.get_world_size(), get_device())
    torch.set_num_threads(job.command.threads)
    torch.backends.cudnn.benchmark = False
    told = training_folder(job.command.out) / TOLD
    # A worker died after the network was published: there is nothing left to do.
    if ranks.decide(lambda: told.exists() and "facts" in json.loads(told.read_text())):
        return

    def tell(phase: str, step: int, steps: int, loss: float | None) -> None:
        _write(told, {"phase": phase, "step": step, "steps": steps, "loss": loss})

    facts = job.prepare(job.command)(job.images.open(), ranks, tell)
    if ranks.rank == 0:
        _write(told, {"facts": facts})


def check_room(resources: TrainerResources, nodes: list[dict[str, float]]) -> None:
    """Refuse workers for which there is no room, and where none will come.

    Raises:
        ValueError: With what they need, and what is there.
    """
    ask = Ask("workers", resources.workers, resources.num_cpus, resources.num_gpus)
    if not demands.fits([ask], nodes):
        wanted = f"{resources.num_cpus:g} CPUs" + (f" and {resources.num_gpus:g} GPU" if resources.num_gpus else "")
        there = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ValueError(
            f"workers={resources.workers}: each takes {wanted} (threads, device), and Ray has {there}. Give fewer "
            "workers or threads, or the address of a cluster"
        )


def _saved_at(folder: Path) -> int:
    """When the last checkpoint was written; 0 where there is none."""
    file = folder / CHECKPOINT
    return file.stat().st_mtime_ns if file.exists() else 0


def with_whole_paths(command: Any) -> Any:
    """The command with paths that mean the same in every process of this machine."""
    paths = {}
    for key in ("out", "perceptual", "judge", "source", "through"):
        path = getattr(command, key, None)
        if path is not None and (key == "out" or os.path.isdir(path)):
            paths[key] = os.path.abspath(path)
    return dataclasses.replace(command, **paths)


def _write(file: Path, words: dict[str, Any]) -> None:
    work = file.with_suffix(".tmp")
    work.write_text(json.dumps(words))
    os.replace(work, file)
