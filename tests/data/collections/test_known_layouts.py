"""Layouts in which well known datasets and programs leave their files: read as meant, or asked about."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.collection_trees import found, picture, put, rows_of, survey, table, tree

from ddoq_ray.data.collections.layout import check_shelf
from ddoq_ray.data.collections.listing import Picture, no_image
from ddoq_ray.data.samples import read_classes
from ddoq_ray.data.tar_writing import write_tar

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


def test_many_classes_are_looked_through_once(tmp_path: Path) -> None:
    classes = [f"class{chr(97 + i % 26)}{i}" for i in range(2000)]
    images = [f"{c}/{i}.png" for c in classes for i in range(100)]
    start = time.monotonic()
    check_shelf("there", classes, images, set())
    assert time.monotonic() - start < 10  # seconds; a look through all images for each class takes minutes


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


def test_folders_of_masks_are_not_trained_on(tmp_path: Path) -> None:
    tree(
        tmp_path, *(f"{c}/{part}/{i}.png" for c in ("COVID", "Normal") for part in ("images", "masks") for i in (1, 2))
    )
    s = survey(tmp_path)
    assert found(s) == (["COVID", "Normal"], 4, None) and all("/images/" in name for name in s.train.names)
    assert len(s.notes) == 1 and "4 images are masks of others" in s.notes[0]


def test_lists_of_splits_beside_class_folders_are_told(tmp_path: Path) -> None:
    tree(tmp_path / "a", *(f"{c}/{i}.png" for c in ("Forest", "River") for i in range(3)))
    for name in ("train.csv", "test.csv", "label_map.json"):
        put(tmp_path / "a" / name, b"Filename,Label\n")
    tree(tmp_path / "b", *(f"images/{c}/{i}.png" for c in ("albatross", "wren") for i in range(3)))
    put(tmp_path / "b/train_test_split.txt", b"1 0\n")
    for root, names in ((tmp_path / "a", "test.csv, train.csv"), (tmp_path / "b/images", "train_test_split.txt")):
        put(root / "training_log.txt", b"epoch 1")
        assert any(note.startswith(f"not read: {names}. All images") for note in survey(root).notes)


def told(place: Path | str, **keys: str) -> str:
    with pytest.raises(ValueError) as error:
        survey(place, **keys)
    return str(error.value)


def test_shards_of_captions_are_not_called_archives(tmp_path: Path) -> None:
    members = [m for i in range(3) for m in ((f"{i}.jpg", picture("JPEG")), (f"{i}.json", b"{}"), (f"{i}.txt", b"a"))]
    put(tmp_path / "a/00000.tar", write_tar(members))
    assert "00000.tar holds images with .json and .txt of the same key, and no label" in told(tmp_path / "a")
    put(tmp_path / "b/cifar-10-python.tar", write_tar([("cifar-10-batches-py/data_batch_1", b"x")]))
    assert "is an archive, not shards" in told(tmp_path / "b/cifar-10-python.tar")
    put(tmp_path / "c/s-0.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(60))
    for place in (tmp_path / "c", tmp_path / "c/s-0.tar.zst"):
        assert "unzstd" in told(place)


@pytest.mark.parametrize(
    ("name", "words"),
    [("pathmnist.npz", "NumPy's arrays"), ("train_32x32.mat", "MATLAB"), ("x/train.tfrecord", "TFRecord"),
     ("train.lmdb/data.mdb", "LMDB"), ("train.beton", "FFCV"), ("train.rec", "RecordIO"), ("split_train_x.h5", "HDF5"),
     ("train/shard.00000.mds", "Streaming"), ("x.feather", "Feather"), ("stl10_binary/train_X.bin", "raw bytes")],
)  # fmt: skip
def test_files_of_other_programs_are_named_with_the_way_out(tmp_path: Path, name: str, words: str) -> None:
    put(tmp_path / name, b"\x89" + bytes(60))
    for place in (tmp_path, tmp_path / name):
        assert words in told(place) and "write its images as files in a folder for each class" in told(place)


def test_cifar_where_torchvision_leaves_it(tmp_path: Path) -> None:
    put(tmp_path / "cifar-10-batches-py/data_batch_1", b"\x80\x02")
    assert "add dataset=torchvision dataset.torchvision=CIFAR10" in told(tmp_path)
    assert "give the folder above it" in told(tmp_path / "cifar-10-batches-py")


def test_what_a_contest_wants_is_no_table_of_labels(tmp_path: Path) -> None:
    tree(tmp_path, *(f"train/cat.{i}.png" for i in range(3)), "test/1.png")
    put(tmp_path / "sampleSubmission.csv", b"id,label\n1,0\n")
    assert "submission" not in told(tmp_path).lower()
    put(tmp_path / "labels.csv", b"id,label\ncat.0,cat\n")
    assert "is labels.csv its table?" in told(tmp_path)


def test_tables_by_partitions_and_without_images(tmp_path: Path) -> None:
    for c in ("cat", "dog"):
        (tmp_path / f"a/label={c}").mkdir(parents=True)
        pq.write_table(rows_of([0, 1]), tmp_path / f"a/label={c}/0.parquet")
    assert "its tables are apart by label (label=cat, label=dog)" in told(tmp_path / "a")
    (tmp_path / "b").mkdir()
    pq.write_table(pa.table({"image": ["aGk="] * 4, "label": [0, 1] * 2}), tmp_path / "b/train.parquet")
    assert "no column holds images as bytes (there: image of string, label of int64)" in told(tmp_path / "b")


@pytest.mark.parametrize(
    "given",
    ['{"dog": 1, "cat": 0}', '{"0": "cat", "1": "dog"}', '{"id2label": {"1": "dog", "0": "cat"}, "model_type": "vit"}'],
)
def test_class_lists_as_other_programs_write_them(tmp_path: Path, given: str) -> None:
    put(tmp_path / "classes.json", given.encode())
    assert [(c.class_id, c.name) for c in read_classes(str(tmp_path / "classes.json"))] == [(0, "cat"), (1, "dog")]
    for bad in ('{"dog": 1, "cat": 1}', '{"dog": 1, "cat": 2}', '{"0": "cat", "dog": 1, "x": {}}'):
        put(tmp_path / "classes.json", bad.encode())
        with pytest.raises(ValueError, match=r"expected a non-empty JSON list of classes, got a JSON dict"):
            read_classes(str(tmp_path / "classes.json"))


@pytest.mark.parametrize("text", ["cat\nhot dog\n", "0 cat\r\n1 hot dog\r\n", "1,cat\n\n2,hot dog"])
def test_class_lists_of_lines(tmp_path: Path, text: str) -> None:
    put(tmp_path / "classnames.txt", text.encode())
    assert [c.name for c in read_classes(str(tmp_path / "classnames.txt"))] == ["cat", "hot dog"]


def test_idx_files_of_other_names_and_files_that_are_no_pictures(tmp_path: Path) -> None:
    for part in ("train-images-idx3", "train-labels-idx1"):
        put(tmp_path / f"a/emnist-letters-{part}-ubyte.gz", b"\x1f\x8b")
    assert "IDX files of other names than MNIST's (emnist-letters-train-images-idx3" in told(tmp_path / "a")
    for c in ("cat", "dog"):
        put(tmp_path / "b" / c / "1.mp4", b"x")
    assert "(there: cat/, dog/; in all 2 *.mp4)" in told(tmp_path / "b")


def test_folders_of_domains_and_a_single_folder_are_noted(tmp_path: Path) -> None:
    tree(tmp_path / "a", *(f"{domain}/images/{c}/1.png" for domain in ("amazon", "dslr") for c in ("bike", "mug")))
    assert any("each holds images/bike, images/mug" in note for note in survey(tmp_path / "a").notes)
    tree(tmp_path / "b", *(f"UTKFace/{i}_0_0.png" for i in range(3)))
    assert any("there is one class, UTKFace" in note for note in survey(tmp_path / "b").notes)


def test_a_column_of_splits_in_a_parquet_file(tmp_path: Path) -> None:
    splits = ["train", "train", "train", "validation", "test", "train"]
    pq.write_table(rows_of([0, 1, 0, 1, 0, 1], {"split": splits}), tmp_path / "a.parquet")
    s = survey(tmp_path)
    assert found(s) == (["0", "1"], 4, 1)
    assert s.val is not None and s.val.names == ["000000#000000003"]
    assert any("holds val rows: they serve as validation and others are not used" in note for note in s.notes)
    for values in ([0, 0, 1, 1, 2, 2], ["train", "train", "x", "test", "train", "test"]):
        pq.write_table(rows_of([0, 1] * 3, {"split": values}), tmp_path / "a.parquet")
        assert "the column split holds " in told(tmp_path)
    pq.write_table(rows_of([0, 1] * 3, {"set": ["A", "B"] * 3}), tmp_path / "a.parquet")  # of a game, say
    assert found(survey(tmp_path)) == (["0", "1"], 6, None)


def test_tables_that_the_hub_converted_in_part(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"default/partial-{split}").mkdir(parents=True)
        pq.write_table(rows_of([0, 1]), tmp_path / f"default/partial-{split}/0000.parquet")
    assert found(survey(tmp_path)) == (["0", "1"], 2, 2)


def test_a_tiff_of_many_bands_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    bands, head = 13, struct.pack("<H", 9)
    tags = [(256, 4, 2), (257, 4, 2), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, bands), (278, 4, 2),
            (279, 4, 8 * bands)]  # fmt: skip
    bits = 8 + 8 * bands
    for tag, kind, value in tags:
        count, value = (bands, bits) if tag == 258 else (1, value)
        head += struct.pack("<HHII", tag, kind, count, value)
    data = b"II*\0" + struct.pack("<I", bits + 2 * bands) + bytes(8 * bands) + struct.pack("<H", 16) * bands + head
    assert "a TIFF of 13 x 16-bit samples" in str(no_image(Picture(data + bytes(4), "tif")))
    assert capfd.readouterr().err == ""
