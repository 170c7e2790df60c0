"""Collections as people really have them: each kind ends in the right classes and splits, or in words that help."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.collection_trees import found, picture, put, rows_of, survey, table, tree

from ddoq_ray.data.collections.listing import harmless
from ddoq_ray.data.pictures import RefusedPicture, decode_rgb


@pytest.mark.parametrize(
    ("train", "held"),
    [("Train", "Test"), ("Training", "Testing"), ("TRAIN", "VAL"), ("train_images", "val_images"),
     ("train2017", "val2017"), ("training_set", "test_set"), ("train", "dev")],
)  # fmt: skip
def test_split_words_in_their_usual_forms_are_splits(tmp_path: Path, train: str, held: str) -> None:
    tree(tmp_path, *(f"{s}/{c}/{i}.png" for s, n in ((train, 4), (held, 2)) for c in ("cat", "dog") for i in range(n)))
    assert found(survey(tmp_path)) == (["cat", "dog"], 8, 4)


def test_what_could_be_split_or_class_is_asked_about(tmp_path: Path) -> None:
    tree(tmp_path / "a", "train/cat/1.png", "test/cat/1.png", "dog/1.png")
    with pytest.raises(ValueError, match=r"beside dog: splits, or classes"):
        survey(tmp_path / "a")
    tree(tmp_path / "b", "photos/cat/1.png", "photos/dog/1.png")
    with pytest.raises(ValueError, match=rf"give dataset.path={tmp_path}/b/photos"):
        survey(tmp_path / "b")
    tree(tmp_path / "c", "train/cat/1.png", "train/dog/1.png")
    (tmp_path / "c/val/cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"val holds no image.*dataset.heldout"):
        survey(tmp_path / "c")


def test_what_systems_leave_is_neither_class_nor_image(tmp_path: Path) -> None:
    tree(tmp_path, "cat/1.png", "dog/1.png")
    for name in ("__MACOSX/cat/._1.png", "cat/._1.png", "cat/.DS_Store", "@eaDir/cat/1.png", "$RECYCLE.BIN/x.png",
                 "lost+found/x.png", ".git/x.png", "dog/Thumbs.db", ".ipynb_checkpoints/1.png"):  # fmt: skip
        put(tmp_path / name, b"\0\5\x16\7" * 9)
    s = survey(tmp_path)
    assert found(s) == (["cat", "dog"], 2, None) and all(harmless(r) for r in s.train.refused)


def test_pictures_are_known_by_content_and_others_by_name(tmp_path: Path) -> None:
    tree(tmp_path, "cat/1.png", "dog/1.png")
    for name, kind in (
        ("web.jfif", "JPEG"),
        ("old.jpe", "JPEG"),
        ("none", "JPEG"),
        ("anim.gif", "GIF"),
        ("x.txt", "PNG"),
    ):
        put(tmp_path / "cat" / name, picture(kind))
    put(tmp_path / "dog/IMG_1.HEIC", b"\0\0\0\x18ftypheic" + bytes(50))
    put(tmp_path / "dog/notes.txt", b"words")
    s = survey(tmp_path)
    assert "cat/web.jfif" in s.train.names and "cat/none" in s.train.names and "cat/anim.gif" in s.train.names
    heic = next(r for r in s.train.refused if r.name.endswith("HEIC"))
    assert "HEIC" in heic.reason and not harmless(heic)
    assert harmless(next(r for r in s.train.refused if r.name.endswith("notes.txt")))


@pytest.mark.parametrize("form", ["./{}", "{}", ".\\{}", "./././{}"])
def test_metadata_names_in_other_forms_lose_no_image(tmp_path: Path, form: str) -> None:
    names = [f"images/{i}.png" for i in range(4)]
    tree(tmp_path, *names)
    rows = [
        (form.format(n) if "\\" not in form else n.replace("/", "\\"), ["cat", "dog"][i % 2])
        for i, n in enumerate(names)
    ]
    assert found(survey(table(tmp_path, rows))) == (["cat", "dog"], 4, None)


def test_metadata_beside_the_images_and_above_the_splits(tmp_path: Path) -> None:
    tree(tmp_path / "a", *(f"images/{i}.png" for i in range(4)))
    table(tmp_path / "a/images", [(f"{i}.png", ["cat", "dog"][i % 2]) for i in range(4)])
    assert found(survey(tmp_path / "a")) == (["cat", "dog"], 4, None)
    for where in ("", "ann/"):  # photographers' folders are no classes where a table gives the labels
        root = tmp_path / f"b{len(where)}"
        names = [f"{s}/{where}{i}.png" for s in ("train", "test") for i in range(4)]
        tree(root, *names)
        assert found(survey(table(root, [(n, ["cat", "dog"][i % 2]) for i, n in enumerate(names)]))) == (
            ["cat", "dog"],
            4,
            4,
        )


def test_minus_one_is_no_label_and_numbers_sort_as_numbers(tmp_path: Path) -> None:
    labels = [-1, *range(11)]
    tree(tmp_path, *(f"{i}.png" for i in range(12)))
    s = survey(table(tmp_path, [(f"{i}.png", c) for i, c in enumerate(labels)]))
    assert [c.name for c in s.classes] == [str(i) for i in range(11)] and len(s.train.names) == 11


def test_names_that_are_no_utf8_or_of_two_unicode_forms(tmp_path: Path) -> None:
    place = os.fsencode(tree(tmp_path / "a", "cat/1.png", "dog/1.png")) + b"/caf\xe9"
    os.makedirs(place)
    with open(place + b"/1.png", "wb") as f:
        f.write(picture())
    s = survey(tmp_path / "a")
    json.dumps([c.to_json() for c in s.classes]).encode()
    assert len(s.classes) == 3 and any("UTF-8" in note for note in s.notes)
    nfc, nfd = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    tree(tmp_path / "b", f"train/{nfc}/1.png", "train/cat/1.png", f"val/{nfd}/2.png", "val/cat/2.png")
    assert found(survey(tmp_path / "b")) == (["Müller", "cat"], 2, 2)


@pytest.mark.parametrize(
    ("labels", "names", "images"),
    [
        (["cat", "dog"] * 3, ["cat", "dog"], 6),
        (pa.array([None, 1.0, 0.0, 1.0]), ["0", "1"], 3),
        (pa.array(["cat", "dog"] * 2).dictionary_encode(), ["cat", "dog"], 4),
        (pa.array([True, False]), ["false", "true"], 2),
    ],
)
def test_parquet_labels_of_every_type(tmp_path: Path, labels: Any, names: list[str], images: int) -> None:
    pq.write_table(rows_of(labels), tmp_path / "train-0.parquet")
    s = survey(tmp_path)
    assert ([c.name.lower() for c in s.classes], len(s.train.names)) == (names, images)


def test_parquet_columns_and_splits_that_need_words(tmp_path: Path) -> None:
    for name in ("two", "unlabelled", "huge"):
        (tmp_path / name).mkdir()
    second = [{"bytes": picture(), "path": None}] * 4
    pq.write_table(rows_of([0, 1] * 2, {"mask": second}), tmp_path / "two/train-0.parquet")
    with pytest.raises(ValueError, match=r"dataset\.image_column"):
        survey(tmp_path / "two")
    assert len(survey(tmp_path / "two", source="parquet", image_column="mask").train.names) == 4
    pq.write_table(rows_of([0, 1] * 2), tmp_path / "unlabelled/train-0.parquet")
    pq.write_table(rows_of([-1] * 3), tmp_path / "unlabelled/test-0.parquet")
    assert found(survey(tmp_path / "unlabelled"))[1] == 4
    pq.write_table(rows_of(pa.array([0, 2**40], pa.int64())), tmp_path / "huge/train-0.parquet")
    try:  # another class, or a refusal; never a label that was cut
        assert "1099511627776" in [c.name for c in survey(tmp_path / "huge").classes]
    except ValueError as error:
        assert "1099511627776" in str(error)


def test_a_saved_dataset_is_read_and_archives_say_what_to_do(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    rows = rows_of([0, 1, 0])
    with pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as f, pa.ipc.new_stream(f, rows.schema) as w:
        w.write_table(rows)
    (saved / "state.json").write_text("{}")
    (saved / "dataset_info.json").write_text("{}")
    assert len(survey(saved).train.names) == 3
    for name in ("photos.zip", "photos.tar.gz"):
        folder = tmp_path / name.partition(".")[2].replace(".", "")
        folder.mkdir()
        if name.endswith("zip"):
            with zipfile.ZipFile(folder / name, "w") as z:
                z.writestr("cat/1.png", picture())
        else:
            with tarfile.open(folder / name, "w:gz") as t:
                info = tarfile.TarInfo("cat/1.png")
                info.size = len(picture())
                t.addfile(info, io.BytesIO(picture()))
        with pytest.raises(ValueError, match=r"(?i)unpack"):
            survey(folder)


def tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """An uncompressed grey TIFF, little-endian, written by hand."""
    h, w = values.shape
    if bits == 16:
        body = values.astype("<u2").tobytes()
    else:
        pairs = [(int(a), int(b)) for row in values for a, b in zip(row[::2], row[1::2], strict=True)]
        body = b"".join(bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in pairs)
    tags = [(256, 4, w), (257, 4, h), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, 1),
            (278, 4, h), (279, 4, len(body))]  # fmt: skip
    pad = b"\0" * (len(body) % 2)
    words = [
        struct.pack("<HHI", t, k, 1) + (struct.pack("<HH", v, 0) if k == 3 else struct.pack("<I", v))
        for t, k, v in tags
    ]
    ifd = struct.pack("<H", len(tags)) + b"".join(words) + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(body) + len(pad)) + body + pad + ifd


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)])
def test_wide_grey_is_scaled_and_inverted_by_its_tags_or_refused(bits: int, photometric: int) -> None:
    most = 2**bits - 1
    ramp = np.tile(np.linspace(0, most, 16).round().astype(int), (16, 1))
    try:
        grey = np.asarray(decode_rgb(tiff(ramp if photometric else most - ramp, bits, photometric)))[..., 0]
    except RefusedPicture as error:
        assert bits == 12 and "12" in str(error)
        return
    assert np.abs(grey.astype(int) - np.linspace(0, 255, 16)[None]).max() <= 1
