"""Which group trains a student, and how long the rest will take."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddoq_ray.config.compare import CompareConfig
from ddoq_ray.config.compose import load
from ddoq_ray.stages.cells import cells
from ddoq_ray.stages.train.ahead import Ahead, Load, group_of, planned_loads, seconds_left
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.folder import Folder


def loads(*views: int, network: str = "net") -> list[Load]:
    return [Load(f"{network}-{i}", network, v) for i, v in enumerate(views)]


@pytest.mark.parametrize("views", [(1,), (1, 1, 1), (4, 1, 1, 1, 1), (1, 1, 1, 1, 4), (10, 1, 7, 3, 3, 8, 2)])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups_share_the_views_and_keep_neighbours_together(views: tuple[int, ...], groups: int) -> None:
    mine = loads(*views)
    place = group_of(mine, groups)
    order = [place[load.folder] for load in mine]
    assert order == sorted(order) and set(order) <= set(range(groups))
    share = [sum(load.views for load in mine if place[load.folder] == g) for g in range(groups)]
    assert max(share) <= sum(views) / groups + max(views)


def test_each_network_is_shared_by_itself() -> None:
    """A ResNet's view costs many times a ConvNet's: no group has all of one of them."""
    place = group_of([*loads(1, 1, 1, 1), *loads(1, 1, network="large")], 2)
    assert [place[f"net-{i}"] for i in range(4)] == [0, 0, 1, 1] and [place[f"large-{i}"] for i in range(2)] == [0, 1]


def test_seconds_left_by_hand() -> None:
    """100 views took 5 s: 300 more take 15 s, on two groups 7.5; what no finished network tells is counted apart."""
    mine = [*loads(100, 100, 200), *loads(50, network="large")]
    assert seconds_left(mine, {"net-0": 5.0}, 2) == (7.5, 1)
    assert seconds_left(mine, {"net-0": 5.0, "large-0": 9.0}, 1) == (15.0, 0)
    assert seconds_left(mine, {}, 1) == (0.0, 4)


def test_views_follow_ipc_batch_and_the_real_images() -> None:
    asked = load(CompareConfig, ["methods=[random,full]", "ipcs=[1,10]", "num_seeds=1", "batches=[5,50]"])
    counts = dict.fromkeys(range(10), 90)
    found = {part.ipc: [load.views for load in planned_loads(part, counts, cells(part))] for part in asked.parts()}
    # 400 steps of 5 are 200 epochs of 10 images; of 50, 200 epochs of 100 images and 23 of 900; 10 views more a step,
    # and for all real ones the teacher's answers, which are not stored.
    assert found == {1: [200 * (10 + 20)], 10: [200 * (100 + 20), 23 * (2 * 900 + 180)]}


def test_what_is_said_and_when(tmp_path: Path) -> None:
    run, mine = Folder(str(tmp_path)), loads(10, 10, 10)
    ahead = Ahead(mine, 1, run)
    assert ahead.words() == ""
    Artifact(run / "net-0", "train").finish({}, seconds=30.0)
    assert "about 1 min for the 2 students that are left" in Ahead(mine, 1, run).words()  # a run that goes on
    Artifact(run / "net-1", "train").finish({}, seconds=30.0)
    Artifact(run / "net-2", "train").finish({}, seconds=30.0)
    assert Ahead(mine, 1, run).words() == ""
