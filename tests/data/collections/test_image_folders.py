"""Trees of image files: what is found, what is refused and why, and what is ambiguous."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ddoq_ray.data.collections.folders import ImageFolder
from ddoq_ray.data.collections.listing import Picture, extension_of, harmless, no_image
from ddoq_ray.data.pictures import encode_png
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.quarantine import Refusal

PNG = encode_png(np.arange(64, dtype=np.uint8).reshape(8, 8))


def fill(root: Path, *names: str, data: bytes = PNG) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def folder(root: Path, val: Path | None = None, classes: Path | None = None, column: str | None = None) -> ImageFolder:
    return ImageFolder(str(root), val and str(val), classes and str(classes), column)


def refused(source: ImageFolder, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        source.survey()
    assert all(w in str(error.value) for w in words), str(error.value)


def test_nested_files_sorted_by_name_whatever_the_order_on_disk(tmp_path: Path) -> None:
    fill(tmp_path, "dog/z.png", "cat/deep/er/a.JPEG", "cat/b.png", "dog/a.b.c.webp", "cat/ünï code.png")
    survey = folder(tmp_path).survey()
    assert [c.name for c in survey.classes] == ["cat", "dog"]
    assert survey.train.names == ["cat/b.png", "cat/deep/er/a.JPEG", "cat/ünï code.png", "dog/a.b.c.webp", "dog/z.png"]
    assert survey.train.class_ids.tolist() == [0, 0, 0, 1, 1]
    assert survey.train.sizes.tolist() == [len(PNG)] * 5
    assert survey.val is None and not survey.train.refused


def test_every_file_that_is_no_image_by_name_is_counted(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png", "cat/notes.txt", "cat/.DS_Store", "cat/noextension", "cat/x.gif", "stray.png")
    fill(tmp_path, "cat/.thumbnails/a.png", "cat/._a.png")
    fill(tmp_path, "README.md", "classes.json.bak", ".hidden/a.png", "empty/only.txt")
    (tmp_path / "void").mkdir()
    survey = folder(tmp_path).survey()
    assert survey.train.names == ["cat/a.png", "cat/noextension", "cat/x.gif"]  # by their content
    assert [c.name for c in survey.classes] == ["cat"]
    why = Counter(r.reason.partition(":")[0] for r in survey.train.refused)
    assert why["image outside a class folder"] == 1 and why["class folder without an image"] == 2
    assert all(harmless(r) for r in survey.train.refused if r.reason != "image outside a class folder")


def test_reading_keeps_the_bytes_and_tells_what_cannot_be_read(tmp_path: Path) -> None:
    fill(tmp_path, "c/a.png", "c/text.jpg", "c/empty.png")
    (tmp_path / "c/text.jpg").write_bytes(b"this is text, not a picture")
    (tmp_path / "c/empty.png").write_bytes(b"")
    (tmp_path / "c/gone.png").symlink_to(tmp_path / "nowhere")
    source = folder(tmp_path)
    names = source.survey().train.names
    got = dict(zip(names, source.read("train", names, Folder(str(tmp_path / "s"))), strict=True))
    assert got["c/a.png"] == Picture(PNG, "png")
    assert got["c/gone.png"] == Refusal("c/gone.png", "unreadable: No such file or directory")
    assert no_image(got["c/a.png"]) is None
    assert no_image(got["c/text.jpg"]) == "not an image in a known format"
    assert no_image(got["c/empty.png"]) == "empty file"


def test_extensions_in_a_shard() -> None:
    assert extension_of(Picture(PNG, "PNG")) == "png"
    assert extension_of(Picture(PNG)) == "png"
    assert extension_of(Picture(PNG, "JPEG")) == "jpeg"  # the name is kept; decoding goes by content


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    fill(tmp_path / "all", "n1/a.png", "n2/b.png")
    root = fill(tmp_path / "some", "cat/a.png")
    (root / "dog").symlink_to(tmp_path / "all/n2")
    (root / "cat/linked.png").symlink_to(tmp_path / "all/n1/a.png")
    (root / "cat/again").symlink_to(root / "cat")
    survey = folder(root).survey()
    assert survey.train.names == ["cat/a.png", "cat/linked.png", "dog/b.png"]
    assert survey.train.sizes.tolist() == [len(PNG)] * 3
    assert [(r.name, r.reason) for r in survey.train.refused] == [("cat/again", "no image extension")]


def test_train_and_val_trees(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/a.png", "train/dog/a.png", "validation/cat/b.png", "validation/dog/c.png")
    survey = folder(tmp_path).survey()
    assert survey.train.names == ["cat/a.png", "dog/a.png"]
    assert survey.val is not None and survey.val.names == ["cat/b.png", "dog/c.png"]
    source = folder(tmp_path / "train", tmp_path / "validation")
    assert source.survey().val.names == survey.val.names  # type: ignore[union-attr]
    assert [p.data for p in source.read("val", ["dog/c.png"], Folder("x"))] == [PNG]  # type: ignore[union-attr]


def test_a_tree_in_a_store(tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("train/cat/a.png", "train/dog/deep/b.png", "val/cat/a.png", "val/dog/c.png"):
        store.pipe_file(f"/test_a_tree_in_a_store/{name}", PNG)
    source = ImageFolder("memory://test_a_tree_in_a_store", None, None, None)
    survey = source.survey()
    assert survey.train.names == ["cat/a.png", "dog/deep/b.png"]
    assert survey.val is not None and survey.val.sizes.tolist() == [len(PNG)] * 2
    got = list(source.read("train", ["dog/deep/b.png", "cat/gone.png"], Folder(str(tmp_path))))
    assert got == [Picture(PNG, "png"), Refusal("cat/gone.png", "unreadable: FileNotFoundError")]


def test_trees_that_read_as_splits_and_as_classes(tmp_path: Path) -> None:
    refused(folder(tmp_path / "nothing"), "does not exist")
    root = fill(tmp_path / "a", "train/cat/a.png", "val/cat/a.png", "dog/a.png")
    refused(folder(root), "train, val beside dog", "dataset.path=", "rename")
    root = fill(tmp_path / "b", "train/cat/a.png", "val/cat/a.png", "test/cat/a.png")
    refused(folder(root), "test or val", f"dataset.val_path={root}/val")
    assert folder(root, root / "val").survey().val.names == ["cat/a.png"]  # type: ignore[union-attr]
    refused(folder(fill(tmp_path / "c", "val/cat/a.png", "test/cat/a.png")), "no train")
    root = fill(tmp_path / "d", "train/cat/a.png", "train/ox/a.png", "val/cat/a.png", "val/Ox/a.png")
    refused(folder(root), "different classes", "only in training: ox", "only in validation: Ox")


def test_empty_sources(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    refused(folder(tmp_path / "a"), "no class folder", "metadata.csv")
    refused(folder(fill(tmp_path / "b", "cat/a.txt")), "no image file in 1 class folders")
    refused(folder(fill(tmp_path / "c", "a.png", "b.png")), "no class folder")


def test_ambiguous_classes(tmp_path: Path) -> None:
    refused(folder(fill(tmp_path / "a", "Cat/a.png", "cat/a.png")), "Cat and cat")
    root = fill(tmp_path / "b", "1/a.png", "10/a.png", "2/a.png")
    assert [c.name for c in folder(root).survey().classes] == ["1", "2", "10"]
    (root / "classes.json").write_text(json.dumps(["10", "2", "1"]))
    assert folder(root).survey().train.class_ids.tolist() == [2, 0, 1]  # beside the data; names sorted as text
    given = tmp_path / "given.json"
    given.write_text(json.dumps(["1", "2", "3"]))
    refused(folder(root, classes=given), "not in the list: 10", "not in the source: 3")


def test_metadata_tables(tmp_path: Path) -> None:
    root = fill(tmp_path / "csv", "0001.png", "sub/0002.png", "0003.png", "0004.png", "0005.txt")
    (root / "metadata.csv").write_text("file_name,label\n0001.png,dog\nsub/0002.png,cat\n0003.png,\n0009.png,cat\n")
    survey = folder(root).survey()
    assert (survey.train.names, survey.train.class_ids.tolist()) == (["0001.png", "sub/0002.png"], [1, 0])
    assert [c.name for c in survey.classes] == ["cat", "dog"]
    assert Counter(r.reason for r in survey.train.refused) == {
        "no label in the metadata": 1, "named in the metadata, but not there": 1, "not named in the metadata": 1,
        "no image extension": 1,
    }  # fmt: skip
    root = fill(tmp_path / "json", "train/a.png", "train/b.png", "test/c.png")
    rows = [{"file_name": "a.png", "label": 1, "text": "x"}, {"file_name": "b.png", "label": 0, "text": "y"}]
    (root / "train/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused(folder(root), "test has neither class folders nor a metadata.csv")
    (root / "test/metadata.jsonl").write_text(json.dumps({"file_name": "c.png", "label": 1}))
    survey = folder(root).survey()
    assert (survey.train.class_ids.tolist(), survey.val.class_ids.tolist()) == ([1, 0], [1])  # type: ignore[union-attr]
    (root / "test/metadata.jsonl").write_text(json.dumps({"file_name": "c.png", "label": 2}))
    refused(folder(root), "only in validation: 2")


def test_metadata_that_is_ambiguous(tmp_path: Path) -> None:
    root = fill(tmp_path, "a.png", "b.png")
    table = root / "metadata.csv"
    table.write_text("file_name,breed,colour\na.png,pug,red\nb.png,cur,red\n")
    refused(folder(root), "breed, colour", "dataset.label_column=NAME")
    assert [c.name for c in folder(root, column="breed").survey().classes] == ["cur", "pug"]
    refused(folder(root, column="size"), "dataset.label_column=size", "breed")
    table.write_text("file_name,breed\na.png,pug\na.png,cur\n")
    refused(folder(root), "a.png is there twice", "pug")
    table.write_text("file_name,breed\na.png,Pug\nb.png,pug\n")
    refused(folder(root), "Pug and pug")
    table.write_text("name,breed\na.png,Pug\n")
    refused(folder(root), "no column file_name")
    (root / "metadata.jsonl").write_text("{}")
    refused(folder(root), "both there")
    table.unlink()
    (root / "metadata.jsonl").write_text("{")
    refused(folder(root), "cannot be read as jsonl")
