"""run_elastic against real actors that work, die and fail."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from ddoq_ray.execution.pool import Elastic, run_elastic


@ray.remote(num_cpus=1)
class Worker:
    """Squares numbers. A unit may first kill its worker, until `deaths` marks of it lie in `folder`."""

    def __init__(self, folder: str = "", broken: bool = False) -> None:
        if broken:
            raise KeyError("no such network")
        self.folder = folder

    def run(self, unit: tuple[int, int]) -> int:
        number, deaths = unit
        done = len(list(Path(self.folder).glob(f"{number}-*"))) if deaths else 0
        if done < deaths:
            Path(self.folder, f"{number}-{done}").touch()
            os._exit(1)
        return number**2 // (0 if number == 13 else 1)


@ray.remote(num_cpus=1)
class Overlapping:
    """Waits twice, the second time under its lock; tells how many of its units were in flight."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.aboard = 0

    def run(self, unit: int) -> int:
        self.aboard += 1
        time.sleep(0.2)
        with self.lock:
            time.sleep(0.2)
            aboard = self.aboard
        self.aboard -= 1
        return aboard


@ray.remote(num_cpus=1)
class SleepsOnce:
    """Squares numbers. Unit 0 sleeps where it is taken first; with a file `kill` in `folder` it kills that worker."""

    def __init__(self, folder: str, seconds: float = 60.0) -> None:
        self.folder, self.seconds = Path(folder), seconds

    def run(self, unit: int) -> int:
        if unit == 0:
            before = len(list(self.folder.iterdir()))
            (self.folder / f"{before}").touch()
            if (self.folder / "kill").exists():
                (self.folder / "kill").unlink()
                os._exit(1)
            time.sleep(0 if self.seconds == 60 and before else self.seconds)
        else:
            time.sleep(0.1)
        return unit**2


@ray.remote(num_cpus=1)
class DiesInConstructor:
    def __init__(self) -> None:
        os._exit(1)

    def run(self, unit: int) -> int:
        return unit


def units(*numbers: int, deaths: dict[int, int] | None = None) -> list[tuple[int, int]]:
    return [(n, (deaths or {}).get(n, 0)) for n in numbers]


def all_cpus_come_back() -> bool:
    end = time.monotonic() + 10
    while (free := ray.available_resources().get("CPU", 0.0)) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    return free == 2


