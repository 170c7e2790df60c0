import json
import re
from pathlib import Path

import numpy as np
import pytest

from studies import theory_quantization as tq
from studies.theory import circle, principal, unit_scale
from studies.theory_figures import number, plots

CHECKOUT = Path(__file__).resolve().parents[2]


def two_heaps(sizes=(30, 10)):
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(size=(n, 3)) + 20 * i for i, n in enumerate(sizes)]).astype(np.float32)


def test_weights_by_hand():
    x = np.array([[0.0], [0.0], [1.0], [4.0]], np.float32)
    row = tq.weight_row(x, np.array([[0.0], [4.0]], np.float32))
    # By cells 1 goes to 0; uniform weights send it to 4, nine times as dear.
    assert row["w2_voronoi"] == pytest.approx(0.5) and row["w2_uniform"] == pytest.approx(1.5)
    assert row["cut_pct"] == pytest.approx(200 / 3) and row["max_weight"] == 0.75
    assert row["prop2_relative_difference"] < 1e-12 and row["empty_cells"] == 0


def test_proposition_2_holds_on_any_grid_and_uniform_weights_never_win():
    x = np.random.default_rng(1).normal(size=(80, 6)).astype(np.float32)
    rows = tq.weight_rows("x", x, (3, 9), tq.GRIDS, seeds=2)
    assert {row["grid"] for row in rows} == {*tq.GRIDS, "gram, balanced"}
    assert max(row["prop2_relative_difference"] for row in rows) < 1e-9
    assert min(row["cut_pct"] for row in rows) > -1e-6
    fair = [row["w2_uniform"] for row in rows if row["grid"] == "gram, balanced"]
    start = [row["w2_uniform"] for row in rows if row["grid"] == "gram" and row["seed"] == 0]
    assert all(after < before for after, before in zip(fair, start, strict=True))
    means = tq.weight_means(rows)
    d4m = [row["cut_pct"] for row in rows if row["grid"] == "d4m" and row["k"] == 3]
    found = next(row for row in means if row["grid"] == "d4m" and row["k"] == 3)
    assert found["cut_pct"] == pytest.approx(np.mean(d4m)) and found["cut_pct_low"] == found["cut_pct_high"]


def test_slope_and_dimensions():
    ks = [1, 2, 4, 8]
    assert tq.fitted_slope(ks, [k ** (-2 / 3) for k in ks]) == pytest.approx(-1 / 3)
    square = tq.cube(2, 2000)
    assert tq.two_nearest_dimension(square) == pytest.approx(2, abs=0.2)
    lifted = np.concatenate([square, square @ [[1.0], [2.0]]], axis=1)  # a plane in three dimensions
    assert tq.two_nearest_dimension(lifted) == pytest.approx(2, abs=0.2)
    assert tq.participation(square) == pytest.approx(2, abs=0.01)
    assert tq.participation(np.array([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(1)


def test_the_rate_of_a_square_is_found():
    *curve, line = tq.curve_rows("cube-2d", tq.cube(2, 900), [1, 10, 20, 40, 80])
    assert curve[0]["distortion"] == pytest.approx(1.0, abs=1e-5)
    assert line["slope_heldout"] == pytest.approx(line["theory_slope"], abs=0.06)


def test_the_cases_of_the_diffusion():
    np.testing.assert_allclose(np.linalg.norm(circle(10), axis=1), 1.0)
    x = np.random.default_rng(2).normal(size=(50, 7)) * np.arange(1, 8)
    assert unit_scale(x).var(axis=0).mean() == pytest.approx(1.0)
    found = principal(x, 3)
    assert found.shape == (50, 3) and found.var(axis=0).mean() == pytest.approx(1.0)
    assert found.var(axis=0)[0] > found.var(axis=0)[2]
    np.testing.assert_allclose(found.T @ found, np.diag(np.diag(found.T @ found)), atol=1e-9)


def test_numbers_are_short():
    assert [number(v) for v in (None, 3, 0.12345, 4.567, 45.67, 456.7, 4.5e7, 3e-9)] == [
        "-", "3", "0.123", "4.57", "45.7", "457", "4.5e+07", "3.0e-09",
    ]  # fmt: skip


RESULT = CHECKOUT / "studies/results/theory.json"


def test_the_result_names_no_place():
    for row in json.loads(RESULT.read_text()):
        words = row["command"].split()
        assert not any(word.startswith("/") or word.endswith(".npy") for word in words), words
        assert "/" not in row.get("latents", "") + row.get("case", "")


def test_the_page_finds_its_plots():
    page = (CHECKOUT / "docs/theory.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert "://" in target or (CHECKOUT / "docs" / target).exists(), target


def test_every_claim_has_its_plot(tmp_path):
    plots(json.loads(RESULT.read_text()), tmp_path / "theory.json")
    made = {path.name for path in tmp_path.glob("*.svg")}
    assert made == {path.name for path in RESULT.parent.glob("theory-*.svg")} and len(made) == 4
    assert all("</svg>" in path.read_text() for path in tmp_path.iterdir())
