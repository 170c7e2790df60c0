"""What a disk has damaged is never taken for what was written, by `verify` or by the stage that reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.cells import Lab
from tests.chaos.damage import KINDS, READ_BY, damaged_row
from tests.support.damage import WAYS

pytestmark = pytest.mark.chaos


def test_every_kind_has_its_reader() -> None:
    assert READ_BY.keys() == KINDS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(KINDS)), ids=list(KINDS))
def test_damage_is_not_accepted(here: Lab, number: int, tmp_path: Path) -> None:
    """In one of three ways; `python -m tests.chaos.damage` has all of them."""
    way = list(WAYS)[number % len(WAYS)]
    row = damaged_row(here, list(KINDS)[number], way, tmp_path / "run")
    assert row["verify"] and row["outcome"] in ("refused", "made anew", "not read"), row
