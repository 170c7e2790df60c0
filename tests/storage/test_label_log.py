"""Label files: planned from counts, made when missing, the same bytes by any worker, refused by name when damaged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from support.stale_listing import stale_listings

from ddoq_ray.data import soft_labels
from ddoq_ray.data.soft_labels import EpochFile, SoftLabels
from ddoq_ray.storage import label_grid
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.label_grid import LabelGrid
from ddoq_ray.storage.label_log import LabelStore, Making, check_file, finished_file, finished_files, write_labels

MADE_FROM = digest_of({"views": 1})


def grid(images: int = 10, epochs: int = 7, nbytes: int = 4, **bounds: int) -> LabelGrid:
    return LabelGrid.of(
        (images, epochs), nbytes, **{"batch": 3, "file_bytes": 1 << 20, "file_labels": 20} | bounds
    )  # fmt: skip


def answer(epoch: int, first: int, end: int) -> tuple[npt.NDArray[np.uint8], bytes]:
    ids = np.arange(first, end)
    return (ids[:, None] * 16 + np.arange(4) + epoch).astype(np.uint8), ids.tobytes()


def store(folder: Folder, of: LabelGrid, only: Any = None) -> LabelStore:
    for file in of.all() if only is None else map(of.file, only):
        write_labels(folder, file, Making(of, "logits", MADE_FROM, (of.images, 8, 8)), answer)
    Artifact(folder, "label").finish({"views": 1}, codec="logits", grid=dataclasses.asdict(of), outputs=2)
    return LabelStore(folder)


@pytest.mark.parametrize(
    "images,epochs,nbytes,files,size",
    [
        (100, 400, 20, 2, 0),  # digits: two, for two teachers
        (100, 1, 20, 1, 0),
        (50_000, 300, 516, 60, 64),  # ImageNet-1K, 50 a class, features
        (50_000, 300, 2000, 300, 64),  # the same in logits: an epoch is 100 MB
        (104_500, 300, 516, 150, 64),  # ImageNet-21K-P, 10 a class, features of 512
        (104_500, 300, 2 * 10_450, 5100, 64),  # the same in logits: an epoch is 2.2 GB
        (1_000_000, 20, 100, 80, 0),
        (20, 262_144, 20, 21, 0),  # fewer images than an inner batch: whole epochs, 13,107 a file at most
    ],
)
def test_files_are_few_and_of_one_size(images: int, epochs: int, nbytes: int, files: int, size: int) -> None:
    planned = LabelGrid.of((images, epochs), nbytes, batch=250, file_bytes=128 << 20, file_labels=1 << 18)
    assert planned.files == files
    first = planned.file(0)
    assert first.labels <= 1 << 18 and size << 20 <= first.labels * nbytes <= 128 << 20


@pytest.mark.parametrize("bounds", [{}, {"file_labels": 4}, {"file_labels": 1}, {"file_bytes": 30}, {"batch": 50}])
def test_every_label_is_in_one_file_and_inner_batches_are_never_cut(bounds: dict[str, int]) -> None:
    planned = grid(**bounds)
    seen = np.zeros((7, 10), int)
    for file in planned.all():
        assert file.labels <= max(planned.batch, bounds.get("file_labels", 20))
        assert all(first % planned.batch == 0 for first, _ in planned.groups(file))
        seen[file.first_epoch : file.end_epoch, file.first_image : file.end_image] += 1
        for epoch in range(file.first_epoch, file.end_epoch):
            assert file in planned.of_epoch(epoch)
    assert (seen == 1).all()
    with pytest.raises(ValueError, match="7 epochs, 0 to 6, and none of 7"):
        planned.of_epoch(7)


@pytest.mark.parametrize("bounds", [{}, {"file_labels": 4}])
@pytest.mark.parametrize("held", [1 << 20, 1])
def test_labels_come_back_in_image_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounds: dict[str, int], held: int
) -> None:
    """However they lie in files, and whether an epoch is held in memory or in a file."""
    monkeypatch.setattr(label_grid, "GROUP_LABELS", 3)
    monkeypatch.setattr(soft_labels, "MEMORY_BYTES", held)
    monkeypatch.setattr(soft_labels, "KEPT_BYTES", 1)
    labels = Folder(str(tmp_path))
    read = SoftLabels(store(labels, grid(**bounds)).folder)
    order = np.random.default_rng(0).permutation(10)
    for epoch in (0, 1, 2, 6, 3, 3):
        found = read.epoch(epoch)
        assert isinstance(found, EpochFile) == (held == 1)
        assert (found[order] == answer(epoch, 0, 10)[0][order]).all()
        assert len(read._read) <= 2
    table = pq.read_table(tmp_path / "labels-000000.parquet").to_pydict()
    assert table["image_id"][:3] == [0, 1, 2] and set(table["epoch"]) <= {0, 1}


def test_what_is_missing_is_made_and_files_are_the_same_bytes(tmp_path: Path) -> None:
    planned, labels = grid(), Folder(str(tmp_path / "labels"))
    assert finished_files(labels, planned, MADE_FROM) == {}
    store(labels, planned, [0, 2])
    assert list(finished_files(labels, planned, MADE_FROM)) == [0, 2]
    assert finished_files(labels, planned, digest_of({"views": 2})) == {}
    before = {name: labels.read(name) for name in labels.names("labels-*")}
    store(labels, planned)
    assert {name: labels.read(name) for name in before} == before
    assert len(finished_files(labels, planned, MADE_FROM)) == planned.files == 4
    labels.remove("labels-000001.parquet")  # a record without its file, a file that is cut, a record that is changed
    labels.publish("labels-000002.parquet", before["labels-000002.parquet"][:-1])
    labels.publish("labels-000003.json", labels.read("labels-000003.json").replace(b'"bytes": ', b'"bytes": 1'))
    assert list(finished_files(labels, planned, MADE_FROM)) == [0]


def test_a_file_is_found_by_its_name_where_listings_are_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that other machines have published just now, of which NFS may tell in half a minute."""
    folder, of = Folder(str(tmp_path)), grid()
    stale_listings(monkeypatch)
    assert finished_files(folder, of, MADE_FROM) == {} and finished_file(folder, of.file(0), MADE_FROM) is None
    store(folder, of, only=[0, 1])
    assert finished_files(folder, of, MADE_FROM) == {}
    record = finished_file(folder, of.file(0), MADE_FROM)
    assert record is not None and record.bytes == folder.size(of.file(0).name)
    assert finished_file(folder, of.file(1), "another") is None and finished_file(folder, of.file(2), MADE_FROM) is None


