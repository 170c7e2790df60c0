"""One run holds a run directory: against a second one, a dead one, one elsewhere, and many at the same moment."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import pytest

from ddoq_ray.execution import lease
from ddoq_ray.execution.lease import Lease, held, why_stale
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import LEASE


@pytest.mark.parametrize("kind", ["disk", "store"])
def test_a_second_run_is_refused_by_name_and_the_first_gives_it_back(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Folder(str(tmp_path / "run") if kind == "disk" else f"memory://lease-{os.getpid()}/run")
    with held(run):
        with pytest.raises(ValueError, match=rf"another run holds .*process {os.getpid()} on .*another run_dir"):
            Lease(run).acquire()
        assert run.exists(LEASE)
    assert not run.exists(LEASE)
    with held(run):
        pass
    if kind == "disk":
        assert list((tmp_path / "run").iterdir()) == []
    assert capfd.readouterr().err == ""


def _die_holding(place: str) -> None:
    Lease(Folder(place)).acquire()
    os._exit(9)


def test_a_dead_run_of_this_machine_is_taken_over_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die_holding, args=(str(tmp_path),))
    process.start()
    process.join()
    assert (tmp_path / LEASE).exists()
    start = time.monotonic()
    with held(Folder(str(tmp_path))):
        assert time.monotonic() - start < 2
    said = capfd.readouterr().err
    assert f"process {process.pid} on {socket.gethostname()}" in said and "takes it over" in said


def test_who_is_gone() -> None:
    """By the process where it is of this machine (a number may come again), by renewals elsewhere."""
    mine: dict[str, Any] = Lease(Folder("memory://nothing")).facts | {"renewed": 1000.0}
    assert why_stale(mine, now=10.0**9) == ""
    assert "process is gone" in why_stale(mine | {"process": "1"})
    assert "process is gone" in why_stale(mine | {"process": ""})
    elsewhere = mine | {"machine": "another"}
    assert why_stale(elsewhere, now=1000 + lease.STALE_SECONDS - 1) == ""
    assert "not renewed for 121 s" in why_stale(elsewhere, now=1000 + lease.STALE_SECONDS + 1)


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN], ids=["heard", "ignored"])
def test_a_run_that_lost_its_directory_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctrl_c: Any) -> None:
    """Where Ctrl-C is ignored too, as a script's `command &` has it; what comes from outside stays ignored there."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    before = signal.signal(signal.SIGINT, ctrl_c)
    try:
        _lose(tmp_path, ctrl_c)
        assert signal.getsignal(signal.SIGINT) == ctrl_c
    finally:
        signal.signal(signal.SIGINT, before)


def _lose(tmp_path: Path, ctrl_c: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"taken over by process 7 on elsewhere.*this run stops"),
        held(Folder(str(tmp_path))),
    ):
        if ctrl_c == signal.SIG_IGN:
            signal.raise_signal(signal.SIGINT)
        other = {"token": "x", "host": "elsewhere", "machine": "m", "pid": 7, "process": "1", "since": 0, "renewed": 0}
        for _ in range(150):  # a renewal that had read before the first of these wrote over it
            (tmp_path / LEASE).write_text(json.dumps(other))
            time.sleep(0.2)  # interrupted by the thread that renews
    assert json.loads((tmp_path / LEASE).read_text())["token"] == "x"


def _race(place: str, start: float, out: str, tried: Barrier) -> None:
    time.sleep(max(0.0, start - time.time()))
    with suppress(ValueError):
        Lease(Folder(place)).acquire()
        Path(out, str(os.getpid())).touch()
    with suppress(BrokenBarrierError):
        tried.wait(60)  # a holder that has ended may be followed
    os._exit(0)


