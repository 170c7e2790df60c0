"""The label stage: its identity; a wrong teacher stops before any label is made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddoq_ray.config.compose import load_config
from ddoq_ray.stages.label.step import Label
from ddoq_ray.stages.label.teacher import Named
from ddoq_ray.stages.label.teacher_check import judge
from ddoq_ray.stages.synthesize.step import Synthesize
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import LabelKey, Place
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.records import ClassInfo

STEP = Label(Synthesize(Place()), Place(), LabelKey("teacher", "protocol", 16))


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
