"""The rows of a report's folder, and the record that vouches for them: each damaged, cut and missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.damage import WAYS, damage

from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import FILES, file_facts, with_check
from ddoq_ray.storage.evaluated import evaluated
from ddoq_ray.storage.folder import Folder

ROWS = [{"method": "ddoq", "top1_pct": 90.0}, {"method": "random", "top1_pct": 80.0}]


@pytest.fixture
def report(tmp_path: Path) -> Folder:
    folder = Folder(str(tmp_path))
    folder.publish_json(layout.ROWS, ROWS)
    folder.publish_json(layout.EVALUATE, with_check({"items": 2, FILES: file_facts(folder, [layout.ROWS])}))
    return folder


def test_nothing_was_evaluated(tmp_path: Path) -> None:
    assert evaluated(Folder(str(tmp_path))) == (None, [])


def test_rows_as_they_were_written(report: Folder) -> None:
    record, rows = evaluated(report)
    assert rows == ROWS and record is not None and record["items"] == 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [layout.ROWS, layout.EVALUATE])
def test_damage_is_refused_by_name(report: Folder, name: str, way: str) -> None:
    damage(Path(report.path(name)), way)
    how = "missing although it was written" if way == "missing" else "damaged: "
    with pytest.raises(ValueError, match=f"{re.escape(report.path(name))} is {how}.*has evaluate make it anew"):
        evaluated(report)


def test_a_record_of_an_older_version_knows_no_digest(report: Folder) -> None:
    report.publish_json(layout.EVALUATE, {"items": 2})
    assert evaluated(report)[1] == ROWS
