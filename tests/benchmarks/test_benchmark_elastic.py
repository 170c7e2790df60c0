"""The benchmark of nodes that come and go, in short: its promises hold here too, but for its times."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import ray

from benchmarks import elastic


@pytest.mark.slow
@pytest.mark.processes
def test_nodes_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ray.shutdown()  # a Cluster cannot start beside the Ray of other tests
    target = tmp_path / "out.json"
    words = ["--units", "80", "--unit-s", "1", "--join-s", "4", "--kill-s", "14", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", ["elastic", *words])
    elastic.main()
    (row,) = json.loads(target.read_text())
    assert row["expected"] == row["unique"] == 160
    assert row["same_bytes"] and row["redone"] == 0
    assert row["workers_lost"] >= 1 and row["requeued"] >= 1 and row["executions"] >= 81
    assert 0 < row["join_s"] < 30 and row["total_over_ideal"] > 1
    assert target.with_suffix(".svg").read_text().startswith("<?xml")
    assert {"hardware", "commit", "command"} <= set(row) and "total_over_ideal" in capsys.readouterr().out
