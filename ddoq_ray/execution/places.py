"""Where results and inputs are: not where Ray deletes them, and seen by every node that works."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddoq_ray.config import RunConfig
from ddoq_ray.data.collections import kind_of
from ddoq_ray.execution.console import doing, say
from ddoq_ray.execution.ending import Onlooker
from ddoq_ray.execution.workers import DEATHS
from ddoq_ray.storage import layout
from ddoq_ray.storage.folder import TEMPORARY, Folder

LEFT: tuple[type[BaseException], ...] = (*DEATHS, ray.exceptions.TaskUnschedulableError)  # a node that has just left
LOOK_SECONDS = 60.0  # for a node to answer
LATE_SECONDS = 5.0  # between two looks for nodes that have joined
LIBRARIES = ("torch", "diffusers", "numpy", "pillow")
_MODULE = re.compile(r"No module named '([\w.]+)'")
_PACKAGES = {"working_dir_files", "py_modules_files"}  # under a Ray session's runtime_resources
_SESSION = re.compile(r"session_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d+_\d+")

T = TypeVar("T")
Named = tuple[str, str]  # configuration key, local path


def check_lasting(path: str, key: str) -> None:
    """Refuse a folder that goes when the job ends, or that only this process sees.

    Args:
        path: Where results will be written.
        key: The key that says so, for the message.

    Raises:
        ValueError: When it is inside a Ray job's working copy or a Ray session's own files, or in a process's memory.
    """
    folder = Folder(path)
    if folder.uri.startswith("memory:"):
        raise ValueError(
            f"{key}={path} is the memory of this process, which no worker sees and which ends with it: give a folder "
            "of a disk, s3://... or gs://..."
        )
    if not folder.local:
        return
    real = Path(os.path.realpath(folder.uri))
    parts = set(real.parts)
    copy = os.environ.get("RAY_RUNTIME_ENV_CREATE_WORKING_DIR")
    inside = "runtime_resources" in parts and bool(parts & _PACKAGES)
    inside = inside or (bool(copy) and real.is_relative_to(os.path.realpath(str(copy))))
    if inside:
        what = "the working copy of a Ray job, which Ray deletes when the job has ended"
    elif any(_SESSION.fullmatch(part) for part in real.parts):
        what = "a Ray session's own files, which are deleted with it"
    else:
        return
    raise ValueError(
        f"{key}={path} is {real}, inside {what}: give {key} as a whole path that lasts and that all nodes see, such as "
        f"{key}=/shared/{PurePosixPath(path).name or 'run'} or s3://bucket/{PurePosixPath(path).name or 'run'}"
    )


def check_apart(config: RunConfig) -> None:
    """Refuse a run directory and data that lie so in one another that one would be taken, or swept, for the other.

    Raises:
        ValueError: When what the run writes would be found among the images, or the images lie where it writes.
    """
    run = Folder(config.folder)
    if not run.local:
        return
    mine = Path(os.path.realpath(run.uri))
    walked = config.dataset.path is not None and kind_of(config.dataset) in ("imagefolder", "parquet")
    for key, path in (("dataset.path", config.dataset.path), ("dataset.val_path", config.dataset.val_path)):
        folder = None if path is None else Folder(fixed_part(path))
        if folder is None or not folder.local:
            continue
        place = Path(os.path.realpath(folder.uri))
        if walked and mine.is_relative_to(place) and not (mine / layout.DATA / layout.MANIFEST).exists():
            raise ValueError(
                f"run_dir={config.folder} lies inside {key}={path}, where what the run writes would be taken for "
                "images: choose a run_dir outside"
            )
        if place.is_relative_to(mine / layout.DATA):
            raise ValueError(
                f"{key}={path} lies in data/ of run_dir={config.folder}, where this run writes its own: choose another "
                "run_dir"
            )


def named_paths(config: RunConfig) -> list[Named]:
    """The local inputs that the configuration names, as far as they are there on this machine."""
    given = {
        "dataset.path": config.dataset.path,
        "dataset.val_path": config.dataset.val_path,
        "dataset.classes": config.dataset.classes,
        "latents.path": config.latents.path,
        "images.path": config.images.path,
        "prior.path": config.prior.path,
        "encoder.path": config.encoder.path,
        "synthesizer.judge": config.synthesizer.judge,
    }
    found = []
    for key, path in [*given.items(), *(("teacher.path", path) for path in config.teacher.paths)]:
        if path is None or "://" in path:
            continue
        place = os.path.abspath(fixed_part(path))
        if os.path.exists(place):  # else it is a hub id, shipped:NAME, or a mistake that has words of its own
            found.append((key, place))
    return found


def fixed_part(pattern: str) -> str:
    """The folder in front of a glob or brace pattern.

    >>> fixed_part("/data/train-{0000..0009}.tar"), fixed_part("/data/a.tar")
    ('/data', '/data/a.tar')
    """
    parts = list(PurePosixPath(pattern).parts)
    for i, part in enumerate(parts):
        if set(part) & set("*?[{"):
            return str(PurePosixPath(*parts[:i])) if i else "."
    return pattern


def unseen(run: Folder, token: str, named: Sequence[Named]) -> list[Named]:
    """What this machine does not see: the run directory (the file `token` in it), and the inputs."""
    missing = [(key, path) for key, path in named if not os.path.exists(path)]
    try:
        seen = run.exists(token)
    except Exception:  # a store that this machine cannot reach or read
        seen = False
    return missing if seen else [("run_dir", run.uri), *missing]


def complaint(found: Iterable[tuple[str, Sequence[Named]]]) -> str:
    """Words for the nodes that miss something; empty when none does."""
    words = [
        f"node {node} does not see {' and '.join(f'{key} ({path})' for key, path in missing)}"
        for node, missing in found
        if missing
    ]
    if not words:
        return ""
    more = f"; so do {len(words) - 4} more nodes" if len(words) > 4 else ""
    return (
        f"{'; '.join(words[:4])}{more}. Every node must see these under the same path: put them on a shared file "
        "system or an object store (s3://, gs://), or leave that node out of the cluster"
    )


def check_nodes(run: Folder, named: Sequence[Named]) -> None:
    """On a cluster of several nodes, one small task a node sees whether what the run needs is there.

    Raises:
        ValueError: Naming the nodes that do not see the run directory or an input.
    """
    if sum(node["Alive"] for node in ray.nodes()) < 2:
        return
    with doing("nodes"):
        complaints = _looked_at(_workers(), run, named)
    if complaints:
        raise ValueError(complaints)


class LateNodes(Onlooker):
    """Has the nodes that join while a run is at work looked at as `check_nodes` does those that are there.

    On a cluster that grows from nothing these are all of them. What a worker on one without the shared disk publishes
    would go to a folder of that name on its own.
    """

    error, code, every_s = ValueError, 2, LATE_SECONDS

    def __init__(self, run: Folder, named: Sequence[Named], own_session: bool) -> None:
        super().__init__(own_session)
        self.run, self.named = run, named
        self._known = {node["NodeID"] for node in _workers()}

    def look(self) -> str:
        with contextlib.suppress(ray.exceptions.RayError, RuntimeError, OSError, ValueError):  # head or disk are away
            late = [node for node in _workers() if node["NodeID"] not in self._known]
            if late and _looked_at(late, self.run, self.named):
                time.sleep(LATE_SECONDS)  # a disk that is busy is asked once more
                return _looked_at(late, self.run, self.named)
            self._known |= {node["NodeID"] for node in late}
        return ""


def _workers() -> list[dict[str, Any]]:
    """The nodes to which work comes."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]


