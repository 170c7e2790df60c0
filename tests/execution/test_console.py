"""What a run says when nothing moves, and what it says of clusters that refuse it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError

from ddoq_ray.execution import console as progress
from ddoq_ray.execution import session
from ddoq_ray.execution.cluster_address import Where


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(progress, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(progress, "_spoken", time.monotonic())
    monkeypatch.setattr(progress, "_ticker", None)  # one that sleeps would look too late
    yield


def test_a_still_line_says_by_time_what_is_waited_for(
    soon: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["waits for 0.5 CPU, 0.4 free"]
    monkeypatch.setattr(progress, "waits", [lambda: "", lambda: words[0]])
    with progress.doing("run"), progress.Progress("encode", 1000, "images"):
        time.sleep(0.6)
        words[0] = ""
        time.sleep(0.6)
    lines = capsys.readouterr().err.splitlines()
    assert any(
        x.startswith("encode     0 of 1,000 images, ") and x.endswith("s: " + "waits for 0.5 CPU, 0.4 free")
        for x in lines
    )
    assert any(x.endswith(": at work") for x in lines)


def test_a_line_says_rate_workers_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of late, not on average: 100 images in the first 1000 s, then 10 a second; what was there before is no rate."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress("synthesize", 50_000, "images") as line:
        line.already(20_000)
        now[0] = 1000.0
        line.workers = 1
        line.advance(100)
        line.workers = 3
        for second in range(1001, 1101):
            now[0] = float(second)
            line.advance(10)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "synthesize 20,100 of 50,000 images, 0.1 a second, 1 worker, 1000 s, 83 h 03 min left"
    assert told[-2] == "synthesize 21,100 of 50,000 images, 10.0 a second, 3 workers, 1100 s, 48 min left"


def test_a_total_may_be_known_later(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress("denoiser", 1000, "steps") as line:
        line.expect(865)
        line.advance(865)
    assert "865 of 865 steps" in capsys.readouterr().err


def test_json_lines_have_the_words_and_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    progress.lines_as("json")
    try:
        progress.say("cluster    2 nodes")
        with progress.Progress("encode", 100, "images") as line:
            line.already(40)
            line.workers = 2
            line.advance(60, bytes=480, quarantined=1)
            line.average("distortion", 2.0, 30)
            line.average("distortion", 4.0, 10)
    finally:
        progress.lines_as("text")
    first, last = (json.loads(row) for row in capsys.readouterr().err.splitlines())
    assert (first["stage"], first["text"]) == ("cluster", "2 nodes") and abs(first["time"] - time.time()) < 60
    figures = {"stage": "encode", "done": 100, "total": 100, "unit": "images", "workers": 2, "bytes": 480}
    assert last.items() >= (figures | {"quarantined": 1, "distortion": 2.5}).items()
    assert last["text"].startswith("100 of 100 images")


def test_words_that_fail_leave_a_line_all_the_same(
    soon: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "waits", [lambda: str(1 / 0)])
    with progress.doing("quantize"):
        time.sleep(0.5)
    assert "quantize   " in (told := capsys.readouterr().err) and ": at work" in told


def test_demands_in_words() -> None:
    asked = {(("CPU", 0.5),): 3, (("CPU", 1.0), ("GPU", 1.0)): 1, (("memory", 2.0 * 2**30),): 2, (): 1}
    free = {"CPU": 0.4, "memory": float(2**30)}
    assert session.waiting_words(asked, free) == (
        "waits for 3 x 0.5 CPU, 0.4 free; 2 x 2 GiB of memory, 1 free; 1 CPU, 0.4 free and 1 GPU, 0 free"
    )
    assert session.waiting_words({}, free) == ""
    assert session.waiting_words({(): 1}, free) == "waits for a worker process"


def test_what_ray_has_no_room_for_is_read_from_it(ray_here: None) -> None:
    @ray.remote(num_cpus=1000)
    def never() -> None: ...

    task = never.remote()
    words, until = "", time.monotonic() + 30
    while "1000 CPU" not in words and time.monotonic() < until:  # Ray may still report what earlier tests asked for
        time.sleep(0.2)
        words = session.pending()
    ray.cancel(task, force=True)
    asked = words.removeprefix("waits for ").split("; ")
    assert words.startswith("waits for ") and any(w.startswith("1000 CPU, ") and w.endswith(" free") for w in asked)


def test_what_comes_after_a_task_that_is_at_work_is_not_waited_for(ray_here: None) -> None:
    """While its own task has the CPUs that the next one needs, a run works; it waits for those of an idle actor."""
    sleep = ray.remote(num_cpus=2)(lambda seconds: time.sleep(seconds))

    def after(task: Any, said: str) -> str:
        until = time.monotonic() + 30
        while not (session.demands().get((("CPU", 2.0),)) and session.pending().startswith(said)):
            assert time.monotonic() < until, session.pending()
            time.sleep(0.2)
        asked = session.pending()
        ray.cancel(task)
        return asked

    first = sleep.remote(20.0)
    while not session.at_work():
        time.sleep(0.2)
    assert after(sleep.remote(0.0), "") == ""
    ray.cancel(first, force=True)

    @ray.remote(num_cpus=2)
    class Idle:
        """Holds CPUs and does nothing."""

    holder = Idle.remote()
    ray.get(holder.__ray_ready__.remote())
    assert after(sleep.remote(0.0), "waits").startswith("waits for ")
    ray.kill(holder)


def test_a_pool_that_has_workers_is_at_work(
    soon: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "waits", [lambda: "waits for 1 CPU, 0 free"])
    with progress.Progress("synthesize", 10, "images") as bar:
        bar.workers = 1
        time.sleep(0.6)
    told = capsys.readouterr().err
    assert "at work" in told and "waits" not in told


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AuthenticationError("no token"), ["refuses this run's token", "RAY_AUTH_TOKEN"]),
        (RuntimeError("Version mismatch: The cluster was started with:\n Ray: 2.1"), ["another version", "Ray: 2.1"]),
        (ConnectionError("gone"), ["cannot join", "gone", "cluster.address=local"]),
    ],
)
def test_a_cluster_that_refuses_is_told_in_words(error: Exception, words: list[str]) -> None:
    told = session.refused_words(Where("head:6379", "RAY_ADDRESS"), error)
    assert all(w in told for w in ["head:6379 (RAY_ADDRESS)", *words]) and "\n" not in told
