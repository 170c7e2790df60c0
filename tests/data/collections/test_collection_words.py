"""Collections that are not what they seem: each is read whole, or refused in words that are true."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.collection_trees import picture, put, rows_of, survey, table, tree

from ddoq_ray.data.collections.torchvision_sets import TorchvisionSet
from ddoq_ray.data.samples import read_classes
from ddoq_ray.data.shard_index import train_and_val
from ddoq_ray.storage.transport import list_shards


@pytest.mark.parametrize("names", [("1.png", "2.png"), ("cat.1.png", "dog.1.png")])
def test_images_in_no_class_folder_are_not_called_missing(tmp_path: Path, names: tuple[str, ...]) -> None:
    tree(tmp_path / "a", *names)
    with pytest.raises(ValueError, match=r"holds 2 images in no class folder"):
        survey(tmp_path / "a")
    tree(tmp_path / "b", "train/cat/1.png", "train/dog/1.png", *(f"val/{n}" for n in names))
    with pytest.raises(ValueError, match=r"holds 2 images in no class folder.*dataset.heldout"):
        survey(tmp_path / "b")


def test_archives_one_folder_down_and_tars_of_classes(tmp_path: Path) -> None:
    put(tmp_path / "a/cat/cat.zip", b"PK\3\4")
    put(tmp_path / "a/dog/dog.zip", b"PK\3\4")
    (tmp_path / "b").mkdir()
    for name in ("n01", "n02"):  # as ILSVRC2012_img_train.tar unpacks
        put(tmp_path / "1.png", picture())
        with tarfile.open(tmp_path / "b" / f"{name}.tar", "w") as t:
            t.add(tmp_path / "1.png", f"{name}_1.png")
    for folder in "ab":
        with pytest.raises(ValueError, match="unpack"):
            survey(tmp_path / folder)


@pytest.mark.parametrize("values", [("train", "val", "query"), ("train", "train", "")])
def test_a_column_of_splits_that_says_no_split_of_some_rows(tmp_path: Path, values: tuple[str, ...]) -> None:
    tree(tmp_path, *(f"images/{i}.png" for i in range(6)))
    rows = "".join(f"images/{i}.png,{['cat', 'dog'][i % 2]},{values[i % 3]}\n" for i in range(6))
    (tmp_path / "metadata.csv").write_text("file_name,label,split\n" + rows)
    with pytest.raises(ValueError, match=r"2 of 6 rows have a split"):
        survey(tmp_path)


@pytest.mark.parametrize("form", ["{}", "../elsewhere/{}.png", "images/{}"])
def test_a_table_of_other_names_is_told_apart_from_one_without_labels(tmp_path: Path, form: str) -> None:
    tree(tmp_path, *(f"images/{i}.png" for i in range(4)))
    with pytest.raises(ValueError, match=r"none of the 4 images that its metadata names is there"):
        survey(table(tmp_path, [(form.format(i), ["cat", "dog"][i % 2]) for i in range(4)]))


def test_tables_without_rows_or_damaged(tmp_path: Path) -> None:
    tree(tmp_path, "images/1.png")
    with pytest.raises(ValueError, match="holds no row"):
        survey(table(tmp_path, []))
    (tmp_path / "metadata.csv").unlink()
    put(tmp_path / "metadata.parquet", b"PAR1xxxx")
    with pytest.raises(ValueError, match="is not a parquet file, or is damaged"):
        survey(tmp_path)


def saved(root: Path, state: dict) -> Path:
    root.mkdir()
    rows = rows_of([0, 1, 0])
    with pa.OSFile(str(root / "data-00000-of-00002.arrow"), "wb") as f, pa.ipc.new_stream(f, rows.schema) as w:
        w.write_table(rows)
    (root / "state.json").write_text(json.dumps(state))
    return root


def test_a_saved_dataset_of_which_a_part_is_gone_or_rows_were_chosen(tmp_path: Path) -> None:
    files = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
    with pytest.raises(ValueError, match=r"names 1 files that are not there.*data-00001-of-00002\.arrow"):
        survey(saved(tmp_path / "a", {"_data_files": files}))
    with pytest.raises(ValueError, match="flatten_indices"):
        survey(saved(tmp_path / "b", {"_data_files": files[:1], "_indices_files": [{"filename": "i.arrow"}]}))


def test_parquet_labels_that_are_none(tmp_path: Path) -> None:
    for name in ("mixed", "id", "hub"):
        (tmp_path / name).mkdir()
    pq.write_table(rows_of([0, 1]), tmp_path / "mixed/train-0.parquet")
    pq.write_table(rows_of(["cat", "dog"]), tmp_path / "mixed/train-1.parquet")
    with pytest.raises(ValueError, match=r"labels are numbers here and names there"):
        survey(tmp_path / "mixed")
    rows = rows_of(list(range(12)))
    pq.write_table(rows.rename_columns(["image", "id"]), tmp_path / "id/train-0.parquet")
    with pytest.raises(ValueError, match=r"is id the label\?"):
        survey(tmp_path / "id")
    hub = {"__key__": ["a", "b", "c"], "__url__": ["x"] * 3}
    rows = rows_of([0, 1, 0], hub).rename_columns(["png", "cls", *hub])
    pq.write_table(rows, tmp_path / "hub/train-0.parquet")
    assert len(survey(tmp_path / "hub").train.names) == 3


def test_brackets_and_braces_in_a_shard_folder_and_a_shard_listed_twice(tmp_path: Path) -> None:
    for folder in ("shards [2023]", "shards {a,b}"):
        put(tmp_path / folder / "s-0.tar", b"x")
        assert list_shards(str(tmp_path / folder)) == [str(tmp_path / folder / "s-0.tar")]
        assert list_shards(str(tmp_path / folder / "s-0.tar")) == [str(tmp_path / folder / "s-0.tar")]
    put(tmp_path / "p/s-0.tar", b"x")
    assert list_shards(f"{tmp_path}/p/{{s-0,s-0}}.tar") == [f"{tmp_path}/p/s-0.tar"]


def test_a_class_without_a_name_is_not_called_none(tmp_path: Path) -> None:
    put(tmp_path / "classes.json", b'[{"name": null}, {"name": "dog"}]')
    with pytest.raises(ValueError, match=r"class 0 has name=None; expected a text"):
        read_classes(str(tmp_path / "classes.json"))


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


def test_negative_labels_of_torchvision_are_no_class() -> None:
    rows = SimpleNamespace(targets=[1, -1, 0], data=np.zeros((3, 2, 2, 3), np.uint8))  # -1 would index the last class
    listing = TorchvisionSet("CIFAR10", "nowhere", None)._listing(rows, [0, 1])
    assert listing.class_ids.tolist() == [1, 0] and [r.name for r in listing.refused] == ["000000001"]
    assert all(r.harmless for r in listing.refused)
