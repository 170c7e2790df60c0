"""The benchmark of scale, in short: every stub's unit is accounted for, and the rows say what they must."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import ray

from benchmarks import scale


@pytest.mark.slow
@pytest.mark.processes
def test_rows_of_both_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()  # the benchmark starts its own
    target = tmp_path / "out.json"
    words = ["--workers", "1", "2", "--units-per-worker", "4", "--unit-s", "0.5", "--death-workers", "2"]
    words += ["--shards", "60", "--classes", "60", "--workers-of-keys", "2", "--scratch", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["scale", *words, "--json", str(target)])
    scale.main()
    before = json.loads(target.read_text())
    monkeypatch.setattr(sys, "argv", ["scale", *words, "--parts", "keys", "--stages", "encode", "--json", str(target)])
    scale.main()  # the other rows stay
    rows = json.loads(target.read_text())
    told = [(row["stage"], row["part"], row["workers"], row["keys"]) for row in rows]
    assert told == [
        ("encode", "scaling", 1, 4000), ("encode", "scaling", 2, 8000),
        ("synthesize", "scaling", 1, 200), ("synthesize", "scaling", 2, 400),
        ("encode", "death", 2, 8000), ("synthesize", "death", 2, 400),
        ("encode", "keys", 2, 6000), ("encode", "keys", 2, 60000),
        ("synthesize", "keys", 2, 300), ("synthesize", "keys", 2, 3000),
    ]  # fmt: skip
    assert rows[:6] == before[:6] and rows[8:] == before[8:] and rows[7]["command"] != before[7]["command"]
    assert all(0 < row["of_ideal"] <= 1.01 and row["driver_peak_bytes"] > 50e6 for row in rows)
    assert {"efficiency", "overhead_ms_per_chunk", "driver_ms_per_chunk", "start_s"} <= set(rows[0])
    assert "lost_s" in rows[4] and 0.5 < rows[7]["growth"] < 2
    assert target.with_suffix(".svg").read_text().startswith("<?xml")
    assert sorted(tmp_path.iterdir()) == [target, target.with_suffix(".svg")]  # the records are gone