def test_a_stale_lease_is_replaced_and_never_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs have both seen the dead one's: the slower must not put the faster one's aside, not for a moment."""
    run = Folder(str(tmp_path))
    dead = Lease(Folder("memory://nothing")).facts | {"token": "x", "process": "no", "renewed": 0}
    (tmp_path / LEASE).write_text(json.dumps(dead))
    slow, fast = Lease(run), Lease(run)
    seen = slow._read()
    assert seen is not None
    fast.acquire()
    try:
        removed = []
        for name in ("rename", "unlink", "remove"):
            monkeypatch.setattr(os, name, lambda *path, name=name: removed.append((name, path)))
        assert not slow._take_over(seen) and not removed
        monkeypatch.undo()
        held = slow._read()
        assert held is not None and held["token"] == fast.token
        with pytest.raises(ValueError, match="another run holds"):
            slow.acquire()
    finally:
        fast.release()


def test_a_link_whose_first_answer_was_lost_is_this_runs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS asks again when an answer is lost, and is then told that the file is there: by its own first request."""
    link = os.link

    def answered_twice(source: str, target: str) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", answered_twice)
    with held(Folder(str(tmp_path))):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_runs_that_start_at_the_same_moment_one_has_it(tmp_path: Path) -> None:
    (tmp_path / "won").mkdir()
    (tmp_path / "run").mkdir()
    dead = Lease(Folder("memory://nothing")).facts | {"token": "x", "process": "no", "renewed": 0}
    (tmp_path / "run" / LEASE).write_text(json.dumps(dead))  # to be taken over by one of them
    context = multiprocessing.get_context("fork")
    start = time.time() + 0.5
    places = (str(tmp_path / "run"), start, str(tmp_path / "won"), context.Barrier(6))
    racers = [context.Process(target=_race, args=places) for _ in range(6)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(list((tmp_path / "won").iterdir())) == 1


@pytest.mark.parametrize("kind", ["disk", "store"])
@pytest.mark.parametrize("wrong", [-7200.0, 0.0, 7200.0], ids=["behind", "right", "ahead"])
def test_another_machines_silence_is_not_told_by_its_clock(tmp_path: Path, kind: str, wrong: float) -> None:
    """A clock that is hours wrong: a living run keeps its directory, and a dead one's is free after two minutes."""
    run = Folder(str(tmp_path) if kind == "disk" else f"memory://clock-{os.getpid()}-{wrong}/run")
    there = Lease(run).facts | {"token": "x", "machine": "another", "renewed": time.time() + wrong}
    run.publish(LEASE, json.dumps(there).encode())
    with pytest.raises(ValueError, match=r"another run holds .*last renewed [0-9] s ago"):
        Lease(run).acquire()
    _age(run, 3 * lease.STALE_SECONDS)
    with held(run):
        assert json.loads(run.read(LEASE))["token"] != "x"
    assert run.names("*") == run.names(".*") == []


@pytest.mark.parametrize("kind", ["disk", "store"])
@pytest.mark.parametrize("comes_back", [False, True], ids=["dead", "alive"])
def test_a_silent_holder_is_waited_for(
    tmp_path: Path, kind: str, comes_back: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that is started again before the lease of the lost one has run out, as a RayJob's next attempt is."""
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.05)
    run = Folder(str(tmp_path) if kind == "disk" else f"memory://silent-{os.getpid()}-{comes_back}/run")
    there = Lease(run).facts | {"token": "x", "machine": "another", "host": "lost", "renewed": time.time()}
    run.publish(LEASE, json.dumps(there).encode())
    _age(run, lease.STALE_SECONDS - 2)

    def renew() -> None:
        run.publish(LEASE, json.dumps(there | {"renewed": time.time() + 1}).encode())

    renewal = threading.Timer(0.7, renew if comes_back else lambda: None)
    renewal.start()
    if comes_back:
        with pytest.raises(ValueError, match=r"another run holds .* on lost"):
            Lease(run).acquire()
    else:
        with held(run):
            assert json.loads(run.read(LEASE))["token"] != "x"
    renewal.join()
    said = capfd.readouterr().err
    assert "has not renewed its lease for 118 s: this run waits up to 2 s" in said
    assert comes_back or "not renewed for 12" in said.splitlines()[-1]


def _age(run: Folder, seconds: float) -> None:
    """Let the lease have been published so long ago, by its disk's or store's clock."""
    if run.local:
        os.utime(run.path(LEASE), (time.time() - seconds,) * 2)
        return
    fs, root = run._fs(LEASE)
    fs.store[root].modified -= datetime.timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"\xff", b'{"token": 1}', {"since": 1e30}, {"since": "s"}, {"renewed": "r"}, {"pid": None}],
)
def test_a_lease_that_no_run_wrote_is_of_nobody_and_runs_out(tmp_path: Path, content: bytes | dict[str, Any]) -> None:
    whole = {"token": "a", "host": "h", "machine": "m", "pid": 1, "process": "x", "since": 1, "renewed": 1}
    run = Folder(str(tmp_path))
    run.publish(LEASE, content if isinstance(content, bytes) else json.dumps(whole | content).encode())
    with pytest.raises(ValueError, match=r"a process whose lease\.json cannot be read"):
        Lease(run).acquire()
    _age(run, 2 * lease.STALE_SECONDS)
    with held(run):
        pass