@pytest.mark.usefixtures("ray_here")
class TestPool:
    def test_every_unit_exactly_once(self) -> None:
        done = list(run_elastic(Worker.remote, units(*range(2, 13)), Elastic("test", 1, 2)))
        assert Counter(u[0] for u, _ in done) == Counter(range(2, 13))
        assert all(result == unit[0] ** 2 for unit, result in done)

    def test_units_are_made_when_they_are_given(self) -> None:
        made: list[int] = []

        class Lazy(list[int]):
            def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
                for number in range(len(self)):
                    made.append(number)
                    yield number, 0

        done = 0
        for _ in run_elastic(Worker.remote, Lazy([0] * 12), Elastic("test", 1, 2, ahead=1)):
            done += 1
            assert len(made) <= done + 2 * 2, "two workers with two units each"
        assert done == 12 and made == list(range(12))

    def test_no_units_need_no_worker(self) -> None:
        def spawn() -> Any:
            raise AssertionError("nothing to do")

        assert list(run_elastic(spawn, [], Elastic("test", 2, 2))) == []

    def test_a_lost_worker_costs_nothing(self, tmp_path: Path) -> None:
        events: list[tuple[str, dict[str, Any]]] = []
        done = list(
            run_elastic(
                lambda: Worker.remote(str(tmp_path)),
                units(*range(2, 9), deaths={3: 1, 6: 2}),
                Elastic("test", 1, 2),
                name=lambda unit: f"unit-{unit[0]}",
                on_event=lambda event, **facts: events.append((event, facts)),
            )
        )
        assert sorted((u[0], r) for u, r in done) == [(n, n * n) for n in range(2, 9)]
        requeued = Counter(facts["unit"] for event, facts in events if event == "unit requeued")
        assert requeued == {"unit-3": 1, "unit-6": 2}
        assert sum(event == "worker lost" for event, _ in events) == 3

    @pytest.mark.parametrize(
        ("poison", "words"),
        [
            (
                [2],
                r"unit-2 was on a worker that died 3 times; the other 5 are finished\. Last reason: ActorDiedError: ",
            ),
            (
                [4, 6],
                r"2 units \(unit-[46], unit-[46]\) were each on a worker that died 3 times; the other 4 are finished",
            ),
        ],
    )
    def test_poison_units_end_the_run_by_name_after_all_others(
        self, tmp_path: Path, poison: list[int], words: str
    ) -> None:
        done, events = [], []
        with pytest.raises(RuntimeError, match=words):
            for unit, _ in run_elastic(
                lambda: Worker.remote(str(tmp_path)),
                units(*range(2, 8), deaths=dict.fromkeys(poison, 99)),
                Elastic("test", 1, 2),
                name=lambda unit: f"unit-{unit[0]}",
                on_event=lambda event, **facts: events.append((event, facts.get("unit"))),
            ):
                done.append(unit[0])
        assert sorted(done) == [n for n in range(2, 8) if n not in poison]
        assert sorted(u for event, u in events if event == "unit set aside") == [f"unit-{n}" for n in poison]
        assert len(list(tmp_path.iterdir())) == 3 * len(poison)  # each was tried three times, no more

    def test_when_every_unit_kills_its_worker_three_are_enough(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match=r"3 units \(unit-\d, unit-\d, unit-\d\) were .* none was finished"):
            for _ in run_elastic(
                lambda: Worker.remote(str(tmp_path)),
                units(*range(2, 10), deaths=dict.fromkeys(range(2, 10), 99)),
                Elastic("test", 1, 2),
                name=lambda unit: f"unit-{unit[0]}",
            ):
                raise AssertionError("none can be finished")
        assert len(list(tmp_path.iterdir())) <= 12

    @pytest.mark.parametrize("ahead", [0, 1])
    def test_a_unit_given_ahead_is_fetched_beside_the_work_on_another(self, ahead: int) -> None:
        spawn = lambda: Overlapping.options(max_concurrency=1 + ahead).remote()
        done = list(run_elastic(spawn, list(range(8)), Elastic("test", ahead=ahead)))
        assert Counter(unit for unit, _ in done) == Counter(range(8))
        assert max(aboard for _, aboard in done) == 1 + ahead

    def test_an_innocent_unit_is_not_counted_for_its_neighbour(self, tmp_path: Path) -> None:
        """Unit 2 kills every worker; those that were given beside it go on alone, and to the end."""
        events: list[tuple[str, dict[str, Any]]] = []
        done = []
        with pytest.raises(RuntimeError, match=r"^2 was on a worker that died 3 times; the other 11 are finished"):
            for unit, _ in run_elastic(
                lambda: Worker.options(max_concurrency=2).remote(str(tmp_path)),
                [*units(3, 4, 5), *units(2, deaths={2: 99}), *units(*range(14, 22))],
                Elastic("test", 1, 1, ahead=1),
                name=lambda unit: str(unit[0]),
                on_event=lambda event, **facts: events.append((event, facts)),
            ):
                done.append(unit[0])
        assert sorted(done) == [3, 4, 5, *range(14, 22)]
        again = Counter(facts["unit"] for event, facts in events if event == "unit requeued")
        assert again.pop("2") == 2 and set(again.values()) <= {1}
        assert len(list(tmp_path.iterdir())) == 3

    def test_a_slow_unit_is_begun_on_an_idle_worker_too(self, tmp_path: Path) -> None:
        """The first worker that takes unit 0 sleeps for a minute; whoever takes it after has the result at once."""
        events: list[tuple[str, Any]] = []
        start = time.monotonic()
        done = list(
            run_elastic(
                lambda: SleepsOnce.remote(str(tmp_path)),
                list(range(6)),
                Elastic("test", 1, 2, copy_after_s=0.5),
                on_event=lambda event, **facts: events.append((event, facts.get("unit"))),
            )
        )
        assert sorted(done) == [(n, n * n) for n in range(6)]
        assert time.monotonic() - start < 50
        assert [unit for event, unit in events if event == "unit copied"] == ["0"]
        assert not {event for event, _ in events} & {"unit requeued", "worker lost"}
        assert len(list(tmp_path.iterdir())) == 2  # one copy, no more
        assert all_cpus_come_back()

    def test_a_unit_with_a_death_has_no_copy(self, tmp_path: Path) -> None:
        """Unit 0 kills its first worker, and is slow on the next one."""
        Path(tmp_path, "kill").touch()
        events = []
        spawn = lambda: SleepsOnce.remote(str(tmp_path), 3.0)
        how = Elastic("test", 1, 2, copy_after_s=0.2)
        for _ in run_elastic(spawn, list(range(6)), how, on_event=lambda event, **_: events.append(event)):
            pass
        assert "unit requeued" in events and "unit copied" not in events

    def test_a_bug_surfaces_as_it_is(self) -> None:
        with pytest.raises(ZeroDivisionError):
            list(run_elastic(Worker.remote, units(2, 13, 4), Elastic("test", 1, 2)))

    def test_an_error_in_the_constructor_surfaces_at_once(self) -> None:
        spawned = []

        def spawn() -> Any:
            spawned.append(1)
            return Worker.remote("", broken=True)

        with pytest.raises(RuntimeError, match="no such network"):
            list(run_elastic(spawn, units(2, 3, 4), Elastic("test", 1, 2)))
        assert len(spawned) <= 2

    def test_workers_that_cannot_start_end_the_run(self) -> None:
        with pytest.raises(RuntimeError, match="workers cannot start"):
            list(run_elastic(DiesInConstructor.remote, [2, 3], Elastic("test", 1, 1)))

    def test_the_pool_gives_its_cpus_back(self) -> None:
        """After the end, and when the caller stops in the middle."""
        list(run_elastic(Worker.remote, units(2, 3), Elastic("test", 2, 2)))
        for _ in run_elastic(Worker.remote, units(*range(2, 12)), Elastic("test", 2, 2)):
            break
        assert all_cpus_come_back()
