"""Stored labels: what is missing is made, what is damaged is refused by name, a wrong teacher stops before any."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddoq_ray.config.compose import load_config
from ddoq_ray.stages.label.step import Label, _units, read_labels
from ddoq_ray.stages.label.teacher import Named
from ddoq_ray.stages.label.teacher_check import judge
from ddoq_ray.stages.synthesize.step import Synthesize
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import LabelKey, Place
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.records import ClassInfo, fixed_binary, label_schema

STEP = Label(Synthesize(Place()), Place(), LabelKey("teacher", "protocol", 16))
SHARDS = [{"name": "images-000000", "images": 4}, {"name": "images-000001", "images": 2}]


def config(unit: int, steps: int = 50) -> Any:
    return load_config([f"labels.epochs_per_unit={unit}", f"protocol.steps={steps}", "protocol.batch=6"])


def write_epoch(labels: Folder, epoch: int) -> None:
    offset = 0
    for shard in SHARDS:
        ids = np.arange(offset, offset + shard["images"])
        offset += shard["images"]
        rows = (ids[:, None] + np.arange(4) + epoch).astype(np.uint8)
        columns = [pa.array(ids), pa.array(np.full(len(ids), epoch, np.int32)), fixed_binary(rows)]
        out = io.BytesIO()
        pq.write_table(
            pa.Table.from_arrays(columns, schema=label_schema("logits", 4)), out, compression="NONE",
            use_dictionary=False, write_statistics=False, write_page_checksum=True,
        )  # fmt: skip
        labels.publish(f"epoch-{epoch:04d}/{shard['name']}.parquet", out.getvalue())


@pytest.fixture
def labels(tmp_path: Path) -> Folder:
    folder = Folder(str(tmp_path / "run")) / "labels"
    for epoch in range(3):
        write_epoch(folder, epoch)
    Artifact(folder, "label").finish({"views": 1}, shards=SHARDS)
    return folder


@pytest.mark.parametrize("unit", [1, 7, 25, 50, 200])
def test_units_are_the_epochs_that_are_missing_whatever_units_were_made_before(tmp_path: Path, unit: int) -> None:
    """Epochs 25 to 49 done, resumed with another unit size: epochs 0 to 24 must be made too."""
    run = Folder(str(tmp_path))
    for epoch in [*range(25, 50), 3]:
        for shard in SHARDS[: 1 if epoch == 3 else 2]:
            run.publish(f"{STEP.place}/epoch-{epoch:04d}/{shard['name']}.parquet", b"")
    units = _units(config(unit), run, STEP, {"items": 6, "shards": SHARDS})  # type: ignore[typeddict-item]
    made = [(u.name, e) for u in units for e in range(u.first, u.last)]
    assert len(made) == len(set(made)) and all(u.last - u.first <= unit for u in units)
    wanted = {("images-000000", e) for e in range(25) if e != 3} | {("images-000001", e) for e in range(25)}
    assert set(made) == wanted
    assert {(u.name, u.offset, u.images) for u in units} == {("images-000000", 0, 4), ("images-000001", 4, 2)}


def test_labels_come_back_in_image_order(labels: Folder) -> None:
    assert read_labels(labels, 2)[:, 0].tolist() == [2, 3, 4, 5, 6, 7]


def test_missing_and_damaged_labels_are_refused_by_name(labels: Folder) -> None:
    with pytest.raises(ValueError, match=r"epoch-0007/images-000000\.parquet is missing.*label stage"):
        read_labels(labels, 7)
    last = "epoch-0001/images-000001.parquet"
    whole = labels.read(last)
    labels.remove(last)
    with pytest.raises(ValueError, match=r"epoch-0001/images-000001\.parquet is missing"):
        read_labels(labels, 1)
    turned = bytearray(whole)
    turned[whole.index(bytes([5, 6, 7, 8]))] ^= 0x40
    for body in (whole[:-20], whole[: len(whole) // 2], b"", bytes(turned)):
        labels.publish(last, body)
        with pytest.raises(ValueError, match=r"images-000001\.parquet is damaged.*label stage"):
            read_labels(labels, 1)
    labels.publish(last, labels.read("epoch-0001/images-000000.parquet"))
    with pytest.raises(ValueError, match=r"labels of 4 images, and not those of images 4 to 5"):
        read_labels(labels, 1)
    labels.publish(last, whole)
    assert len(read_labels(labels, 1)) == 6


def test_the_identity_holds_what_views_are_cut_from() -> None:
    def stored(*keys: str) -> Any:
        return STEP.settings(load_config([*keys]))["views"]["stored"]

    assert stored("student.image_size=224", "protocol.val_crop=0.875") == 256
    assert stored("student.image_size=224") == 224


CLASSES = [ClassInfo(c, name, name, c) for c, name in enumerate(("cat", "dog", "owl"))]


def check(run: Folder, said: Named, classes: list[ClassInfo] = CLASSES) -> dict[str, Any]:
    return judge(load_config(), run, Data(run, tuple(classes), (), ()), said, ["a", "b", "c"])


def named(truth: np.ndarray, said: np.ndarray, **changed: Any) -> Named:
    return dataclasses.replace(Named(truth, said, said, 0, 0, ""), **changed)


def test_swapped_classes_stop_by_name(tmp_path: Path) -> None:
    run, truth = Folder(str(tmp_path)), np.repeat(np.arange(3), 20)
    assert check(run, named(truth, truth))["top1_pct"] == 100
    said = np.where(truth == 2, 2, 1 - truth)
    with pytest.raises(ValueError, match=r"images of 'cat' are called 'dog' in 100 %.*\n.*'dog' are called 'cat'"):
        check(run, named(truth, said))
    hard = np.where(truth == 1, 0, truth)  # no dog is recognised; but cats are
    assert check(run, named(truth, hard))["top1_pct"] == pytest.approx(66.7, abs=0.1)


def test_a_teacher_that_is_not_a_number_is_called_that(tmp_path: Path) -> None:
    truth = np.repeat(np.arange(3), 4)
    with pytest.raises(ValueError, match=r"outputs are not finite .* 12 of 12"):
        check(Folder(str(tmp_path)), named(truth, truth * 0, not_finite=12))
    with pytest.raises(ValueError, match=r"top-1 33\.33 % .*teacher\.min_top1=50"):
        check(Folder(str(tmp_path)), named(truth, truth * 0))


def test_what_the_check_does_not_cover_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Folder(str(tmp_path))
    check(run, named(np.zeros(8, np.int64), np.zeros(8, np.int64)), CLASSES[:1])
    assert "one class" in capsys.readouterr().err
    check(run, named(np.zeros(8, np.int64), np.zeros(8, np.int64)))
    assert "2 of 3 classes have no validation image" in (told := capsys.readouterr().err) and "dog, owl" in told


def test_too_many_unreadable_images_stop_before_any_label(tmp_path: Path) -> None:
    truth = np.repeat(np.arange(3), 4)
    with pytest.raises(ValueError, match="12 of 24 validation images refused"):
        check(Folder(str(tmp_path)), named(truth, truth, refused=12, reasons="undecodable image: 12"))
