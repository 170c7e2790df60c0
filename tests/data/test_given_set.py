"""A distilled set of others: its classes are found by name or number, its weights where each form has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddoq_ray.data.given_set import GivenSet, class_places, given_set
from ddoq_ray.data.samples import encode_png
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.records import ClassInfo

NAMES = ["ant", "bee", "cat"]
CLASSES = [ClassInfo(i, name, name) for i, name in enumerate(NAMES)]
PICTURES = [encode_png(np.full((4, 4, 3), 40 * i, np.uint8) + np.arange(3, dtype=np.uint8)) for i in range(6)]
IDS = [2, 0, 1, 2, 0, 1]  # of the pictures
WEIGHTS = [1.0, 2.0, 3.0, 3.0, 2.0, 0.0]


def folders(root: Path, names: list[str], weights: bool) -> Path:
    for i, c in enumerate(IDS):
        (root / names[c]).mkdir(parents=True, exist_ok=True)
        (root / names[c] / f"{i}.png").write_bytes(PICTURES[i])
    if weights:
        told = {f"{names[c]}/{i}.png": WEIGHTS[i] for i, c in enumerate(IDS)}
        (root / "weights.json").write_text(json.dumps(told))
    return root


def tars(root: Path, weights: bool) -> Path:
    root.mkdir(parents=True)
    for shard in range(2):
        members = []
        for i in range(3 * shard, 3 * shard + 3):
            members += [(f"s{i}.png", PICTURES[i]), (f"s{i}.cls", str(IDS[i]).encode())]
            if weights:
                members.append((f"s{i}.json", json.dumps({"weight": WEIGHTS[i]}).encode()))
        (root / f"set-{shard}.tar").write_bytes(write_tar(members))
    return root


def parquet(root: Path, weights: bool) -> Path:
    root.mkdir(parents=True)
    columns = {"image": [{"bytes": p, "path": None} for p in PICTURES], "label": IDS}
    pq.write_table(pa.table(columns | ({"weight": WEIGHTS} if weights else {})), root / "train-00000-of-00001.parquet")
    return root


FORMS: dict[str, Callable[[Path, bool], Path]] = {
    "folders by name": lambda root, weights: folders(root, NAMES, weights),
    "folders by number": lambda root, weights: folders(root, ["00000", "00001", "00002"], weights),
    "folders as sre2l's": lambda root, weights: folders(root, ["new000", "new001", "new002"], weights),
    "tars": tars,
    "parquet": parquet,
}


@pytest.fixture
def class_list(tmp_path: Path) -> str:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(NAMES))
    return str(path)


def contents(found: GivenSet, scratch: Folder) -> list[tuple[int, bytes, float]]:
    for container in range(len(found.source.containers())):
        found.source.unpack(container, scratch)
    pictures = [p.data for p in found.source.read("train", found.names, scratch)]  # type: ignore[union-attr]
    return list(zip(found.class_ids.tolist(), pictures, found.weights.round(9).tolist(), strict=True))


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_set(form: str, weights: bool, tmp_path: Path, class_list: str) -> None:
    found = given_set(str(FORMS[form](tmp_path / "set", weights)), CLASSES, class_list)
    expected = []
    for c in range(3):
        mine = [i for i, own in enumerate(IDS) if own == c]
        total = sum(WEIGHTS[i] for i in mine)
        expected += [(c, PICTURES[i], round(WEIGHTS[i] / total, 9) if weights else 0.5) for i in mine]
    assert contents(found, Folder(str(tmp_path / "scratch"))) == expected
    assert found.weighted == weights and found.counts == {0: 2, 1: 2, 2: 2}


def test_classes_beside_shards_are_matched_by_name(tmp_path: Path, class_list: str) -> None:
    root = tars(tmp_path / "set", False)
    (root / "classes.json").write_text(json.dumps(NAMES[::-1]))
    assert given_set(str(root), CLASSES, class_list).counts == {0: 2, 1: 2, 2: 2}
    (root / "classes.json").write_text(json.dumps(["cat", "ant", "bee"]))
    found = given_set(str(root), CLASSES, class_list)
    first = contents(found, Folder(str(tmp_path / "scratch")))[0]
    assert first[:2] == (0, PICTURES[2])  # label 1, which is this list's ant


def test_numbers_are_numbers_and_not_the_order_of_folders() -> None:
    many = [ClassInfo(i, f"class of {i}", "") for i in range(12)]
    assert class_places(["0", "1", "10", "11", "2"], many, "set") == [0, 1, 10, 11, 2]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["ant", "bee", "dog"], "1 of its 3 classes are not the data's: dog; the data has ant, bee, cat"),
        (["0", "1", "3"], "3 of its 3 classes are not the data's"),
        (["1", "01"], "are not the data's"),
    ],
)
def test_classes_of_other_data_are_refused(names: list[str], words: str) -> None:
    with pytest.raises(ValueError, match="0 to 2") as error:
        class_places(names, CLASSES, "set")
    assert words in str(error.value)


def test_sets_that_cannot_be_used_are_told(tmp_path: Path, class_list: str) -> None:
    def told(path: Path) -> str:
        with pytest.raises(ValueError) as error:
            given_set(str(path), CLASSES, class_list)
        assert "images.path" in str(error.value) or "weights.json" in str(error.value)
        return str(error.value)

    assert "does not exist" in told(tmp_path / "nowhere")
    root = folders(tmp_path / "a", NAMES, True)
    weights = json.loads((root / "weights.json").read_text())
    lacking = {k: v for k, v in weights.items() if k != "bee/2.png"}
    for rows, words in (
        (lacking, "1 of 6 images have no usable weight; the first is bee/2.png, with none"),
        (weights | {"bee/2.png": -1}, "with -1.0"),
        (weights | {"bee/2.png": "much"}, "bee/2.png"),
        (dict.fromkeys(weights, 0), "weights of a class are 0 alone"),
        (dict.fromkeys(weights, 1e308), "sum is infinite"),
        (dict.fromkeys(weights, 10**400), "6 of 6 images have no usable weight"),
        ({f"./{name}": w for name, w in weights.items()}, "names none of the set's images"),
        ({"ant": {"1.png": 1.0}}, "names none of the set's images: it has ant, and they are called ant/"),
        (weights | {"bee/9.png": 1.0}, "weights of 1 images that are not there, such as bee/9.png"),
        ([1, 2], "expected a JSON object"),
    ):
        (root / "weights.json").write_text(json.dumps(rows))
        assert words in told(root)
    for text in ("no JSON", "[" * 100_000):
        (root / "weights.json").write_text(text)
        assert "is not JSON" in told(root)
    pq.write_table(pa.table({"image": [{"bytes": PICTURES[0]}]}), tmp_path / "unlabelled.parquet")
    assert "keys are the data's" in told(tmp_path / "unlabelled.parquet")
