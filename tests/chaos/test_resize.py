"""A student whose training stops and goes on, with as many ranks as before or with others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import ranks

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.processes]


def test_ranks_that_go_on_make_the_same_student(tmp_path: Path) -> None:
    """Two ranks for three epochs: in one go, stopped after one, and as two, one and four ranks.

    Restored at the same world size every bit is the same; at another one the steps are, with the same images in each,
    and values differ by the order of sums.
    """
    steps, whole = ranks.train_in_parts(tmp_path / "whole", [(2, 3)])
    assert len(steps) == 6 and {epoch for epoch, _ in steps} == {0, 1, 2}
    again, restored = ranks.train_in_parts(tmp_path / "restored", [(2, 1), (2, 2)])
    resized_steps, resized = ranks.train_in_parts(tmp_path / "resized", [(2, 1), (1, 1), (4, 1)])
    assert again == resized_steps == steps
    assert whole["model"].keys() == restored["model"].keys() == resized["model"].keys()
    for name, tensor in whole["model"].items():
        assert torch.equal(restored["model"][name], tensor), name
        torch.testing.assert_close(resized["model"][name], tensor, rtol=0, atol=1e-5)
