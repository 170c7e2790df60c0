"""The lines of a comparison against hand-computed figures, scipy and a bootstrap."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from ddoq_ray.core.comparison import against, lines_of
from ddoq_ray.core.metrics import confidence_interval, paired_difference


def row(method: str, seed: int, top1: float | None, **other: Any) -> dict[str, Any]:
    base = {
        "method": method, "ipc": 1, "student": "net", "size": 16, "teacher": "t", "protocol": "p", "labels": "soft",
        "seed": seed, "top1_pct": top1, "train_images": 10,
    }  # fmt: skip
    return base | other


def by_method(rows: list[dict[str, Any]], **where: Any) -> dict[str, dict[str, Any]]:
    lines = lines_of(rows)
    return {line["method"]: line for line in lines if all(line[key] == value for key, value in where.items())}


def test_figures_by_hand() -> None:
    """Differences of 1, 2 and 3 points: mean 2, std 1, t(0.975; 2) = 4.302653, so 2 +- 2.484138."""
    rows = [row("random", s, 50.0 + s) for s in range(3)] + [row("d4m", s, 51.0 + 2 * s) for s in range(3)]
    line = by_method(rows)["d4m"]
    assert (line["mean_pct"], line["std_pct"], line["seeds"]) == (53.0, 2.0, [0, 1, 2])
    d = line["against"]
    assert (d["method"], d["n"], d["mean_pct"], d["std_pct"]) == ("random", 3, 2.0, 1.0)
    assert d["low_pct"] == pytest.approx(2 - 2.4841377, abs=1e-6) and line["ior_pct"] == 2.0
    assert d["high_pct"] == pytest.approx(2 + 2.4841377, abs=1e-6)
    assert by_method(rows)["random"]["against"] is None


def test_intervals_are_scipys() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 10):
        a, b = rng.normal(60, 1, n), rng.normal(59, 2, n)
        d = paired_difference(a.tolist(), b.tolist())
        oracle = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert (d.low, d.high) == pytest.approx((oracle.low, oracle.high))
    assert all(np.isnan(end) for end in confidence_interval([1.0]))
    assert confidence_interval([2.0, 2.0]) == (2.0, 2.0)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(2000):
        low, high = confidence_interval(rng.normal(3.0, 2.0, 5).tolist())
        inside += low <= 3.0 <= high
    assert 0.935 < inside / 2000 < 0.965


def test_pairs_are_of_equal_seeds() -> None:
    """A seed that only one of the two has is left out of the difference, not of the mean."""
    rows = [row("random", s, 10.0 * s) for s in (0, 1, 2)] + [row("d4m", s, 10.0 * s + 1) for s in (1, 2, 5)]
    line = by_method(rows)["d4m"]
    assert line["against"]["n"] == 2 and line["against"]["mean_pct"] == 1.0
    assert line["seeds"] == [1, 2, 5] and line["mean_pct"] == pytest.approx((11 + 21 + 51) / 3)
    assert against({0: 1.0}, {1: 2.0}, "random") is None


def test_one_seed_has_no_interval() -> None:
    line = by_method([row("random", 0, 50.0), row("d4m", 0, 51.0)])["d4m"]
    assert line["std_pct"] is None and line["against"]["low_pct"] is None and line["against"]["mean_pct"] == 1.0


def test_a_method_that_diverged_has_no_figures() -> None:
    rows = [row("random", 0, 50.0), row("random", 1, 52.0), row("d4m", 0, 90.0), row("d4m", 1, None)]
    line = by_method(rows)["d4m"]
    assert (line["mean_pct"], line["against"], line["ior_pct"], line["diverged"]) == (None, None, None, 1)
    rows[1]["top1_pct"] = None
    assert by_method([*rows, row("herding", 0, 55.0)])["herding"]["against"] is None


def test_settings_do_not_mix() -> None:
    """Another IPC, student, size, teacher or kind of labels is another comparison; another ipc is not compared."""
    changes = ({"ipc": 5}, {"student": "b"}, {"size": 32}, {"teacher": "u"}, {"labels": "hard"})
    rows = [row("random", 0, 10.0), row("d4m", 0, 11.0)]
    for at, change in enumerate(changes, 2):
        rows += [row("random", 0, 10.0, **change), row("d4m", 0, 10.0 + at, **change)]
    lines = lines_of(rows)
    assert len(lines) == 12
    assert [li["against"]["mean_pct"] for li in lines if li["method"] == "d4m"] == [1, 2, 3, 4, 5, 6]


def test_hard_label_recovery_and_improvement_over_random() -> None:
    """DD-Ranking: HLR = real-hard less syn-hard, IOR = syn-any less random-any, under the same labels."""
    hard = {"labels": "hard", "teacher": "first"}
    rows = [
        row("full", 0, 90.0, ipc=10, **hard), row("full", 1, 92.0, ipc=10, **hard),
        row("d4m", 0, 60.0, **hard), row("d4m", 1, 62.0, **hard), row("random", 0, 55.0, **hard),
        row("d4m", 0, 80.0), row("d4m", 1, 80.0), row("random", 0, 70.0), row("random", 1, 72.0),
    ]  # fmt: skip
    soft, hard_lines = by_method(rows, labels="soft"), by_method(rows, labels="hard")
    assert soft["d4m"]["hlr_pct"] == hard_lines["d4m"]["hlr_pct"] == 30.0
    assert soft["d4m"]["ior_pct"] == 9.0 and hard_lines["d4m"]["ior_pct"] == 5.0
    full = hard_lines["full"]
    assert full["ipc"] is None and full["hlr_pct"] is None and full["against"] is None and full["mean_pct"] == 91.0
    without = [r for r in rows if r["method"] != "full"]
    assert by_method(without, labels="soft")["d4m"]["hlr_pct"] is None
