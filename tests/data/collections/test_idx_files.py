"""IDX files, made here byte by byte."""

from __future__ import annotations

import gzip
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddoq_ray.data.collections.idx import Idx, read_idx
from ddoq_ray.data.collections.listing import Picture, harmless
from ddoq_ray.storage.folder import Folder

PIXELS = np.arange(4 * 3 * 2, dtype=np.uint8).reshape(4, 3, 2)


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(root: Path, labels: list[int], part: str = "train", pack: bool = False, images: np.ndarray = PIXELS) -> Path:
    root.mkdir(exist_ok=True)
    for name, data in (
        (f"{part}-images-idx3-ubyte", idx(images)), (f"{part}-labels-idx1-ubyte", idx(np.asarray(labels, np.uint8))),
    ):  # fmt: skip
        (root / (name + ".gz" * pack)).write_bytes(gzip.compress(data) if pack else data)
    return root


@pytest.mark.parametrize("pack", [False, True])
def test_images_become_png_with_the_same_pixels(tmp_path: Path, pack: bool) -> None:
    source = Idx(str(write(tmp_path / "a", [1, 0, 1, 2], pack=pack)), None)
    survey = source.survey()
    assert survey.train.class_ids.tolist() == [1, 0, 1, 2]
    assert [c.name for c in survey.classes] == ["0", "1", "2"]  # the files hold no names, and none are guessed
    assert survey.val is None
    got = list(source.read("train", survey.train.names[::-1], Folder(str(tmp_path))))
    for picture, pixels in zip(got, PIXELS[::-1], strict=True):
        assert isinstance(picture, Picture) and picture.extension == "png"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture.data))), pixels)


def test_names_are_given_beside_the_files(tmp_path: Path) -> None:
    root = write(write(tmp_path / "a", [1, 0, 1, 1]), [0, 0, 1, 0], "t10k", pack=True)
    (root / "classes.json").write_text(json.dumps(["T-shirt", "Trouser"]))
    survey = Idx(str(root), None).survey()
    assert [c.name for c in survey.classes] == ["T-shirt", "Trouser"]
    assert survey.val is not None and survey.val.class_ids.tolist() == [0, 0, 1, 0]
    (tmp_path / "one.json").write_text(json.dumps(["T-shirt"]))
    with pytest.raises(ValueError, match=r"labels 1 are outside the class list \(0 to 0\)"):
        Idx(str(root), str(tmp_path / "one.json")).survey()


def test_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no train-images-idx3-ubyte or"):
        Idx(str(tmp_path), None).survey()
    with pytest.raises(ValueError, match="4 train images, but 3 labels"):
        Idx(str(write(tmp_path / "a", [0, 1, 2])), None).survey()
    with pytest.raises(ValueError, match=r"labels 0, 2 without names.*dataset.classes"):
        Idx(str(write(tmp_path / "b", [0, 2, 2, 2])), None).survey()
    with pytest.raises(ValueError, match="no train image"):
        Idx(str(write(tmp_path / "c", [], images=PIXELS[:0])), None).survey()
    whole = idx(PIXELS)
    for data, words in ((whole[:-1], "23 bytes of data"), (whole + b"x", "25 bytes")):
        with pytest.raises(ValueError, match=words):
            read_idx(data, 3, "there")
    for data in (whole[:5], b"\0\0\x0d\3" + whole[4:], idx(PIXELS[0])):
        words = "not an IDX file"
        with pytest.raises(ValueError, match=words):
            read_idx(data, 3, "there")
    (write(tmp_path / "d", [0] * 4, pack=True) / "train-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b junk")
    with pytest.raises(ValueError, match="cannot be decompressed"):
        Idx(str(tmp_path / "d"), None).survey()


def test_minus_one_is_no_label_in_every_type(tmp_path: Path) -> None:
    """As an unsigned byte it is 255; a whole test part of it cannot validate, and is told."""
    root = write(write(tmp_path / "a", [1, 255, 0, 1]), [255] * 4, "t10k")
    survey = Idx(str(root), None).survey()
    assert (survey.train.names, survey.train.class_ids.tolist()) == (["000000000", "000000002", "000000003"], [1, 0, 1])
    assert survey.val is None and "none of 4 validation images" in survey.notes[0]
    assert [r.reason for r in survey.train.refused] == ["no label"] * 5 and all(
        harmless(r) for r in survey.train.refused
    )
    for code, dtype in ((0x09, "i1"), (0x0B, ">i2"), (0x0C, ">i4")):
        data = bytes((0, 0, code, 1)) + struct.pack(">I", 3) + np.asarray([-1, 7, 100]).astype(dtype).tobytes()
        assert read_idx(data, 1, "there").tolist() == [-1, 7, 100]
    with pytest.raises(ValueError, match="no train image has a label"):
        Idx(str(write(tmp_path / "b", [255] * 4)), None).survey()
