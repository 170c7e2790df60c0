"""Training under Ray Train: ranks with unlike clocks, a worker that dies, an error that is the user's to mend."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.cloudpickle
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from support.students import EPOCHS, small_job

from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Events
from ddoq_ray.stages.train import step as train
from ddoq_ray.stages.train import worker as train_worker
from ddoq_ray.stages.train.ahead import Load
from ddoq_ray.stages.train.dealing import Dealer, Dealt, SharedDealer
from ddoq_ray.stages.train.ranks import Ranks
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.prepared import Data

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test's module

PATIENCE = 300  # of torch's half an hour


def shared(jobs: list[train_worker.Job], groups: int) -> list[list[Dealt]]:
    return train.dealt(jobs, [Load(cell.folder, "net", 1) for job in jobs for cell, _ in job.rows], groups)


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here")]


def _shifted(settings: dict[str, Any]) -> None:
    from ray.train import get_context
    from ray.train.torch import get_device

    rank = get_context().get_world_rank()
    ranks = Ranks(rank, get_context().get_world_size(), get_device())
    start = time.monotonic()
    # Rank 0's minute is over at every look, rank 1's never; or the other way round.
    hurried = rank == settings["hurried"]
    clock = iter(range(0, 10**9, 100)).__next__ if hurried else lambda: start
    train_worker.train_rows([settings["job"]], Dealer([[Dealt(0, 0)]]), ranks, clock)


@pytest.mark.parametrize("hurried", [0, 1])
def test_two_workers_with_unlike_clocks_train_a_student(tmp_path: Path, hurried: int) -> None:
    """Each asking its own clock, one would wait in the report's barrier and the other in a collective.

    A collective that waits for `PATIENCE` seconds fails the run. By the test's own clock nothing can be said: Ray's
    workers start at the lowest priority, and a busy machine takes minutes for it.
    """
    job = small_job(tmp_path / "run")
    trainer = TorchTrainer(
        _shifted,
        train_loop_config={"job": job, "hurried": hurried},
        torch_config=TorchConfig(timeout_s=PATIENCE),
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(name="train", storage_path=str(tmp_path / "students")),
    )
    found = trainer.fit()
    manifest = Artifact(job.run / job.rows[0][0].folder, "train").require()
    assert manifest["epochs"] == EPOCHS and not manifest["diverged"]
    assert (found.checkpoint is not None) == (hurried == 0)


def test_students_side_by_side_are_those_of_one_after_another(tmp_path: Path) -> None:
    """Two groups of one worker on two CPUs; a group whose labels are gone lets the other finish, and says so."""
    made, whole = small_job(tmp_path / "one", "cluster.trainer.num_cpus=0.5"), []
    (row, facts) = made.rows[0]
    rows = tuple((dataclasses.replace(row, seed=seed), facts) for seed in (0, 1, 2))
    networks = Networks("prior", (1,), 8, None, 2, "teacher", "net", None, 2, 6, {})
    for name, groups in (("one", 1), ("two", 2)):
        job = dataclasses.replace(small_job(tmp_path / name, "cluster.trainer.num_cpus=0.5"), rows=rows)
        run = Run(job.config, job.run, Data(job.run, (), (), ()), networks, Events(job.run))
        shares = shared([job], groups)
        assert [len(share) for share in shares] == ([3] if groups == 1 else [2, 1])
        train._fit(run, [job], shares)
        whole.append([job.run.read(f"{cell.folder}/model.safetensors") for cell, _ in rows])
        assert not job.run.names("students/train*")
    assert whole[0] == whole[1] and len(set(whole[0])) == 3
    lost = (dataclasses.replace(row, seed=3, labels="nowhere"), facts)
    more = dataclasses.replace(job, rows=(lost, (dataclasses.replace(row, seed=4), facts)))
    with pytest.raises(ValueError, match="nowhere"):
        train._fit(run, [more], shared([more], 2))
    assert Artifact(job.run / more.rows[1][0].folder, "train").manifest() is not None


def test_a_slow_group_holds_up_no_student_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first group, on a node as slow as can be, trains one of the three that were dealt to it."""
    made = small_job(tmp_path / "run", "cluster.trainer.num_cpus=0.5")
    (row, facts) = made.rows[0]
    cells = [dataclasses.replace(row, seed=seed) for seed in range(4)]
    job = dataclasses.replace(made, rows=tuple((cell, facts) for cell in cells))
    networks = Networks("prior", (1,), 8, None, 2, "teacher", "net", None, 2, 6, {})
    run = Run(job.config, job.run, Data(job.run, (), (), ()), networks, Events(job.run))
    monkeypatch.setattr(train, "train_loop", _first_group_waits)
    train._fit(run, [job], [[Dealt(0, i) for i in range(3)], [Dealt(0, 3)]])
    done = [Path(job.run.path(f"{cell.folder}/manifest.json")).stat().st_mtime for cell in cells]
    assert max(done) == done[0] and done[2] < done[1]  # from the end: neighbours stay together


