import json
import sys
from pathlib import Path

import pytest

from benchmarks import driver, driver_records


def test_a_run_gives_a_row_a_loop_and_its_growth(tmp_path, monkeypatch, capsys):
    words = ["--orders", "mixed", "--shards", "24", "--classes", "32", "--samples", "10", "--ipc", "1"]
    target = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["driver", *words, "--scratch", str(tmp_path), "--json", str(target)])
    monkeypatch.setattr(driver, "apart", driver.measure)  # a process of its own would load everything anew, twice
    driver.main()
    rows = json.loads(target.read_text())
    assert [row["what"] for row in rows] == 2 * list(driver.LOOPS)
    assert {(row["shards"], row["classes"]) for row in rows} == {(6, 8), (24, 32)}
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 and row["order"] == "mixed" for row in rows)
    assert all(("growth" in row) == (row["shards"] == 24) for row in rows)
    assert {"hardware", "commit", "command"} <= set(rows[0])
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)
    assert list(Path(tmp_path).iterdir()) == [target]  # the records are gone


@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_shards_hold_what_they_say(order):
    held = list(driver_records.class_counts(order, 12, 40, 20))
    assert [counts.total for counts in held] == [20] * 12
    together = set().union(*(set(counts) for counts in held))
    assert together <= set(range(40)) and (order == "mixed" or together == set(range(40)))
    assert all(len(counts) <= 5 for counts in held) or order == "mixed"
