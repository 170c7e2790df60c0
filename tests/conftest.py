"""What several test files share: one Ray a module, and small corpora of real digits."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddoq_ray.data.collections import DIGIT_NAMES, digits
from ddoq_ray.data.samples import encode_png
from ddoq_ray.data.tar_writing import write_tar

_processes: list[str] = []  # Python processes that were started since the running test began


def _note_processes(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen":
        program = Path(os.fsdecode(arguments[0] or "")).name
        if program.startswith(("python", "ray", "ddoq-ray")):
            _processes.append(" ".join(map(str, arguments[1])))


sys.addaudithook(_note_processes)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share this process's Ray run first, one after another: starting it costs seconds."""
    for item in items:
        if "ray_here" in getattr(item, "fixturenames", ()):
            item.add_marker("processes")
            item.add_marker("ray")
    items.sort(key=lambda item: "ray_here" not in getattr(item, "fixturenames", ()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _processes.clear()


@pytest.fixture(autouse=True)
def processes_are_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that starts Python or Ray says so, or `make test-fast` would not be fast."""
    yield
    marked = any(request.node.get_closest_marker(mark) for mark in ("processes", "slow", "assets"))
    assert marked or not _processes, f"mark this test with @pytest.mark.processes: it started {_processes[0][:200]}"


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the shared Ray with its last test: even idle it takes CPU from the tests that start their own.

    No other: a folder's own cluster has this process for its driver.
    """
    shared = [x is not None and "ray_here" in getattr(x, "fixturenames", ()) for x in (item, nextitem)]
    if shared == [True, False]:
        import ray

        ray.shutdown()


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """A Ray of two CPUs in this process, shared by all modules that ask for it: starting one costs seconds.

    address="local", so that no other Ray on the machine is joined.
    """
    import ray
    import ray.data

    # What Ray measures of itself takes time of all its processes: seldom, but for what runs report, which a test reads.
    os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
    os.environ.setdefault("RAY_metrics_report_interval_ms", "4000")  # Ray's is ten seconds
    # Ray ends a process that had no task for a second, where there are more than CPUs; the next task starts another.
    os.environ.setdefault("RAY_num_workers_soft_limit", "8")
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # else pages of it in every failure
    ray.data.DataContext.get_current().enable_progress_bars = False
    if not ray.is_initialized():
        # A GPU in name only: what asks Ray for one is placed, and finds none.
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(address="local", num_cpus=2, num_gpus=1, **quiet)
    yield
    gc.collect()  # what an error's traceback refers to in circles may be actors that hold a CPU


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is known of networks is kept for the tests' time, and nothing of the user's is read or written."""
    before = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for name, library in (("HF_HOME", "huggingface"), ("TORCH_HOME", "torch")):  # theirs stay where they are
        os.environ.setdefault(name, str(before / library))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def digit_members() -> list[list[tuple[str, bytes]]]:
    """The 1,000 training digits, each as the members of its sample; classes are mixed."""
    images, class_ids = digits()["train"]
    samples = zip(images, class_ids, strict=True)
    return [[(f"d{i:04d}.png", encode_png(x)), (f"d{i:04d}.cls", str(c).encode())] for i, (x, c) in enumerate(samples)]


@pytest.fixture(scope="session")
def write_corpus(digit_members: list[list[tuple[str, bytes]]]) -> Callable[..., Path]:
    """write_corpus(folder, shards, per_shard): mixed digits in tars, with their classes.json; returns the folder."""

    def write(folder: Path, shards: int, per_shard: int) -> Path:
        folder.mkdir(parents=True)
        for shard, indices in enumerate(np.arange(shards * per_shard).reshape(shards, per_shard)):
            members = [member for i in indices for member in digit_members[i]]
            (folder / f"digits-{shard:03d}.tar").write_bytes(write_tar(members))
        (folder / "classes.json").write_text(json.dumps(DIGIT_NAMES))
        return folder

    return write
