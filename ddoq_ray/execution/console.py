"""What a run says while it works: lines, bars, and what it waits for when nothing moves."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from ddoq_ray.execution.streams import emit

LINE_SECONDS = 10.0  # between two lines of an advance, at least
SILENCE_SECONDS = 30.0  # without a word, at most
MARKS, MARK_SECONDS = 32, 2.0  # the rate is that of the last marks, which lie so far apart at least

# What is waited for, in words; empty when nothing is. The Ray session sets it.
waits: list[Callable[[], str]] = []

# Who looks at the counts, about once a second and when one ends. The metrics do.
watchers: list[Callable[[Progress], None]] = []

_as_json = False
_doing: list[_Activity] = []
_lock = threading.Lock()
_ticker: threading.Thread | None = None
_spoken = _moved = time.monotonic()


def lines_as(form: str) -> None:
    """How lines are written from now on: `text`, or `json`, an object a line and no bars."""
    global _as_json
    _as_json = form == "json"


def say(text: str, **facts: Any) -> None:
    """One line for the user, its first word the stage; on stderr, so that stdout holds the result only.

    Args:
        facts: The same in figures; only JSON lines have them.
    """
    global _spoken
    _spoken = time.monotonic()
    if _as_json:
        stage, _, words = text.partition(" ")
        line = {"time": round(time.time(), 3), "stage": stage.rstrip(":"), "text": words.strip(), **facts}
        emit(json.dumps(line, default=str), sys.stderr)
    elif sys.stderr.isatty():
        tqdm.write(text, file=sys.stderr)
    else:
        emit(text, sys.stderr)


class _Activity:
    """Something that takes time; the newest one speaks when all have been silent for long."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.start = time.monotonic()
        _begin(self)

    def counted(self) -> str:
        return ""

    def remind(self, why: str) -> None:
        seconds = time.monotonic() - self.start
        say(f"{self.stage:<10} {self.counted()}{seconds:.0f} s: {why}")


