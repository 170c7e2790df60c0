"""Rows of a record that are never held as dicts are written, and known by their digest, as a list of dicts would be."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from ddoq_ray.storage.artifact import Artifact, checked, digest_of, with_check
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.json_rows import Rows, canonical, digest_of_each, printed

SHARDS = [
    {"name": f"images-{i:06d}", "images": 50, "sha256": digest_of([i]), "first_constant": [i, 0] if i % 2 else None}
    for i in range(5)
]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path))


def rows_of(shards: list[dict[str, object]]) -> Rows:
    """Which come in any order."""
    rows = Rows(len(shards))
    for index in reversed(range(len(shards))):
        rows.put(index, shards[index])
    return rows


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_manifest_is_the_same_bytes(folder: Folder, count: int) -> None:
    shards = SHARDS[:count]
    # With what JSON does not give back as it is: numbers as keys, a pair, two lines, letters of other alphabets.
    facts = {"classes": {1: (2, 3), 10: None}, "words": "one\ntwo\t\u00e9\u4e2d", "nothing": {}, "none": []}
    artifact, name = Artifact(folder, "synthesize"), "manifest.json"
    artifact.finish({"a": 1}, shards=shards, **facts)
    plain = folder.read(name)
    artifact.finish({"a": 1}, shards=rows_of(shards), **facts)
    assert folder.read(name) == plain
    assert checked(plain, strict=True)["shards"] == shards and artifact.require()["shards"] == shards


def test_digests_are_those_of_lists() -> None:
    assert with_check({"b": rows_of(SHARDS), "a": 1})["check"] == with_check({"b": SHARDS, "a": 1})["check"]
    assert digest_of_each(s["sha256"] for s in SHARDS) == digest_of([s["sha256"] for s in SHARDS])
    assert digest_of_each([]) == digest_of([])


def test_any_value_is_printed_as_json_prints_it() -> None:
    for value in ({}, [], {"a": []}, [{"b": 1}], 3, None, {"a": {"b": [1, {}]}}):
        assert "".join(printed(value)) == json.dumps(value, indent=1, sort_keys=True)
    with pytest.raises(ValueError, match="float"):
        list(printed({"rows": Rows(0), "seconds": float("nan")}))


def test_those_that_have_not_come_are_known() -> None:
    rows = Rows(3)
    rows.put(1, {"a": 1})
    assert rows.missing() == [0, 2] and list(rows) == [{"a": 1}] and len(rows) == 3
    assert {"a": 1} in rows and {"a": 2} not in rows


def test_a_manifest_of_many_rows_is_written_in_their_own_memory(folder: Folder) -> None:
    """20,000 rows of 0.2 kB: as dicts, and as one text, they would take several times that."""
    rows = Rows(20_000)
    for index in range(len(rows)):
        rows.put(index, SHARDS[1] | {"name": f"images-{index:06d}"})
    size = len(rows) * len(canonical(SHARDS[1]))
    tracemalloc.start()
    try:
        Artifact(folder, "synthesize").finish({}, digest=digest_of_each(row["sha256"] for row in rows), shards=rows)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.25 * size
    assert len(json.loads(folder.read("manifest.json"))["shards"]) == 20_000
