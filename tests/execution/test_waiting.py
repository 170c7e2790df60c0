"""A pool that waits for workers: what it says, when it gives up, and when it only starts slowly."""

from __future__ import annotations

import functools
import re
import signal
import time
from typing import Any

import pytest
import ray

from ddoq_ray.config.cluster import ClusterConfig, WorkerResources
from ddoq_ray.execution import pool
from ddoq_ray.execution.console import doing
from ddoq_ray.execution.errors import NoWorkers
from ddoq_ray.execution.pool import Elastic, run_elastic
from ddoq_ray.execution.waiting import Patience, _of_report, scaling_words


@ray.remote(num_cpus=1)
class Echo:
    def __init__(self, seconds: float = 0.0) -> None:
        time.sleep(seconds)

    def run(self, unit: int) -> int:
        return unit


def all_cpus_come_back() -> bool:
    end = time.monotonic() + 10
    while (free := ray.available_resources().get("CPU", 0.0)) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    return free == 2


@pytest.mark.usefixtures("ray_here")
class TestWaiting:
    def test_without_room_it_says_why_and_gives_up(self, capsys: pytest.CaptureFixture[str]) -> None:
        how = Elastic("decode", max_workers=3, room={"CPU": 1, "GPU": 4}, key="cluster.decoder", wait_s=3, give_up_s=6)
        spawn = lambda: Echo.options(num_gpus=4).remote()
        with pytest.raises(
            NoWorkers, match=r"decode: no worker could be placed for \d s \(cluster\.give_up_s\)"
        ) as told:
            list(run_elastic(spawn, [1, 2, 3, 4], how))
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("decode")]
        assert len(lines) == 1  # said once, and again only after a minute
        for words in (lines[0], str(told.value)):
            assert "a worker asks for 1 CPU and 4 GPU on one node; the cluster has 2 CPU (2 free) and 1 GPU" in words
            assert "pending are 3 x 1 CPU and 4 GPU" in words
        assert "cluster.decoder.num_cpus or num_gpus" in str(told.value)
        assert all_cpus_come_back()

    def test_a_worker_that_starts_slowly_has_its_place_and_is_no_reason_to_give_up(self) -> None:
        how = Elastic("decode", room={"CPU": 1}, wait_s=0.5, give_up_s=1)
        assert list(run_elastic(lambda: Echo.remote(5.0), [1, 2], how)) == [(1, 1), (2, 2)]

    def test_units_flow_when_the_least_workers_are_ready(self) -> None:
        events: list[str] = []
        how = Elastic("decode", min_workers=2, max_workers=2)
        seconds = iter([0.0, 2.0])
        spawn = lambda: Echo.remote(next(seconds))
        for unit, _ in run_elastic(spawn, [1, 2, 3], how, on_event=lambda event, **_: events.append(event)):
            events.append(str(unit))
        assert events[:2] == ["worker joined"] * 2 and sorted(events[2:]) == ["1", "2", "3"]

    def test_the_least_is_waited_for_so_long_and_no_longer(self, capsys: pytest.CaptureFixture[str]) -> None:
        how = Elastic("decode", min_workers=3, max_workers=3, wait_s=6)
        assert sorted(run_elastic(Echo.remote, [1, 2, 3], how)) == [(1, 1), (2, 2), (3, 3)]
        told = capsys.readouterr().err
        assert re.search(
            r"[12] of 3 workers are ready after 6 s: a worker asks for 1 CPU on one node; .* 2 CPU \(", told
        )

    def test_an_idle_worker_that_died_costs_no_unit_a_death(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One of two workers is lost while a third is waited for, so at no unit; none is handed to it."""
        monkeypatch.setattr(pool, "IDLE_SECONDS", 0.5)
        actors, events = [], []

        def spawn() -> Any:
            actors.append(Echo.options(num_cpus=1 if len(actors) < 2 else 2).remote())  # no room for the third
            return actors[-1]

        def on_event(event: str, **facts: Any) -> None:
            events.append(event)
            if events == ["worker joined"] * 2:
                ray.kill(actors[0])

        how = Elastic("decode", min_workers=3, max_workers=3, wait_s=10)
        assert sorted(run_elastic(spawn, [1, 2, 3], how, on_event=on_event)) == [(1, 1), (2, 2), (3, 3)]
        assert events.count("worker lost") == 1 and "unit requeued" not in events

    def test_more_workers_than_units_are_not_waited_for(self) -> None:
        start = time.monotonic()
        assert list(run_elastic(Echo.remote, [1], Elastic("decode", min_workers=2, max_workers=2))) == [(1, 1)]
        assert time.monotonic() - start < 25

    @pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN], ids=["heard", "ignored"])
    def test_a_task_that_no_node_can_take_ends_the_run_too(self, ctrl_c: Any, request: pytest.FixtureRequest) -> None:
        """Outside a pool: the wait is inside Ray, and is ended as by Ctrl-C, also where a shell has that ignored."""
        request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, ctrl_c)))
        start, task = time.monotonic(), ray.remote(num_cpus=1, num_gpus=4)(lambda: None)
        with pytest.raises(NoWorkers) as told, doing("evaluate"), Patience(3.0, own_session=False):
            ref = task.remote()
            ray.get(ref)
        ray.cancel(ref)
        assert 3 <= time.monotonic() - start < 15
        assert re.match(
            r"evaluate: nothing has moved for [34] s \(cluster\.give_up_s\), and no node has", str(told.value)
        )
        assert "a worker asks for 1 CPU and 4 GPU on one node; the cluster has 2 CPU" in str(told.value)

    def test_a_task_that_waits_for_others_to_end_is_waited_for(self) -> None:
        sleep = ray.remote(lambda seconds: time.sleep(seconds))
        first = sleep.options(num_cpus=1).remote(6.0)
        with doing("evaluate"), Patience(1.0, own_session=False):
            ray.get(sleep.options(num_cpus=2).remote(0.0))
        ray.get(first)

    def test_a_ray_that_no_node_will_join_is_given_up_by_itself(self) -> None:
        def of(**keys: Any) -> Elastic:
            cluster = ClusterConfig(decoder=WorkerResources(4, 1), **keys)
            return Elastic.of(cluster, "synthesize", "decoder", min_workers=2, max_workers=8)

        assert of() == Elastic("synthesize", 2, 8, room={"CPU": 4, "GPU": 1}, key="cluster.decoder", give_up_s=120)
        assert of(give_up_s=7.0, wait_s=5.0).give_up_s == 7


def test_what_the_first_autoscaler_reports() -> None:
    """The fields as Ray's monitor writes them; no autoscaler can be run here."""
    report = {
        "pending_launches": {"gpu": 2},
        "pending_nodes": [["10.0.0.1", "gpu", "setting-up"]],
        "failed_nodes": [["10.0.0.2", "spot"]],
    }
    assert scaling_words(*_of_report(report)) == "the autoscaler starts 3 x gpu, could not start 1 x spot"
    assert scaling_words(*_of_report({"pending_nodes": [], "pending_launches": {}, "failed_nodes": None})) == ""


@pytest.mark.parametrize("key", ["wait_s", "give_up_s"])
def test_no_time_is_no_wait(key: str) -> None:
    with pytest.raises(ValueError, match=rf"cluster\.{key}=0"):
        ClusterConfig(**{key: 0.0})  # type: ignore[arg-type]
