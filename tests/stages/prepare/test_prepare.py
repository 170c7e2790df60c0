"""prepare's pure parts: the digits' shards, the class mapping and the rule for small classes."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ddoq_ray.config.compose import load_config
from ddoq_ray.data.collections import DIGIT_NAMES, DIGIT_SPLITS, digits
from ddoq_ray.data.samples import load_arrays
from ddoq_ray.data.shard_index import index_shard
from ddoq_ray.stages.prepare import given_shards
from ddoq_ray.stages.prepare.mapping import resolve_mapping
from ddoq_ray.stages.prepare.step import check_small_classes, digit_shards
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.records import ClassCounts, ClassInfo, ShardInfo

CATS = [ClassInfo(0, "n1", "Tabby"), ClassInfo(1, "tiger", "a tiger")]


def resolve(classes: list[ClassInfo], names: list[str] | None, outputs: int = 10) -> list[int | None]:
    found = resolve_mapping(classes, "teacher_index", "teacher", names, outputs)
    kept = [(c.class_id, c.name, c.prompt, c.prior_label) for c in classes]
    assert [(c.class_id, c.name, c.prompt, c.prior_label) for c in found] == kept
    return [c.teacher_index for c in found]


def test_mapping_is_by_name_never_by_position() -> None:
    assert resolve(CATS, ["dog", " Tiger", "bird", "tabby "]) == [3, 1]  # n1 by its prompt
    assert resolve(CATS[:1], ["n1", "tabby"]) == [0]  # the name before the prompt


def test_a_given_index_wins_and_needs_no_names() -> None:
    given = [ClassInfo(0, "a", "a", teacher_index=7), ClassInfo(1, "b", "b", teacher_index=0)]
    assert resolve(given, None) == [7, 0]
    assert resolve(given, ["b", "a"]) == [7, 0]


@pytest.mark.parametrize(
    ("classes", "names", "words"),
    [
        (CATS, ["tabby", "dog"], ["class 1 (tiger)", "teacher_index", "tabby, dog", "classes.json"]),
        (CATS, None, ["class 0 (n1)", "no class names", "classes.json"]),
        (CATS, [f"k{i}" for i in range(50)], ["k11, ...", "class 0"]),
        ([ClassInfo(0, "a", "a", teacher_index=10)], None, ["class 0 (a)", "teacher_index=10", "0 to 9"]),
        ([ClassInfo(0, "a", "a", teacher_index=-1)], None, ["teacher_index=-1", "0 to 9"]),
        ([ClassInfo(0, "a", "a", teacher_index="3")], None, ["teacher_index=3", "0 to 9"]),  # type: ignore[arg-type]
        ([ClassInfo(0, "a", "a"), ClassInfo(1, "b", "b", teacher_index=2)], ["x", "y", "a"], ["a, b", "share", "=2"]),
        ([ClassInfo(0, "crane", "crane")], ["crane", "ox", "crane"], ["crane", "2 outputs", "0, 2", "classes.json"]),
    ],
)
def test_a_mapping_that_does_not_hold_is_refused(
    classes: list[ClassInfo], names: list[str] | None, words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        resolve(classes, names)
    assert all(w in str(error.value) for w in words), str(error.value)


def test_splits_of_the_digits_are_fixed_disjoint_and_stratified() -> None:
    from sklearn.datasets import load_digits

    splits = digits()
    assert {k: len(v[0]) for k, v in splits.items()} == DIGIT_SPLITS
    again = digits()
    for name, (images, class_ids) in splits.items():
        assert np.array_equal(images, again[name][0]) and np.array_equal(class_ids, again[name][1])
        share = np.bincount(class_ids, minlength=10) / len(class_ids)
        assert np.abs(share - 0.1).max() < 0.01
    # Together the three splits are the collection, each image as often as there: so none is in two splits.
    images = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    together = Counter(x.tobytes() for split, _ in splits.values() for x in split)
    assert together == Counter(x.tobytes() for x in images)


def test_shards_of_the_digits_are_deterministic_and_class_sorted(tmp_path: Path) -> None:
    shards = digit_shards()
    assert shards == digit_shards()
    splits = digits()
    for split, tars in shards.items():
        paths = []
        for i, tar in enumerate(tars):
            paths.append(str(tmp_path / f"{split}-{i}.tar"))
            Path(paths[-1]).write_bytes(tar)
        images, class_ids, keys = load_arrays(paths, 8, 10, on_bad=lambda bad: pytest.fail(str(bad)))
        assert (np.diff(class_ids) >= 0).all()
        assert len(set(keys)) == len(keys) == DIGIT_SPLITS[split]
        order = [int(k.split("-")[1]) for k in keys]
        assert np.array_equal(images[:, 0], splits[split][0][order])
        assert np.array_equal(class_ids, splits[split][1][order])
        within = [i for i, c in zip(order, class_ids, strict=True) if c == 3]
        assert within != sorted(within)  # shuffled within a class
        counted = Counter({c: n for p in paths for c, n in index_shard(p, 10).images.items()})
        assert set(counted) == set(range(10))


def test_small_classes() -> None:
    classes = [ClassInfo(i, n, n) for i, n in enumerate(DIGIT_NAMES[:3])]
    counts = {0: 12, 1: 9, 2: 0}
    with pytest.raises(ValueError) as error:
        check_small_classes(load_config(["ipc=10"]), counts, classes)
    words = ["2 of 3 classes", "ipc=10", "1 (one): 9", "2 (two): 0", "smaller ipc", "small_class=cap", "=drop"]
    assert all(w in str(error.value) for w in words), str(error.value)
    check_small_classes(load_config(["ipc=10", "small_class=cap"]), counts, classes)
    check_small_classes(load_config(["ipc=10", "small_class=drop"]), counts, classes)
    with pytest.raises(ValueError, match="would leave no class: none has 13 images"):
        check_small_classes(load_config(["ipc=13", "small_class=drop"]), counts, classes)


def test_shards_that_changed_are_refused_and_many_are_asked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question waits for seven others: one after another they would never be answered."""
    together, size = threading.Barrier(8, timeout=20), given_shards._size

    def ask(url: str) -> int | None:
        together.wait()
        return size(url)

    monkeypatch.setattr(given_shards, "_size", ask)
    shards = []
    for i in range(16):
        (tmp_path / f"{i}.tar").write_bytes(bytes(100 + i))
        shards.append(ShardInfo(f"{tmp_path}/{i}.tar", 1, 100 + i, ClassCounts({0: 1}), ""))
    data = Data(Folder(str(tmp_path)), (), tuple(shards), ())
    given_shards.check_unchanged(data)
    (tmp_path / "9.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"9\.tar has 0 bytes, but had 109"):
        given_shards.check_unchanged(data)
    (tmp_path / "9.tar").unlink()
    with pytest.raises(ValueError, match=r"9\.tar is gone"):
        given_shards.check_unchanged(data)
