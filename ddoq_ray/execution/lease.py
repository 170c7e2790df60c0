"""One run holds a run directory: ``lease.json`` there, with who holds it and when it was last renewed.

A second run would sweep the first one's temporary files and share Ray Train's folder with it. On a local disk the file
appears by a hard link, which only one of two can make; an object store has no such step, so there it is written and,
a moment later, read again. It belongs to no artifact, and it goes when the run ends.

The clocks of two machines may differ by more than a lease lasts. So a run that wants a directory tells another
machine's silence by the one clock that both share: that of the disk or store, which says when a file was published.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ddoq_ray.execution.console import say
from ddoq_ray.execution.signals import interrupt, interruptible, last_resort
from ddoq_ray.storage import layout
from ddoq_ray.storage.folder import TEMPORARY, Folder, write_error

RENEW_SECONDS = 15.0
MISSED_SECONDS = 2 * RENEW_SECONDS  # without a renewal: its holder may be gone, and a new run waits to see
STALE_SECONDS = 120.0  # without a renewal: its holder is gone, or cannot reach the directory
LOOK_SECONDS = 1.0  # between two looks at a lease that is waited for
SETTLE_SECONDS = 1.0  # between writing and reading again on an object store
# What a lease says, and of what kind; one that is not whole was written by no run that follows these rules.
FACTS: dict[str, type | tuple[type, ...]] = {
    "token": str, "host": str, "machine": str, "pid": int, "process": str,
    "since": (int, float), "renewed": (int, float),
}  # fmt: skip
UNREADABLE = {"token": "", "host": "unknown", "machine": "", "pid": 0, "process": "", "since": 0, "renewed": 0}


def _started(process: int) -> str:
    """When a process of this machine started, as its kernel says; empty when it is gone (or a zombie)."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return ""
        with contextlib.suppress(OSError):  # a system without /proc
            os.kill(process, 0)
            return "unknown"
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    """This machine since its start, and this container: where a process number means a process."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


class Lease:
    """A run's hold on its directory.

    Attributes:
        token: What makes this hold another one than the next run's of the same process.
        lost: Who holds the directory now, when this run no longer does; empty while it does.
    """

    def __init__(self, run: Folder) -> None:
        self.run = run
        self.token = uuid.uuid4().hex
        self.lost = ""
        self.facts: dict[str, Any] = {
            "token": self.token,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "process": _started(os.getpid()),
            "since": time.time(),
        }
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the directory, or refuse; of a holder that may be gone it is waited for a sign of life.

        Raises:
            ValueError: When a living run holds it.
        """
        self._await_silent()
        for _ in range(3):
            there = self._read()
            if there is not None and there["token"] != self.token:
                now = self._now(there)
                gone = why_stale(there, now)
                if not gone:
                    raise ValueError(_refusal(self.run, there, now))
                taken = self._take_over(there)
                if taken:
                    say(f"lease      {self.run.uri} was held by {holder(there)}; {gone}: this run takes it over")
            else:
                taken = self._create()
            if taken:
                self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
                self._thread.start()
                return
        raise ValueError(f"{self.run.uri} is taken by other runs at this moment; try again, or use another run_dir")

    def _await_silent(self) -> None:
        """Wait while another machine's holder is silent for longer than it should be, and not yet as long as the dead.

        What starts a lost run again (a RayJob's next attempt, Slurm's queue, a head's new container) does it sooner
        than the lease runs out, and would spend its attempts on being refused.
        """
        there = self._read()
        if there is None or there["machine"] == _machine():
            return
        silent = self._now(there) - there["renewed"]
        if not MISSED_SECONDS < silent <= STALE_SECONDS:
            return
        left = STALE_SECONDS - silent + LOOK_SECONDS
        say(
            f"lease      {self.run.uri} is held by {holder(there)}, who has not renewed its lease for {silent:.0f} s: "
            f"this run waits up to {left:.0f} s for a sign of life, and takes it over where none comes"
        )
        end = time.monotonic() + left
        while time.monotonic() < end and self._read() == there:
            time.sleep(LOOK_SECONDS)

    def check(self) -> None:
        """Raise ValueError when another run has taken the directory meanwhile."""
        if self.lost:
            raise ValueError(
                f"{self.run.uri} was taken over by {self.lost} while this run could not renew its lease: this run "
                "stops, and what it has published stays. Let the other one end, or use another run_dir"
            )

    def release(self) -> None:
        """Give the directory back; harmless when it is no longer held."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
        with contextlib.suppress(Exception):
            if self._is_ours():
                self.run.remove(layout.LEASE)

    def _content(self) -> bytes:
        return (json.dumps(self.facts | {"renewed": time.time()}, indent=1) + "\n").encode()

    def _read(self) -> dict[str, Any] | None:
        return read(self.run)

    def _is_ours(self) -> bool:
        there = self._read()
        return there is not None and there["token"] == self.token

    def _now(self, there: Mapping[str, Any]) -> float:
        """What the clock shows by which a lease was renewed last; that of this machine where no file tells it."""
        probe = f".clock-{self.token[:8]}{TEMPORARY}"
        try:
            self.run.publish(probe, b"")
            then, now = self.run.modified(layout.LEASE), self.run.modified(probe)
        finally:
            with contextlib.suppress(Exception):
                self.run.remove(probe)
        return time.time() if then is None or now is None else float(there["renewed"]) + now - then

    def _create(self) -> bool:
        if not self.run.local:
            self.run.publish(layout.LEASE, self._content())
            time.sleep(SETTLE_SECONDS)
            return self._is_ours()
        path = self.run.path(layout.LEASE)
        os.makedirs(self.run.uri, exist_ok=True)
        temporary = f"{path}.{self.token[:8]}{TEMPORARY}"
        try:
            Path(temporary).write_bytes(self._content())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise ValueError(write_error(path, error)) from error
        try:
            os.link(temporary, path)
            return True
        except FileExistsError:  # NFS says so of this run's own link, too, where its first answer was lost
            return self._is_ours()
        except OSError:  # a file system without hard links
            try:
                with open(path, "xb") as f:
                    f.write(self._content())
                return True
            except FileExistsError:
                return False
        finally:
            os.unlink(temporary)

    def _take_over(self, stale: dict[str, Any]) -> bool:
        """Put this run's lease in a stale one's place; False when it is another's by now.

        There is a lease at all times, so that a third run cannot make its own meanwhile; and one run looks and replaces
        at a time, by a lock on the directory that the kernel gives back when its holder dies.
        """
        if not self.run.local:
            return self._create()  # writes over it
        path = self.run.path(layout.LEASE)
        temporary = f"{path}.{self.token[:8]}{TEMPORARY}"
        directory = os.open(self.run.uri, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: the moment is short
                fcntl.flock(directory, fcntl.LOCK_EX)
            there = self._read()
            if there is None or there["token"] != stale["token"]:
                return False
            Path(temporary).write_bytes(self._content())
            os.replace(temporary, path)
            return True
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise ValueError(write_error(path, error)) from error
        finally:
            os.close(directory)

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                there = self._read()
                if there is not None and there["token"] != self.token:
                    self.lost = holder(there)
                    interrupt()
                    return
                if not self._stop.is_set():
                    self.run.publish(layout.LEASE, self._content())
            except Exception:  # a full disk, a store that is away: the next time may do
                continue


def read(run: Folder) -> dict[str, Any] | None:
    """The lease of a run directory: `FACTS`, or `UNREADABLE`; None where there is none."""
    try:
        data = run.read(layout.LEASE)
    except FileNotFoundError:
        return None
    try:
        found = json.loads(data)
        whole = all(isinstance(found[key], kind) for key, kind in FACTS.items())
        holder(found)
    except (ValueError, TypeError, KeyError, OverflowError, OSError):
        whole = False
    return dict(found) if whole else dict(UNREADABLE)


def why_stale(facts: Mapping[str, Any], now: float | None = None) -> str:
    """Why a lease's holder is taken for gone; empty when it may be alive."""
    if facts["machine"] == _machine():
        if _started(int(facts["pid"])) != facts["process"] or not facts["process"]:
            return "that process is gone"
        return ""
    silent = (time.time() if now is None else now) - facts["renewed"]
    return f"not renewed for {silent:,.0f} s" if silent > STALE_SECONDS else ""