def test_a_dealer_that_is_killed_deals_again() -> None:
    dealer = SharedDealer([[Dealt(0, 0), Dealt(0, 1)], [Dealt(0, 2)]])
    assert dealer.next(0) == Dealt(0, 0)
    ray.kill(dealer._actor, no_restart=False)
    assert [dealer.next(group) for group in (0, 1, 1, 0)] == [Dealt(0, 0), Dealt(0, 2), Dealt(0, 1), None]


def _first_group_waits(settings: dict[str, Any]) -> None:
    """The first group's workers wait with their first student until all others are there."""
    run, of_group = settings["jobs"][0].run, settings["jobs"][0].group
    others = [run.path(f"{cell.folder}/manifest.json") for cell, _ in settings["jobs"][0].rows[1:]]
    train_row = train_worker.Trainer.row

    def row(self: train_worker.Trainer, number: int, resume: Any) -> None:
        while of_group == 0 and not all(os.path.exists(other) for other in others):
            time.sleep(0.1)
        train_row(self, number, resume)

    train_worker.Trainer.row = row  # type: ignore[method-assign]  # in the worker's own process
    try:
        train_worker.train_loop(settings)
    finally:
        train_worker.Trainer.row = train_row  # type: ignore[method-assign]


def test_bounds_of_ray_trains_own_elasticity(tmp_path: Path) -> None:
    """On two CPUs a student that may have up to four workers is trained by those that find room."""
    keys = ("cluster.trainer.min_workers=1", "cluster.trainer.max_workers=4", "cluster.trainer.num_cpus=1")
    job = small_job(tmp_path / "run", *keys)
    networks = Networks("prior", (1,), 8, None, 2, "teacher", "net", None, 2, 6, {})
    run = Run(job.config, job.run, Data(job.run, (), (), ()), networks, Events(job.run))
    train._fit(run, [job], shared([job], 1))
    assert Artifact(job.run / job.rows[0][0].folder, "train").require()["epochs"] == EPOCHS


def _dies_once(settings: dict[str, Any]) -> None:
    mark = settings["jobs"][0].run.path("died")
    if not os.path.exists(mark):
        Path(mark).touch()
        os._exit(1)
    train_worker.train_loop(settings)


def test_a_death_is_survived_and_an_error_of_the_users_comes_out_in_its_words_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = small_job(tmp_path / "run", "cluster.trainer.num_cpus=0.5")
    networks = Networks("prior", (1,), 8, None, 2, "teacher", "net", None, 2, 6, {})
    run = Run(job.config, job.run, Data(job.run, (), (), ()), networks, Events(job.run))
    monkeypatch.setattr(train, "train_loop", _dies_once)
    train._fit(run, [job], shared([job], 1))
    assert Artifact(job.run / job.rows[0][0].folder, "train").manifest() is not None
    assert "1 of 1 students" in capsys.readouterr().err
    assert b"worker lost" in job.run.read("events.jsonl") and not (job.run / "students").exists("train")

    (row, facts) = job.rows[0]
    job.run.remove("labels/labels-000001.parquet")
    again = dataclasses.replace(job, rows=((dataclasses.replace(row, seed=1), facts),))
    deaths = job.run.read("events.jsonl").count(b"worker lost")
    with pytest.raises(ValueError, match=r"^\S*labels-000001\.parquet is missing, with the labels of epochs 2 to 3"):
        train._fit(run, [again], shared([again], 1))
    assert job.run.read("events.jsonl").count(b"worker lost") == deaths  # it was not tried again
    assert "0 of 1 students" in capsys.readouterr().err  # nothing was trained, and nothing else is said
