"""Single classes of a codebook's parts: what is read of a file, and what damage of it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.counted_store import Counted, counted_store

from ddoq_ray.storage.codebook import (
    Account,
    ClassRows,
    LastRows,
    Part,
    open_parts,
    parts_with_classes,
    read_part,
    write_part,
)
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.records import Codebook

SHAPE = (4, 8, 8)
D = int(np.prod(SHAPE))
PARTS = {0: [0, 1, 3], 1: [4], 2: [6, 7, 8, 9]}  # classes 2 and 5 were dropped
FILE = "part-00000.parquet"


def book(class_id: int) -> Codebook:
    k = 2 + class_id % 3
    rng = np.random.default_rng(class_id)
    counts = rng.integers(1, 9, k)
    return Codebook(class_id, rng.standard_normal((k, D)).astype(np.float32), counts, 0.5 + class_id, counts)


@pytest.fixture
def codebook() -> Iterator[Folder]:
    folder = Folder(counted_store()) / "codebook"
    for part, classes in PARTS.items():
        account = Account([], {"clvq": len(classes)}, [])
        write_part(folder, part, [book(c) for c in classes], account, latent_shape=SHAPE, prior_id="prior")
    Counted.reads.clear()
    yield folder
    Counted.reads.clear()


def change(name: str, data: bytes | None) -> None:
    store = MemoryFileSystem()
    store.rm(f"/store/codebook/{name}")
    if data is not None:
        store.pipe_file(f"/store/codebook/{name}", data)


def content(name: str) -> bytearray:
    return bytearray(MemoryFileSystem().cat_file(f"/store/codebook/{name}"))


def group_bytes(name: str, classes: list[int]) -> int:
    with fsspec.open(f"memory://store/codebook/{name}", "rb") as f:
        metadata = pq.read_metadata(f)
    return sum(metadata.row_group(i).total_byte_size for i in classes)


@pytest.mark.parametrize("wanted", [[0], [3], [0, 1], [0, 3], [0, 1, 3]])
def test_of_a_part_its_end_and_the_row_groups_of_the_classes_are_read(codebook: Folder, wanted: list[int]) -> None:
    part = Part(codebook, FILE)
    assert part.class_ids.tolist() == PARTS[0] and part.rows.tolist() == [2, 3, 2]
    end = sum(Counted.read_of(".parquet"))
    assert end == len(content(FILE)) - 4 - group_bytes(FILE, [0, 1, 2])
    table = part.read(wanted)
    assert sum(Counted.read_of(".parquet")) - end == group_bytes(FILE, [PARTS[0].index(c) for c in wanted])
    assert len(Counted.read_of(".parquet")) == 1 + (2 if wanted == [0, 3] else 1)  # neighbours come together
    whole = read_part(codebook, FILE)
    rows = np.isin(whole["class_id"].to_numpy(), wanted)
    assert table.equals(whole.filter(rows)) and table.schema.metadata == whole.schema.metadata


def test_one_that_is_asked_again_reads_what_is_new(codebook: Folder) -> None:
    rows = LastRows(codebook)
    first = rows.of([0, 1], [FILE])
    assert {c: t["class_id"].to_pylist() for c, t in first.items()} == {0: [0, 0], 1: [1, 1, 1]}
    for again, new in (([1], []), ([1, 3], [2]), ([3], []), ([3, 4], [0])):
        before = sum(Counted.read_of(".parquet"))
        files = [FILE] if 4 not in again else [FILE, "part-00001.parquet"]
        found = rows.of(again, files)
        assert sorted(found) == again
        assert all(t["centroid_id"].to_pylist() == list(range(book(c).k)) for c, t in found.items())
        read = sum(Counted.read_of(".parquet")) - before
        if 4 in again:
            assert read == len(content("part-00001.parquet")) - 4
        else:
            assert read == (group_bytes(FILE, new) if new else 0)


def test_classes_one_after_another_take_one_request_a_part(codebook: Folder) -> None:
    names, classes, dim = parts_with_classes(codebook)
    assert classes == list(PARTS.values()) and dim == D
    Counted.reads.clear()
    rows = ClassRows(codebook, dict(zip(names, classes, strict=True)))
    for c in (c for ids in classes for c in ids):
        assert rows.of(c)["count"].to_pylist() == book(c).counts.tolist()
    assert len(Counted.read_of(".parquet")) == 2 * len(PARTS)


def test_damage_is_told_of_the_class_that_it_is_in(codebook: Folder) -> None:
    data = content(FILE)
    with fsspec.open(f"memory://store/codebook/{FILE}", "rb") as f:
        first = pq.read_metadata(f).row_group(1).column(0).data_page_offset
    for at in (first, first + 300, first + group_bytes(FILE, [1]) - 1):
        damaged = data.copy()
        damaged[at] ^= 0x10
        change(FILE, bytes(damaged))
        part = Part(codebook, FILE)
        assert part.read([0, 3]).num_rows == 4
        with pytest.raises(ValueError, match=rf"{FILE} is damaged: class 1 .*run the quantize stage"):
            part.read([0, 1])
    change(FILE, bytes(data))
    assert Part(codebook, FILE).read([1]).num_rows == 3


@pytest.mark.parametrize("how", ["missing", "cut", "longer", "empty", "last byte", "footer"])
def test_a_part_that_is_not_whole_is_told_as_it_is_opened(codebook: Folder, how: str) -> None:
    data = content(FILE)
    for at in {"last byte": [-1], "footer": [-9, -200]}.get(how, []):
        data[at] ^= 0x10
    changed = {"missing": None, "cut": data[:-1], "longer": data + b"x", "empty": b""}.get(how, data)
    change(FILE, None if changed is None else bytes(changed))
    words = "missing" if how == "missing" else "damaged"
    for look in (lambda: Part(codebook, FILE), lambda: list(open_parts(codebook))):
        with pytest.raises(ValueError, match=rf"{FILE} is {words}.*run the quantize stage"):
            look()


def test_any_byte_of_a_record_that_changes_is_told(codebook: Folder) -> None:
    name = "part-00000.json"
    data = content(name)
    for at in range(0, len(data) - 1, 7):
        damaged = data.copy()
        damaged[at] ^= 0x01
        change(name, bytes(damaged))
        try:
            told = Part(codebook, FILE).record  # blanks between values may be others
            change(name, bytes(data))
            assert told == Part(codebook, FILE).record
        except ValueError as error:
            assert f"{name} is damaged" in str(error)


def test_a_record_of_an_older_run_has_its_part_read_whole(codebook: Folder) -> None:
    name = "part-00000.json"
    row = json.loads(content(name))
    for key in ("check", "row_groups", "footer"):
        del row[key]
    expected = Part(codebook, FILE).read([1, 3])
    change(name, json.dumps(row).encode())
    part = Part(codebook, FILE)
    assert part.class_ids.tolist() == PARTS[0] and part.rows.tolist() == [2, 3, 2] and part.latent_shape == SHAPE
    assert part.read([1, 3]).equals(expected)
    data = content(FILE)
    data[50] ^= 1
    change(FILE, bytes(data))
    with pytest.raises(ValueError, match=rf"{FILE} is damaged"):
        part.read([1])


def test_a_codebook_of_fewer_centroids_than_were_made_is_refused(codebook: Folder) -> None:
    codebook.publish_json("manifest.json", {"centroids": 99})
    with pytest.raises(ValueError, match="had 99 centroids when it was finished"):
        list(open_parts(codebook))


def test_a_part_without_classes(codebook: Folder) -> None:
    write_part(codebook, 3, [], Account([10], {}, []), latent_shape=SHAPE, prior_id="prior")
    part = Part(codebook, "part-00003.parquet")
    assert part.class_ids.size == 0 and part.latent_shape == SHAPE
