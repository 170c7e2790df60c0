"""Which shards a path means, and which of them are held out by their names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.collection_trees import put

from ddoq_ray.data.shard_index import train_and_val
from ddoq_ray.storage.transport import list_shards


def test_brackets_and_braces_in_a_shard_folder_and_a_shard_listed_twice(tmp_path: Path) -> None:
    for folder in ("shards [2023]", "shards {a,b}"):
        put(tmp_path / folder / "s-0.tar", b"x")
        assert list_shards(str(tmp_path / folder)) == [str(tmp_path / folder / "s-0.tar")]
        assert list_shards(str(tmp_path / folder / "s-0.tar")) == [str(tmp_path / folder / "s-0.tar")]
    put(tmp_path / "p/s-0.tar", b"x")
    assert list_shards(f"{tmp_path}/p/{{s-0,s-0}}.tar") == [f"{tmp_path}/p/s-0.tar"]


def test_lists_of_shards_that_are_no_brace_pattern(tmp_path: Path) -> None:
    for i in range(2):
        put(tmp_path / f"s-{i}.tar", b"x")
    for path, words in (("s-0.tar::{}/s-1.tar", "not listed by `::`"), ("s-{{0..1.tar", "no brace pattern")):
        with pytest.raises(ValueError, match=words):
            list_shards(f"{tmp_path}/" + path.format(tmp_path))


@pytest.mark.parametrize(
    "name", ["ValSet-0.tar", "valset_00.tar", "val2017.tar", "ImageNetVal-0.tar", "dev-images.tar"]
)
def test_held_out_shards_are_known_by_joined_words(tmp_path: Path, name: str) -> None:
    for shard in ("train-0.tar", "valley-0.tar", name):
        put(tmp_path / shard, b"x")
    train, val = train_and_val(str(tmp_path), None)
    assert [Path(s).name for s in train] == ["train-0.tar", "valley-0.tar"] and [Path(s).name for s in val] == [name]


def test_hidden_files_and_links_to_a_shard_are_no_shards(tmp_path: Path) -> None:
    for name in ("s-0.tar", "s-1.tar", "._s-0.tar", ".s-2.tar"):
        put(tmp_path / name, b"x")
    (tmp_path / "s-3.tar").symlink_to("s-0.tar")
    told: list[str] = []
    assert [Path(s).name for s in train_and_val(str(tmp_path), None, told)[0]] == ["s-0.tar", "s-1.tar"]
    assert ["2 hidden files" in told[0], "1 shards" in told[1], len(told)] == [True, True, 2]
    assert train_and_val(f"{tmp_path}/.s-2.tar", None)[0] == [f"{tmp_path}/.s-2.tar"]  # asked for by its name


def test_folders_of_shards_beside_shards_are_told_and_pipes_refused(tmp_path: Path) -> None:
    for name in ("s-0.tar", "val/v-0.tar", "notes/a.txt"):
        put(tmp_path / name, b"x")
    told: list[str] = []
    assert len(train_and_val(str(tmp_path), None, told)[0]) == 1
    assert len(told) == 1 and told[0].startswith("the folders val in dataset.path=")
    os.mkfifo(tmp_path / "s-1.tar")
    with pytest.raises(ValueError, match=r"s-1.tar is a folder, a pipe or a device"):
        train_and_val(str(tmp_path), None)
