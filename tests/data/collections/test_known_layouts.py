"""Layouts in which well known datasets and programs leave their files: read as meant, or asked about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.collection_trees import found, put, survey, table, tree

WNIDS = ("n01443537", "n01629819", "n02086240")


def tiny_imagenet(root: Path) -> Path:
    tree(root, *(f"train/{w}/images/{w}_{i}.png" for w in WNIDS for i in range(4)))
    tree(root, *(f"{split}/images/{split}_{i}.png" for split in ("val", "test") for i in range(6)))
    lines = [f"val_{i}.png\t{WNIDS[i % 3]}\t0\t32\t44\t62\n" for i in range(6)]
    put(root / "val/val_annotations.txt", "".join(lines).encode())
    put(root / "words.txt", b"n01443537\tgoldfish, Carassius auratus\nn01629819\tEuropean fire salamander\n")
    return root


def test_tiny_imagenet_as_it_is_unpacked(tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path / "tiny-imagenet-200")
    s = survey(root)
    assert found(s) == (list(WNIDS), 12, 6)
    assert [c.prompt for c in s.classes] == ["goldfish", "European fire salamander", "Shih-Tzu"]
    assert s.val is not None
    assert [s.val.names[np.flatnonzero(s.val.class_ids == 1)[0]], s.train.names[4]] == [
        "images/val_1.png",
        "n01629819/images/n01629819_0.png",
    ]
    assert found(survey(root / "train", val_path=str(root / "val"))) == found(s)
    with pytest.raises(ValueError, match=rf"give dataset.path={root} where these are classes or splits"):
        survey(root.parent)
    (root / "words.txt").unlink()
    with pytest.raises(ValueError, match=r"words of 2 of them are not known here.*put a words.txt there"):
        survey(root)


def test_class_folders_to_train_on_and_a_table_of_validation_images(tmp_path: Path) -> None:
    tree(tmp_path, *(f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(4)))
    tree(tmp_path, *(f"val/{i}.png" for i in range(4)))
    table(tmp_path / "val", [(f"{i}.png", ["dog", "cat"][i % 2]) for i in range(4)])
    s = survey(tmp_path)
    assert found(s) == (["cat", "dog"], 8, 4)
    assert s.val is not None and s.val.class_ids.tolist() == [1, 0, 1, 0]
    table(tmp_path / "val", [(f"{i}.png", ["dog", "owl"][i % 2]) for i in range(4)])
    with pytest.raises(ValueError, match=r"different classes: only in validation: owl"):
        survey(tmp_path)


@pytest.mark.parametrize("form", ["images/{}.png", "images/{}", "{}.png", "{}", "/data/set/{}", ".\\images\\{}"])
def test_images_that_a_table_names_without_folder_or_ending(tmp_path: Path, form: str) -> None:
    tree(tmp_path, *(f"images/{i}.png" for i in range(4)), "images/0.txt")
    s = survey(table(tmp_path, [(form.format(i), ["cat", "dog"][i % 2]) for i in range(4)]))
    assert found(s) == (["cat", "dog"], 4, None)


def test_a_short_name_of_two_images_is_of_none(tmp_path: Path) -> None:
    tree(tmp_path, "a/0.png", "b/0.png", "a/1.png", "a/2.png", "a/2.jpg")
    s = survey(table(tmp_path, [("0.png", "cat"), ("1", "dog"), ("2", "dog")]))
    assert s.train.names == ["a/1.png"]
    assert {r.name for r in s.train.refused if r.reason == "named in the metadata, but not there"} == {"0.png", "2"}


@pytest.mark.parametrize("column", ["File_Name", "filename", "file name", "FileName"])
def test_the_column_of_names_in_other_writings(tmp_path: Path, column: str) -> None:
    tree(tmp_path, *(f"{i}.png" for i in range(4)))
    put(tmp_path / "metadata.csv", f"{column},Label\n0.png,cat\n1.png,dog\n2.png,cat\n3,dog\n".encode())
    assert found(survey(tmp_path)) == (["cat", "dog"], 4, None)


@pytest.mark.parametrize(
    ("column", "train", "held"),
    [("phase", "train", "valid"), ("Usage", "Training", "PublicTest"), ("data set", "train", "test"),
     ("is_training", "1", "0"), ("is_train", "True", "False"), ("is_test", "0.0", "1.0")],
)  # fmt: skip
def test_a_column_of_splits_is_known_by_its_values(tmp_path: Path, column: str, train: str, held: str) -> None:
    tree(tmp_path, *(f"{i}.png" for i in range(6)))
    rows = [f"{i}.png,{['cat', 'dog'][i % 2]},{held if i > 3 else train}" for i in range(6)]
    put(tmp_path / "metadata.csv", "\n".join([f"file_name,label,{column}", *rows]).encode())
    assert found(survey(tmp_path)) == (["cat", "dog"], 4, 2)


def test_splits_that_are_numbers_or_in_two_columns_are_asked_about(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{i}.png" for i in range(4)))
    for head, tail in (("split", "{}"), ("phase,stage", "{0},{0}")):
        split = ["train", "val"] if "," in head else ["0", "2"]
        rows = [f"{i}.png,{'cat' if i < 2 else 'dog'},{tail.format(split[i % 2])}" for i in range(4)]
        put(tmp_path / "metadata.csv", "\n".join([f"file_name,label,{head}", *rows]).encode())
        with pytest.raises(ValueError, match=r"is no split \(0, 2\)|Candidates: phase, stage"):
            survey(tmp_path)


@pytest.mark.parametrize("labels", [["cat", "dog", "cat dog"], ["[0]", "[1]", "[0, 1]"]])
def test_several_labels_in_one_are_no_class(tmp_path: Path, labels: list[str]) -> None:
    tree(tmp_path, *(f"{i}.png" for i in range(6)))
    table(tmp_path, [(f"{i}.png", f'"{labels[i % 3]}"') for i in range(6)])
    with pytest.raises(ValueError, match=r"is several labels of one image|expected a class's name or whole number"):
        survey(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["images/a_1.png", "images/b_1.png", "annotations/trimaps/a_1.png"], "images is beside annotations, and its"),
        ([f"HAM10000_images_part_{i}/{i}.png" for i in (1, 2)], "named as parts of one collection"),
        ([f"images_{i:03d}/images/{i}.png" for i in (1, 2)], "named as parts of one collection"),
        (["Plants/Plants/oak/1.png", "Plants/Plants/elm/1.png", "Plants/oak/1.png", "Plants/elm/1.png"],
         "Plants holds elm, oak, which are folders beside it too"),
    ],
)  # fmt: skip
def test_folders_that_hardly_are_classes_are_asked_about(tmp_path: Path, names: list[str], words: str) -> None:
    root = tree(tmp_path, *names) / ("Plants" if names[0].startswith("Plants") else "")
    with pytest.raises(ValueError, match=words):
        survey(root)


def test_masks_beside_images_are_not_trained_on(tmp_path: Path) -> None:
    for c in ("benign", "normal"):
        tree(
            tmp_path, *(f"{c}/{c} ({i}){end}.png" for i in range(3) for end in ("", "_mask")), f"{c}/{c} (0)_mask_1.png"
        )
    s = survey(tmp_path)
    assert found(s) == (["benign", "normal"], 6, None)
    assert any("8 images are masks of others by their names" in note for note in s.notes)


def test_lists_of_splits_beside_class_folders_are_told(tmp_path: Path) -> None:
    tree(tmp_path / "a", *(f"{c}/{i}.png" for c in ("Forest", "River") for i in range(3)))
    for name in ("train.csv", "test.csv", "label_map.json"):
        put(tmp_path / "a" / name, b"Filename,Label\n")
    tree(tmp_path / "b", *(f"images/{c}/{i}.png" for c in ("albatross", "wren") for i in range(3)))
    put(tmp_path / "b/train_test_split.txt", b"1 0\n")
    for root, names in ((tmp_path / "a", "test.csv, train.csv"), (tmp_path / "b/images", "train_test_split.txt")):
        assert any(note.startswith(f"{names} are not read") for note in survey(root).notes)
