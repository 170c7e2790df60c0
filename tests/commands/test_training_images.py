"""Which images a training command learns: as prepare takes them, and refused as prepare refuses them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ddoq_ray.commands.table import BY_NAME
from ddoq_ray.commands.training_images import ReadImages, read_images
from ddoq_ray.data.collections import DIGIT_NAMES


@pytest.fixture
def corpus(tmp_path: Path, write_corpus: Callable[..., Path]) -> Path:
    """Two shards of 20 digits."""
    return write_corpus(tmp_path / "digits", shards=2, per_shard=20)


def read(folder: Path, *words: str) -> ReadImages:
    out = folder.parent / f"out-{len(list(folder.parent.iterdir()))}"
    return read_images(
        BY_NAME["train-teacher"].compose([f"dataset.path={folder}", "image_size=16", f"out={out}", *words])
    )


def test_a_folder_of_both_splits_is_not_trained_on_whole(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "digits-000.tar").rename(corpus / "train-0.tar")
    (corpus / "digits-001.tar").rename(corpus / "val-0.tar")
    (corpus / "._train-0.tar").write_bytes(b"Mac OS X")
    images = read(corpus).open()
    assert len(images.images) == len(images.held_out[0]) == 20
    assert not np.array_equal(images.images, images.held_out[0])
    said = capsys.readouterr().err
    assert "1 hidden files" in said and "taken for validation by their names (val-0.tar)" in said
    assert "._train" not in said, "a file that is no shard has no samples to refuse"


def test_the_same_shards_do_not_judge_what_they_taught(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"hold the same shards"):
        read(corpus, f"dataset.val_path={corpus}")


def test_held_out_shards_with_another_order_of_classes_are_refused(corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.move(corpus / "digits-001.tar", other / "digits-001.tar")
    (other / "classes.json").write_text(json.dumps(DIGIT_NAMES[::-1]))
    with pytest.raises(ValueError, match=r"other/classes\.json"):
        read(corpus, f"dataset.val_path={other}")


def test_labels_that_do_not_fit_the_class_list_are_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "classes.json").write_text(json.dumps(DIGIT_NAMES[:7]))
    with pytest.raises(ValueError, match=r"label is outside the class list .* more than max_bad_fraction=0.01"):
        read(corpus)
    assert len(read(corpus, "max_bad_fraction=0.9").open().images) < 40
    assert "samples refused" in capsys.readouterr().err


def test_keys_that_say_how_shards_are_written_are_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset.heldout has no effect"):
        read(corpus, "dataset.heldout=0.1")
