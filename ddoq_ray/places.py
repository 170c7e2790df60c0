"""Where a run's files are: nowhere that is deleted behind it, and where every node that works sees them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddoq_ray.artifacts import Folder, local_path
from ddoq_ray.config import RunConfig
from ddoq_ray.runtime import waiting

_WORKING_COPY = f"{os.sep}runtime_resources{os.sep}working_dir_files{os.sep}"


def refuse_working_copy(path: str, key: str = "run_dir") -> None:
    """Refuse a place inside the copy of the working directory that Ray unpacks for a job, and deletes after it.

    Raises:
        ValueError: It is one.
    """
    if _WORKING_COPY in os.path.realpath(path) + os.sep:
        raise ValueError(
            f"{key}={path} lies in the job's copy of the working directory, which Ray deletes after the job: give "
            f"{key} as an absolute path or URL that outlives it and that all nodes see, such as /shared/runs/mine"
        )


@dataclass(frozen=True)
class Named:
    """A local path that a configuration names, and by which key."""

    key: str
    path: str


def named_paths(config: RunConfig) -> list[Named]:
    """The local files and folders that workers read, beside the run directory. Hub ids and URLs are none."""
    d = config.dataset
    given = {
        "dataset.path": d.path,
        "dataset.val_path": d.val_path,
        "dataset.classes": d.classes,
        "prior.path": config.prior.path,
        "encoder.path": config.encoder.path,
        "teacher.path": config.teacher.path,
        "latents.path": config.latents.path,
    }
    named = []
    for key, path in given.items():
        if path is None or "://" in local_path(path) or path.startswith(("shipped:", "torchvision:")):
            continue
        fixed = local_path(path)
        for sign in "*?[{":
            fixed = fixed.partition(sign)[0]
        if fixed != local_path(path):
            fixed = os.path.dirname(fixed)
        if key.endswith(("prior.path", "encoder.path", "teacher.path")) and not os.path.exists(fixed):
            continue  # a hub id
        if fixed:
            named.append(Named(key, os.path.abspath(fixed)))
    return named


def check_nodes(config: RunConfig, run: Folder) -> None:
    """Before work starts: does every node that can work see the run directory, and what the configuration names?

    Raises:
        ValueError: Naming each node that does not, and what it does not see.
    """
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
    if len(nodes) < 2:
        return
    token = f".seen-{uuid.uuid4().hex[:8]}"
    wanted = named_paths(config)
    if run.local:
        run.publish(token, b"")
        wanted = [Named("run_dir", run.path(token)), *wanted]
    try:
        refs = [
            _unseen.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)
            ).remote([w.path for w in wanted])
            for n in nodes
        ]
        with waiting("ray", "a look around on each node"):
            answers = ray.get(refs, timeout=120)
    except ray.exceptions.GetTimeoutError:
        raise ValueError(
            f"not all of the {len(nodes)} nodes answered within 120 s to whether they see run_dir and the data; look "
            "at the cluster (ray status), then run again"
        ) from None
    finally:
        if run.local:
            run.remove(token)
    problems = unseen_words(
        [n["NodeManagerHostname"] + f" ({n['NodeManagerAddress']})" for n in nodes], wanted, answers
    )
    if problems:
        raise ValueError(
            "not every node sees what this run needs:\n  "
            + "\n  ".join(problems)
            + "\nMount the same place on all nodes, or give a URL that all can read (s3://, gs://)"
        )


def unseen_words(nodes: Sequence[str], wanted: Sequence[Named], answers: Sequence[Sequence[int]]) -> list[str]:
    """A line for each node that does not see all; `answers`: of each node the numbers of what it does not see."""
    lines = []
    for node, missing in zip(nodes, answers, strict=True):
        if missing:
            shown = [
                f"{wanted[i].key} ({os.path.dirname(wanted[i].path) if wanted[i].key == 'run_dir' else wanted[i].path})"
                for i in missing
            ]
            lines.append(f"{node} does not see {', '.join(shown)}")
    return lines


@ray.remote
def _unseen(paths: list[str]) -> list[int]:
    return [i for i, path in enumerate(paths) if not os.path.exists(path)]
