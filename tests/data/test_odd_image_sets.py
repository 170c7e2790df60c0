"""Distilled sets that other tools and systems have touched: packed anew, joined, with files of theirs beside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.collection_trees import picture, put, tree

import ddoq_ray
from ddoq_ray.data.given_set import given_set
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.storage.records import ClassInfo

Members = list[tuple[str, bytes]]


def members(first: int = 0, cls: bytes = b"0", **facts: Any) -> Members:
    out: Members = []
    for i in range(first, first + 2):
        told = {"centroid_id": i, "weight": 0.5, "prompt": "", "seed": 0, **facts}
        key = f"00000-{i:04d}"
        out += [(f"{key}.png", picture(value=i)), (f"{key}.cls", cls), (f"{key}.json", json.dumps(told).encode())]
    return out


def pixels(path: Path) -> list[int]:
    loaded = ddoq_ray.load(str(path))
    return [int(loaded[i][0].max()) for i in range(len(loaded))]


@pytest.mark.parametrize(
    "touched",
    [
        lambda m: [(f"./{name}", data) for name, data in m],
        lambda m: [(f"images/{name}", data) for name, data in m],
        lambda m: [*m[:3], ("._00000-0001.png", b"\0\5\x16\7"), *m[3:]],
        lambda m: [("00000-0000.caption.txt", b"a cat"), *m],
        lambda m: [(name.replace(".png", ".PNG"), data) for name, data in m],
        lambda m: [(name, b"\xef\xbb\xbf0\r\n" if name.endswith("cls") else data) for name, data in m],
    ],
    ids=["dot-slash", "folder", "apple", "caption", "upper", "bom"],
)
def test_a_set_that_was_packed_anew(tmp_path: Path, touched: Callable[[Members], Members]) -> None:
    put(tmp_path / "a.tar", write_tar(touched(members())))
    put(tmp_path / "._a.tar", b"\0\5\x16\7")
    assert pixels(tmp_path) == [0, 1]


def test_tars_one_behind_another_are_one_set(tmp_path: Path) -> None:
    put(tmp_path / "a.tar", write_tar(members()) + write_tar(members(2)))
    assert pixels(tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (members(weight=None), r"centroid_id 0 and weight None; expected a number, and the mass"),
        (members(weight=[0.5]), r"weight \[0.5\]; expected"),
        (members(centroid_id=None), r"centroid_id None and weight 0.5; expected"),
        (members(cls=b"-1"), r"00000-0000.cls is -1; expected the number of a class"),
        ([], "no image in"),
    ],
)
def test_a_set_whose_facts_are_none_is_refused(tmp_path: Path, made: Members, words: str) -> None:
    put(tmp_path / "a.tar", write_tar(made))
    with pytest.raises(ValueError, match=words):
        ddoq_ray.load(str(tmp_path))


def test_weights_that_belong_to_no_image_are_told(tmp_path: Path) -> None:
    classes = [ClassInfo(i, name, name) for i, name in enumerate(("cat", "dog"))]
    tree(tmp_path, "cat/1.png", "dog/1.png")
    put(tmp_path / "weights.json", b'{"images/cat/1.png": 1, "images/dog/1.png": 1}')
    with pytest.raises(ValueError, match=r"names none of the set's images: .* called cat/1.png"):
        given_set(str(tmp_path), classes, "")
    (tmp_path / "weights.json").unlink()
    (tmp_path / "weights.json").mkdir()
    with pytest.raises(ValueError, match=r"weights.json cannot be read: Is a directory"):
        given_set(str(tmp_path), classes, "")