def test_every_byte_of_a_file_is_checked_by_readers_and_beforehand(tmp_path: Path) -> None:
    """No bit of it can turn unseen: in labels, ids, page headers, the footer, the magic words."""
    planned, labels = grid(epochs=4), Folder(str(tmp_path))
    stored = store(labels, planned)
    whole = labels.read("labels-000000.parquet")
    for at in range(len(whole)):
        turned = bytearray(whole)
        turned[at] ^= 0x40
        (tmp_path / "labels-000000.parquet").write_bytes(bytes(turned))
        with pytest.raises(ValueError, match=r"labels-000000\.parquet is damaged.*epochs 0 to 1.*label stage"):
            check_file(labels, planned.file(0), (planned, stored.manifest["identity_digest"]))
    turned = bytearray(whole)
    turned[whole.index(bytes(answer(1, 4, 5)[0]))] ^= 1
    labels.publish("labels-000000.parquet", bytes(turned))
    read = SoftLabels(labels)
    assert len(read.epoch(0)[np.arange(10)]) == 10  # the other epoch is whole
    with pytest.raises(ValueError, match=r"labels-000000\.parquet is damaged"):
        read.epoch(1)
    labels.publish("labels-000000.parquet", whole)
    assert (read.epoch(1)[np.arange(10)] == answer(1, 0, 10)[0]).all()  # mended meanwhile


def test_what_is_gone_or_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    planned, labels = grid(), Folder(str(tmp_path))
    stored = store(labels, planned)
    whole = {name: labels.read(name) for name in labels.names("labels-*")}
    labels.remove("labels-000001.parquet")
    with pytest.raises(ValueError, match=r"labels-000001\.parquet is missing, with the labels of epochs 2 to 3"):
        stored.read(2)
    labels.remove("labels-000002.json")
    with pytest.raises(ValueError, match=r"labels-000002\.json is missing.*label stage"):
        stored.read(4)
    labels.publish("labels-000003.parquet", whole["labels-000003.parquet"][:-9])
    with pytest.raises(ValueError, match=r"labels-000003\.parquet is damaged: it has .* bytes of the"):
        stored.read(6)
    # A file of the same set, with its record, in another one's place.
    for ending in ("parquet", "json"):
        labels.publish(f"labels-000002.{ending}", whole[f"labels-000000.{ending}"])
    with pytest.raises(ValueError, match=r"labels-000002\.parquet is damaged: .*of epoch 4"):
        stored.read(4)
    other = Folder(str(tmp_path / "other"))
    write_labels(other, planned.file(0), Making(planned, "logits", digest_of("another teacher"), (10, 8, 8)), answer)
    for ending in ("parquet", "json"):
        labels.publish(f"labels-000000.{ending}", other.read(f"labels-000000.{ending}"))
    with pytest.raises(ValueError, match=r"labels-000000\.parquet holds labels of another teacher"):
        LabelStore(labels).read(0)


def test_a_store_without_labels_says_so(tmp_path: Path) -> None:
    Artifact(Folder(str(tmp_path)), "label").finish({}, codec="online")
    with pytest.raises(ValueError, match=r"labels\.mode=online"):
        LabelStore(Folder(str(tmp_path)))
    (tmp_path / "manifest.json").write_text(json.dumps({}))