class Progress(_Activity):
    """A bar on a terminal; elsewhere (a log, a Ray job) one line at most every ten seconds, and one at the end.

    When nothing advances it says by time how far it is and what is waited for.

    Attributes:
        done: Items that are finished, those that an earlier run finished among them.
        workers: How many are ready; set by a pool, None for whatever has none.
        measured: Sums of what came with the items of this run (bytes, samples refused), and means so far (distortion).
    """

    def __init__(self, stage: str, total: int | None, unit: str) -> None:
        self.total, self.unit = total, unit
        self.done = self.before = 0
        self.workers: int | None = None
        self.measured: dict[str, float] = {}
        self._counts: dict[str, float] = {}  # of what the means are
        self.bar = None
        if sys.stderr.isatty() and not _as_json:
            self.bar = tqdm(total=total, desc=f"{stage:<10}", unit=f" {unit}", file=sys.stderr, dynamic_ncols=True)
        super().__init__(stage)
        self.last = self.moved = self.start
        self.marks: deque[tuple[float, int]] = deque([(self.start, 0)], maxlen=MARKS)

    def already(self, n: int) -> None:
        """Count what an earlier run finished; it says nothing of this one's rate."""
        self.done += n
        self.before += n
        self.marks = deque([(mark, done + n) for mark, done in self.marks], maxlen=MARKS)
        if self.bar is not None:
            self.bar.initial += n  # tqdm's rate leaves these out
            self.bar.n += n
            self.bar.refresh()

    def expect(self, total: int) -> None:
        """There are so many items in all, as is known by now."""
        self.total = total
        if self.bar is not None:
            self.bar.total = total

    def advance(self, n: int = 1, note: str = "", **more: float) -> None:
        """`n` items are done; `more` came with them, and is added up in `measured`."""
        global _moved
        self.done += n
        for name, amount in more.items():
            self.measured[name] = self.measured.get(name, 0.0) + amount
        if n:
            self.moved = _moved = time.monotonic()
            if self.moved - self.marks[-1][0] >= MARK_SECONDS:
                self.marks.append((self.moved, self.done))
        if self.bar is not None:
            if note or n:
                self.bar.set_postfix_str(", ".join(filter(None, (self._workers(), note))), refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.last >= LINE_SECONDS:
            self._line(note)

    def average(self, name: str, mean: float, count: float) -> None:
        """Take the mean of `count` more values into that of all so far, in `measured`."""
        before = self._counts.get(name, 0.0)
        self._counts[name] = before + count
        if self._counts[name]:
            so_far = before * self.measured.get(name, 0.0) + count * mean
            self.measured[name] = so_far / self._counts[name]

    def _line(self, note: str = "") -> None:
        self.last = time.monotonic()
        seconds = self.last - self.start
        of = f" of {self.total:,}" if self.total else ""
        left = (self.total or 0) - self.done
        rate = self.rate() if left > 0 else self._average(seconds)
        parts = [
            f"{self.done:,}{of} {self.unit}",
            f"{rate:,.1f} a second" if rate >= 0.05 else f"{60 * rate:,.1f} a minute" if rate else "",
            self._workers(),
            f"{seconds:.0f} s",
            f"{span(left / rate)} left" if rate and left > 0 else "",
        ]
        facts = {"done": self.done, "total": self.total, "unit": self.unit, "seconds": round(seconds, 3)}
        say(
            f"{self.stage:<10} {', '.join(filter(None, parts))}{f' ({note})' if note else ''}",
            **facts,
            workers=self.workers,
            **self.measured,
        )

    def rate(self) -> float:
        """Items a second of late, up to now; 0 when that is not known. A pool that grows is not its own average."""
        first, before = self.marks[0]
        seconds = time.monotonic() - first
        return (self.done - before) / seconds if seconds > 0.5 else 0.0

    def _average(self, seconds: float) -> float:
        return (self.done - self.before) / seconds if seconds > 0.5 else 0.0

    def _workers(self) -> str:
        return "" if self.workers is None else f"{self.workers} worker{'s' * (self.workers != 1)}"

    def counted(self) -> str:
        return f"{self.done:,}{f' of {self.total:,}' if self.total else ''} {self.unit}, "

    def remind(self, why: str) -> None:
        why = "at work" if self.workers else why  # what has no room is one more of them
        if self.bar is None:
            super().remind(why)
        elif time.monotonic() - self.moved >= SILENCE_SECONDS:
            global _spoken
            _spoken = time.monotonic()
            self.bar.set_postfix_str(why)

    def close(self, note: str = "") -> None:
        _end(self)
        _show([self])
        if self.bar is not None:
            self.bar.close()
        else:
            self._line(note)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close("stopped" if kind is not None else "")


def span(seconds: float) -> str:
    """A time to come, no more precise than an estimate is.

    >>> span(42.4), span(95), span(4000), span(200_000)
    ('42 s', '2 min', '1 h 07 min', '55 h 33 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


@contextmanager
def doing(stage: str) -> Iterator[None]:
    """A part of the run that may wait without a count of its own: it is not left silent either."""
    activity = _Activity(stage)
    try:
        yield
    finally:
        _end(activity)


def at_rest() -> tuple[str, float]:
    """The newest activity's stage, and for how many seconds nothing has begun, ended or advanced."""
    with _lock:
        return (_doing[-1].stage if _doing else ""), time.monotonic() - _moved


def _begin(activity: _Activity) -> None:
    global _ticker, _moved
    _moved = time.monotonic()
    with _lock:
        _doing.append(activity)
        if _ticker is None or not _ticker.is_alive():
            _ticker = threading.Thread(target=_tick, name="progress", daemon=True)
            _ticker.start()


def _end(activity: _Activity) -> None:
    global _moved
    _moved = time.monotonic()
    with _lock:
        if activity in _doing:
            _doing.remove(activity)


def _show(counts: Sequence[Progress]) -> None:
    """Tell the watchers; what fails there is no reason to stop the work."""
    for watch in list(watchers):
        for count in counts:
            with suppress(Exception):
                watch(count)


def _tick() -> None:
    while True:
        time.sleep(min(1.0, SILENCE_SECONDS / 4))
        with _lock:
            activity = _doing[-1] if _doing else None
            counts = [each for each in _doing if isinstance(each, Progress)]
        _show(counts)
        if activity is None or time.monotonic() - max(_spoken, activity.start) < SILENCE_SECONDS:
            continue
        try:
            why = next(filter(None, (words() for words in waits)), "") or "at work"
        except Exception:  # Ray may be going: the words are for comfort only
            why = "at work"
        activity.remind(why)
