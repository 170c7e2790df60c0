"""Every loop of the driver is linear in shards and classes: counted in calls and reads, not by a clock.

The loops are those that `benchmarks.driver` runs at ImageNet-21K's size.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.driver import LOOPS, make_world
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.records import ShardDone, ShardInfo

SIZES = (32, 64, 128)
SAMPLES, IPC = 12, 1
ONCE = 1500  # calls that some library makes the first time or two
Counts = dict[str, Counter[str]]


def counting(monkeypatch: pytest.MonkeyPatch, seen: Counter[str]) -> None:
    """Count what is read and parsed, in whatever thread; the work itself goes on as it is."""

    def wrap(owner: type, name: str, what: str) -> None:
        real = getattr(owner, name)

        def counted(*arguments: Any, **keys: Any) -> Any:
            seen[what] += 1
            return real(*arguments, **keys)

        monkeypatch.setattr(owner, name, staticmethod(counted) if owner is not Folder else counted)

    for name in ("read", "reading", "exists", "names"):
        wrap(Folder, name, name)
    wrap(ShardDone, "loads", "done records")
    wrap(ShardInfo, "from_json", "shard rows")


def calls_of(loop: Callable[[], None]) -> int:
    """Function calls, Python's and C's, of this thread while `loop` runs."""
    calls = 0

    def count(frame: Any, event: str, what: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    gc.disable()  # it calls back
    sys.setprofile(count)
    try:
        loop()
    finally:
        sys.setprofile(before)
        gc.enable()
    return calls


def measured(place: Path, order: str, size: int) -> Counts:
    """What each loop does with so many shards and as many classes."""
    world = make_world(Folder(str(place)), order, size, size, SAMPLES, IPC)
    found: Counts = {}
    for what, loop in LOOPS.items():
        with pytest.MonkeyPatch.context() as patch:
            seen: Counter[str] = Counter()
            counting(patch, seen)
            seen["calls"] = calls_of(lambda loop=loop: loop(world))
        found[what] = seen
    return found


@pytest.mark.parametrize("order", ["mixed", pytest.param("sorted", marks=pytest.mark.slow)])
def test_twice_the_shards_and_classes_are_twice_the_work(tmp_path: Path, order: str) -> None:
    measured(tmp_path / "first", order, SIZES[0])  # imports, templates and caches are paid for once
    small, middle, large = (measured(tmp_path / str(size), order, size) for size in SIZES)
    for what in LOOPS:
        for kind in large[what]:
            # What does not grow cancels out, and a square would give 4.
            first = middle[what][kind] - small[what][kind]
            second = large[what][kind] - middle[what][kind]
            free = ONCE if kind == "calls" else 4
            assert second <= 2.6 * max(first, 0) + free, (what, kind, [m[what][kind] for m in (small, middle, large)])
    size = SIZES[0]
    for what, seen in small.items():  # each record is read once
        assert seen["done records"] in (0, size) or what.startswith("quantize: books"), (what, seen)
    assert small["latent index"]["done records"] == small["encode: done records, manifest"]["done records"] == size
    assert small["prepare: shards.json and class list read"]["shard rows"] == size + -(-size // 20)
    assert not small["synthesize: image shards planned"]["exists"]  # a request for each, where a listing says it
    told = small["train: what workers are told"]
    assert told["read"] == 2 and not told["shard rows"], told  # five students, one manifest of images and one of labels


def test_a_square_would_be_seen() -> None:
    first, second, third = (calls_of(lambda n=n: [len(()) for _ in range(n) for _ in range(n)]) for n in (32, 64, 128))
    assert third - second > 2.6 * (second - first) + ONCE
