"""A cluster whose head has no CPUs and keeps the books, and whose nodes come later.

No work comes to the head, not even what asks for no CPU; a node that joins is asked whether it sees what it needs.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from ddoq_ray.data.image_set import NewImage, encode_picture, write_images
from ddoq_ray.execution import places
from ddoq_ray.execution.workers import in_background, on_a_working_node
from ddoq_ray.stages.label.images import shared_images
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.manifests import ImageShard
from tests.chaos.cells import Lab

pytestmark = [pytest.mark.slow, pytest.mark.chaos]


def test_jobs_in_the_background_are_of_all_nodes_but_the_head(here: Lab, tmp_path: Path) -> None:
    def note_node(note: Path) -> None:
        note.write_text(ray.get_runtime_context().get_node_id())

    in_background([functools.partial(note_node, tmp_path / str(i)) for i in range(8)])
    assert {note.read_text() for note in tmp_path.iterdir()} == {node.node_id for node in here.nodes}


def test_a_set_for_teachers_is_decoded_and_kept_on_a_node_that_works(here: Lab, tmp_path: Path) -> None:
    """It may be larger than the head's memory, and so is what is read of it there."""
    images = Folder(str(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    made = [NewImage(0, i, 0.02, "", 0, encode_picture(pixels)) for i in range(50)]  # 0.6 MB: not in the reference
    shared = shared_images(images, [ImageShard(**write_images(images, "images-000000", made))], 64, 64)
    _, (_, ref) = shared.__reduce__()
    ray.wait([ref], fetch_local=False)
    places = ray.experimental.get_object_locations([ref])[ref]["node_ids"]
    assert places and set(places) <= {node.node_id for node in here.nodes}


def test_without_a_node_that_has_cpus_they_go_anywhere(here: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    head = [node for node in ray.nodes() if not node["Resources"].get("CPU")]
    assert head
    monkeypatch.setattr(ray, "nodes", lambda: head)
    assert on_a_working_node() == {}


def test_a_node_that_joins_without_the_shared_disk_ends_the_run_in_words(
    here: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The input is a file that this process alone sees; nodes that were there from the start are not asked again."""
    monkeypatch.setattr(places, "LATE_SECONDS", 0.5)
    monkeypatch.setattr(places.LateNodes, "every_s", 0.5)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    only_here = f"/proc/self/fd/{os.dup2(descriptor, 333)}"
    run, named = Folder(str(tmp_path / "run")), [("dataset.path", only_here)]
    added = []
    try:
        with places.LateNodes(run, [], own_session=False):
            added.append(here.add())
            time.sleep(20.0)
        with (
            pytest.raises(ValueError, match=rf"^node \S+ \(\S+\) does not see dataset\.path \({only_here}\)\. Every"),
            places.LateNodes(run, named, own_session=False),
        ):
            time.sleep(3.0)
            added.append(here.add())
            time.sleep(120.0)
        assert os.listdir(run.uri) == []
    finally:
        for node in added:
            here.remove(node)
        os.close(descriptor)
        os.close(333)
