"""An actor that is asked once, outside a pool: its death is survived as that of any other worker."""

from __future__ import annotations

import functools
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from ddoq_ray.execution.places import each_node, look_here, versions_here
from ddoq_ray.execution.workers import in_background, in_tasks, on_actor, twice_the_room
from ddoq_ray.storage.folder import Folder


@ray.remote(num_cpus=1)
class Dies:
    """Dies at the first `deaths` calls; `broken` fails in its constructor."""

    def __init__(self, folder: str, deaths: int, broken: bool = False) -> None:
        if broken:
            raise KeyError("no such network")
        self.folder, self.deaths = Path(folder), deaths

    def tell(self) -> str:
        if (died := len(list(self.folder.iterdir()))) < self.deaths:
            (self.folder / f"{died}").touch()
            os._exit(1)
        return f"after {died}"

    def refuse(self) -> None:
        raise ValueError("your images are of another size")


def ask(actor: Any) -> str:
    told: str = ray.get(actor.tell.remote())
    return told


@pytest.mark.usefixtures("ray_here")
class TestOnActor:
    def test_two_deaths_are_survived_and_told(self, tmp_path: Path) -> None:
        events = []
        spawn = lambda: Dies.remote(str(tmp_path), 2)
        assert on_actor(spawn, ask, lambda event, **facts: events.append((event, facts["deaths"]))) == "after 2"
        assert events == [("worker lost", 1), ("worker lost", 2)]

    def test_the_third_is_raised(self, tmp_path: Path) -> None:
        with pytest.raises(RayActorError):
            on_actor(lambda: Dies.remote(str(tmp_path), 9), ask, lambda event, **facts: None)
        assert len(list(tmp_path.iterdir())) == 3

    def test_an_error_of_the_constructor_is_raised_at_once(self, tmp_path: Path) -> None:
        events: list[str] = []
        with pytest.raises(RayActorError, match="no such network"):
            on_actor(lambda: Dies.remote("", 0, broken=True), ask, lambda event, **facts: events.append(event))
        assert events == []

    def test_what_the_user_can_mend_comes_in_its_own_words(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^your images are of another size$"):
            on_actor(lambda: Dies.remote(str(tmp_path), 0), lambda a: ray.get(a.refuse.remote()), print)


@pytest.mark.usefixtures("ray_here")
class TestInTasks:
    def test_more_are_submitted_when_nodes_have_joined(self) -> None:
        """How many there is room for is asked again and again: a cluster that grows from nothing begins with two."""
        task, submitted, room = ray.remote(num_cpus=0)(lambda number: number), [], [2]

        def submit(number: int) -> Any:
            submitted.append(number)
            return task.remote(number)

        ended = 0
        for number, result in in_tasks([functools.partial(submit, i) for i in range(12)], lambda: room[0]):
            assert result == number and len(submitted) - ended <= room[0]
            ended += 1
            if ended == 3:
                room[0] = 6
        assert ended == len(submitted) == 12

    def test_room_is_that_of_the_nodes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        most = twice_the_room(0.5)
        assert most() == 8  # of two CPUs
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1.0})  # a head without CPUs
        assert most() == 4


@pytest.mark.usefixtures("ray_here")
class TestInBackground:
    def test_jobs_without_a_cpu_start_no_more_processes_than_there_are_cpus(self, tmp_path: Path) -> None:
        def note_process(number: int) -> None:
            time.sleep(0.05)  # long enough for Ray to give the next job to another process
            (tmp_path / f"{number}").write_text(str(os.getpid()))

        in_background([functools.partial(note_process, number) for number in range(24)])
        processes = {int(file.read_text()) for file in tmp_path.iterdir()}
        assert len(list(tmp_path.iterdir())) == 24 and len(processes) <= 3  # 2 CPUs, and one that Ray replaced

    def test_an_error_is_the_jobs_own(self) -> None:
        def refuse() -> None:
            raise ValueError("photos is missing")

        with pytest.raises(ValueError, match=r"^photos is missing$"):
            in_background([refuse])


@pytest.mark.usefixtures("ray_here")
def test_a_node_without_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver whose package is on its own machine alone: workers find no module of it."""
    here = types.ModuleType("only_here")
    exec("def look():\n    return 1", here.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", here)
    with pytest.raises(ValueError, match=r"node \S+ \(\S+\) has no module only_here: every node needs .*--working-dir"):
        list(each_node(ray.nodes(), here.look))


@pytest.mark.usefixtures("ray_here")
def test_a_node_is_asked_for_what_it_sees_and_for_its_versions(tmp_path: Path) -> None:
    (tmp_path / "token").touch()
    ((_, (missing, versions)),) = each_node(ray.nodes(), look_here, Folder(str(tmp_path)), "token", [("a", "/none")])
    assert missing == [("a", "/none")] and versions == versions_here() and {"torch", "numpy"} <= versions.keys()