def holder(facts: Mapping[str, Any]) -> str:
    if not facts["token"]:
        return f"a process whose {layout.LEASE} cannot be read"
    since = datetime.fromtimestamp(facts["since"]).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    return f"process {facts['pid']} on {facts['host']}, since {since}"


def _refusal(run: Folder, there: Mapping[str, Any], now: float) -> str:
    renewed = max(0.0, now - there["renewed"])
    return (
        f"another run holds {run.uri}: {holder(there)}, last renewed {renewed:.0f} s ago. Wait until it ends or stop "
        f"it, or use another run_dir. (If it was killed on another machine, its lease runs out {STALE_SECONDS:.0f} s "
        f"after its last renewal, and the same command takes over; {run.path(layout.LEASE)} is the lease)"
    )


def at_work(run: Folder) -> str:
    """Who holds the directory now; empty when no living run does."""
    there = read(run)
    return holder(there) if there is not None and not why_stale(there) else ""


@contextlib.contextmanager
def held(run: Folder) -> Iterator[Lease]:
    """The directory is this run's for the duration of the block.

    Raises:
        ValueError: When another run holds it, or takes it meanwhile.
    """
    lease = Lease(run)
    lease.acquire()
    try:
        with interruptible(), last_resort(lease.release):
            yield lease
    except BaseException:
        lease.check()  # words for the interruption that the loss caused
        raise
    finally:
        lease.release()
