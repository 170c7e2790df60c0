"""One run holds a run directory: two at once would remove each other's temporary files and share checkpoints.

The lease is a file in the run directory that says who holds it, renewed while the holder lives. One that is not renewed
any more, or whose process is gone from this machine, is taken over, and that is said.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from ddoq_ray.artifacts import Folder

NAME = "running.json"
RENEWED_S = 15.0
STALE_S = 2.5 * RENEWED_S  # a holder elsewhere that has not renewed it in this time is gone


class Lease:
    """A run's hold on its directory."""

    def __init__(self, run: Folder, *, say: Callable[[str], None], lost: Callable[[str], None]) -> None:
        """Nothing is done yet.

        Args:
            run: The run directory.
            say: Takes a line for the user.
            lost: Called, in another thread, when another run has taken the directory over.
        """
        self.run, self.say, self.lost = run, say, lost
        self.mine = {"token": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(),
                     "process": _born(os.getpid()), "since": _now()}  # fmt: skip
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the directory for the duration of a block.

        Raises:
            ValueError: When another run that lives holds it.
        """
        self.acquire()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        try:
            yield
        finally:
            self._end.set()
            self._thread.join(timeout=5)
            self.release()

    def acquire(self) -> None:
        """Take the lease.

        Raises:
            ValueError: When another run that lives holds it.
        """
        while not self._create():
            other = self._read()
            if other is None:
                continue  # given back meanwhile
            if not self._gone(other):
                raise ValueError(
                    f"{self.run.uri} is in use by another run: process {other.get('pid')} on {other.get('host')}, "
                    f"since {other.get('since')}. Wait until it ends, stop it, or choose another run_dir"
                )
            self.say(
                f"{self.run.uri} was held by a run that is gone (process {other.get('pid')} on {other.get('host')}, "
                f"since {other.get('since')}): taken over"
            )
            self._remove(other)

    def release(self) -> None:
        """Give it back, if it is still this run's."""
        with contextlib.suppress(Exception):  # a store that does not answer must not hide how the run ended
            if (self._read() or {}).get("token") == self.mine["token"]:
                self.run.remove(NAME)

    def _create(self) -> bool:
        row = self.mine | {"renewed": time.time()}
        if self.run.local:
            os.makedirs(self.run.uri, exist_ok=True)
            whole = self.run.path(f".{NAME}.{self.mine['token']}")
            with open(whole, "w") as f:
                json.dump(row, f)
            try:
                os.link(whole, self.run.path(NAME))  # appears whole, or not at all where one is
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                try:
                    with open(self.run.path(NAME), "x") as f:
                        json.dump(row, f)
                except FileExistsError:
                    return False
            finally:
                os.unlink(whole)
            return True
        if self._read() is not None:
            return False
        self.run.publish_json(NAME, row)
        time.sleep(1.0)  # whoever wrote last has it; both look again
        return (self._read() or {}).get("token") == self.mine["token"]

    def _read(self) -> dict[str, Any] | None:
        try:
            row = self.run.read_json(NAME)
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return row if isinstance(row, dict) else {}

    def _gone(self, other: dict[str, Any]) -> bool:
        """Whether the holder is gone: its process, when it was of this machine; else when nothing renews the lease."""
        if other.get("host") == self.mine["host"] and isinstance(other.get("pid"), int):
            return _born(other["pid"]) != other.get("process")
        if time.time() - float(other.get("renewed", 0)) > 10 * STALE_S:  # even if the clocks differ by minutes
            return True
        self.say(
            f"{self.run.uri} is held by a run on {other.get('host')}: looking for {STALE_S:.0f} s whether it lives"
        )
        end = time.monotonic() + STALE_S
        while time.monotonic() < end:
            time.sleep(min(1.0, STALE_S / 10))
            now = self._read()
            if now is None:
                return True
            if now.get("renewed") != other.get("renewed") or now.get("token") != other.get("token"):
                return False
        return True

    def _remove(self, other: dict[str, Any]) -> None:
        if not self.run.local:
            self.run.remove(NAME)
            return
        aside = self.run.path(f".{NAME}.{uuid.uuid4().hex}")
        try:
            os.rename(self.run.path(NAME), aside)  # one of those who saw it stale
        except FileNotFoundError:
            return
        with open(aside) as f:
            taken = f.read()
        if other.get("token", "") not in taken:  # another run's, which was quicker: back with it
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.run.path(NAME))
        os.unlink(aside)

    def _renew(self) -> None:
        while not self._end.wait(RENEWED_S):
            try:
                now = self._read()
                if now is not None and now.get("token") == self.mine["token"]:
                    self.run.publish_json(NAME, self.mine | {"renewed": time.time()})
                elif now is not None and now:
                    self.lost(
                        f"{self.run.uri} was taken over by another run (process {now.get('pid')} on {now.get('host')})"
                    )
                    return
            except Exception:
                pass


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _born(pid: int) -> str | None:
    """What tells a process from a later one with its number; None when there is none."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            fields = f.read().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    if os.path.isdir("/proc/self"):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return "alive"
    return "alive"
