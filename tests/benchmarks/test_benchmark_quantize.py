import json
import sys

import numpy as np
import pytest

from benchmarks import quantize
from ddoq_ray.core.distortion import distortion


def test_the_synthetic_set_is_the_same_again_and_clustered():
    x = quantize.synthetic(200, (2, 8, 8))
    assert x.shape == (200, 128) and x.dtype == np.float32 and np.isfinite(x).all()
    assert (x == quantize.synthetic(200, (2, 8, 8))).all() and (x != quantize.synthetic(200, (2, 8, 8), seed=1)).any()
    # Thirty modes: a centroid for each explains most, which white noise would not let it.
    value = distortion(x, quantize.METHODS["gram"](x, 30, 0)[0])
    assert value < 0.5 * x.var(axis=0).sum()


def test_every_method_gives_a_row_with_every_column():
    x = quantize.synthetic(160, (2, 8, 8))
    rows = quantize.measure("tiny", x, [4, 7], 2, list(quantize.METHODS))
    assert [(row["method"], row["k"]) for row in rows] == [(m, k) for k in (4, 7) for m in quantize.METHODS]
    for row in rows:
        assert set(quantize.COLUMNS) <= set(row) and row["latents"] == "tiny" and row["repeats"] == 2
        assert row["cpu_s"] > 0 and 0 <= row["weight_tv"] < 1
        for column in ("distortion", "heldout_distortion"):
            assert 0.1 * row["variance"] < row[column] < 1.5 * row["variance"]
    assert all(row["weight_tv"] == 0.0 for row in rows if row["method"] in ("gram", "faiss"))


def row(method, k, cpu_s, value):
    return {"latents": "a", "method": method, "k": k, "cpu_s": cpu_s, "distortion": value}


def test_the_lines_against_the_targets_by_hand():
    rows = [
        row("gram", 50, 0.3, 0.97), row("sklearn-kmeans", 50, 1.0, 1.0), row("faiss", 50, 0.1, 0.96),
        row("d4m", 50, 0.2, 2.0), row("clvq-corrected", 50, 0.1, 1.9),
    ]  # fmt: skip
    (line,) = quantize.against_targets(rows)
    assert line == {
        "latents": "a", "k": 50, "gram/best peer": "1.010 (at most 1.000)", "gram/kmeans": "0.970 (at most 0.980)",
        "gram/kmeans cpu": "0.300 (at most 0.333)", "clvq/d4m": "0.950 (at most 0.955)",
        "clvq/d4m cpu": "0.500 (at most 1.000)", "missed": "gram/best peer",
    }  # fmt: skip
    assert quantize.against_targets(rows[:-1]) == []


def test_a_run_leaves_rows_table_and_plot(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "small.npy", quantize.synthetic(120, (2, 8, 8)).astype(np.float16))
    words = ["--latents", str(tmp_path / "small.npy"), "--k", "5", "--repeats", "1", "--methods", "gram", "d4m"]
    monkeypatch.setattr(sys, "argv", ["quantize", *words, "--json", str(tmp_path / "out.json")])
    quantize.main()
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["latents"] for row in rows] == ["small"] * 2 + [quantize.SYNTHETIC] * 2
    assert {"hardware", "commit", "command"} <= set(rows[0])
    assert "| 5 | gram |" in (tmp_path / "out.md").read_text()
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
    assert capsys.readouterr().out.count("\n") >= 6


def test_half_a_command_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quantize", "--methods", "best"])
    with pytest.raises(SystemExit):
        quantize.main()
    assert "invalid choice" in capsys.readouterr().err