def _looked_at(nodes: Sequence[dict[str, Any]], run: Folder, named: Sequence[Named]) -> str:
    """`complaint` of these nodes, or that one of them lacks the package."""
    token = f".seen-{os.getpid()}-{time.time_ns()}{TEMPORARY}"
    run.publish(token, b"")
    try:
        found = list(each_node(nodes, look_here, run, token, named))
    except ValueError as error:  # one has not even what asks it
        return str(error)
    finally:
        run.remove(token)
    for line in unlike([(node, versions) for node, (_, versions) in found], versions_here()):
        say(line)
    return complaint((node, missing) for node, (missing, _) in found)


def look_here(run: Folder, token: str, named: Sequence[Named]) -> tuple[list[Named], dict[str, str]]:
    """What this machine does not see, and its versions."""
    return unseen(run, token, named), versions_here()


def versions_here() -> dict[str, str]:
    """The libraries that bytes follow from, as this process has them."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def unlike(nodes: Iterable[tuple[str, Mapping[str, str]]], here: Mapping[str, str]) -> list[str]:
    """A line for each node whose versions are others than the driver's, which manifests name.

    >>> unlike([("a", {"torch": "2.13"}), ("b", {"torch": "2.12"})], {"torch": "2.13"})
    ['nodes      b has torch 2.12, and this process 2.13: its bytes may be others, and manifests name this process']
    """
    lines = []
    for node, there in nodes:
        other = [name for name in here if there.get(name) != here[name]]
        if other:
            told = ", ".join(f"{name} {there.get(name, 'not at all')}" for name in other)
            ours = ", ".join(here[name] for name in other)
            more = "its bytes may be others, and manifests name this process"
            lines.append(f"nodes      {node} has {told}, and this process {ours}: {more}")
    return lines


def each_node(nodes: Sequence[dict[str, Any]], task: Callable[..., T], *given: Any) -> Iterator[tuple[str, T]]:
    """(node in words, what a small task that asks for no CPU says there), as far as it says so in a minute.

    Args:
        nodes: As `ray.nodes` has them.
        task: Picklable; called with `given`.

    Raises:
        ValueError: A node lacks a module that it needs.
    """
    look = ray.remote(num_cpus=0, max_retries=0)(task)
    refs = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)).remote(
            *given
        ): f"{n['NodeManagerHostname']} ({n['NodeManagerAddress']})"
        for n in nodes
    }
    ready, late = ray.wait(list(refs), num_returns=len(refs), timeout=LOOK_SECONDS)
    for ref in late:
        say(f"nodes      {refs[ref]} has not answered in {LOOK_SECONDS:.0f} s; the run goes on")
        ray.cancel(ref)
    for ref in ready:
        try:
            said = ray.get(ref)
        except LEFT:
            continue  # it has just left
        except ray.exceptions.RayTaskError as error:
            if lacking := _MODULE.search(str(error)):
                raise ValueError(
                    f"node {refs[ref]} has no module {lacking[1]}: every node needs the libraries of requirements.lock "
                    "(cluster/README.md) and this package, which `ray job submit --working-dir .` brings along"
                ) from None
            raise
        yield refs[ref], said
