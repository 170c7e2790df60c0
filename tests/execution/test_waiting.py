"""What is said while nothing moves, and of a cluster that cannot be joined."""

from __future__ import annotations

import time

import pytest
import ray
from ray.exceptions import AuthenticationError

from ddoq_ray.execution import console as progress
from ddoq_ray.execution.cluster_address import Where
from ddoq_ray.execution.session import pending, refused_words, waiting_words


def test_what_is_waited_for_in_words() -> None:
    assert waiting_words({}, {"CPU": 2.0}) == ""
    assert waiting_words({(("CPU", 0.5),): 1}, {"CPU": 0.4}) == "waits for 0.5 CPU, 0.4 free"
    asked = {(("CPU", 1.0), ("GPU", 1.0)): 3, (("memory", 2.0**32),): 1, (): 1}
    words = waiting_words(asked, {"CPU": 2.0, "memory": 2.0**30})
    assert words == "waits for 3 x 1 CPU, 2 free and 1 GPU, 0 free; 4 GiB of memory, 1 free; a worker process"


def test_ray_s_own_word_of_what_waits(ray_here: None) -> None:
    @ray.remote(num_cpus=64)
    def large() -> None:
        """Never runs here."""

    waiting = large.remote()
    deadline = time.monotonic() + 60
    while "waits for 64 CPU, " not in (words := pending()):
        assert time.monotonic() < deadline, words
        time.sleep(0.2)
    ray.cancel(waiting)


def test_a_still_line_says_by_time_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(progress, "waits", [lambda: "", lambda: "waits for 0.5 CPU, 0.4 free"])
    said = ""
    with progress.doing("run"), progress.Progress("encode", 1000, "images"):
        deadline = time.monotonic() + 30
        while said.count("waits for") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            said += capsys.readouterr().err
    lines = [line for line in said.splitlines() if "waits for" in line]
    assert len(lines) >= 2 and all(line.startswith("encode     0 of 1,000 images, ") for line in lines)
    assert lines[0].endswith(" s: waits for 0.5 CPU, 0.4 free")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AuthenticationError("no token"), ["refuses this run's token", "RAY_AUTH_TOKEN"]),
        (RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n"), ["Ray: 2.9.0", "Install"]),
        (
            ConnectionError("nothing there."),
            ["cannot join", "ConnectionError: nothing there.", "cluster.address=local"],
        ),
    ],
)
def test_a_cluster_that_refuses_says_what_to_do(error: Exception, words: list[str]) -> None:
    said = refused_words(Where("head:6379", "RAY_ADDRESS"), error)
    assert all(w in said for w in ["head:6379 (RAY_ADDRESS)", *words]) and "\n" not in said
