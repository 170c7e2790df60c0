"""Oracles: torch.topk, scipy.stats, statistics.stdev, and hand-computed values."""

import math
import statistics
import warnings

import pytest
import torch

from ddoq_ray.core.metrics import mean_std, paired_difference, top_pct, topk_correct


@pytest.mark.parametrize("k", [1, 3, 5, 10])
def test_topk_is_torchs(k):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 10, generator=generator)
    targets = torch.randint(0, 10, (500,), generator=generator)
    expected = (logits.topk(k, dim=1).indices == targets[:, None]).any(1).sum()
    correct = topk_correct(logits, targets, k)
    assert correct.dtype == torch.int64 and correct.ndim == 0 and correct == expected
    assert sum(topk_correct(a, b, k) for a, b in zip(logits.split(33), targets.split(33), strict=True)) == expected


def test_ties_and_nan():
    targets = torch.arange(4)
    assert topk_correct(torch.zeros(4, 4), targets, 1) == 1  # class 0 alone
    assert topk_correct(torch.zeros(4, 4), targets, 3) == 3
    assert topk_correct(torch.full((4, 4), math.nan), targets, 4) == 0
    logits = torch.eye(4)
    logits[1, 3] = math.nan
    assert topk_correct(logits, targets, 1) == 3


def test_top_pct():
    assert top_pct(torch.tensor(1), 8) == 12.5 and top_pct(1, 1) == 100
    for correct, total in ((0, 0), (5, 4), (-1, 4)):
        with pytest.raises(ValueError, match="total"):
            top_pct(correct, total)


def test_mean_std():
    values = [62.7, 63.3, 61.9, 64.0, 62.2]
    mean, std = mean_std(values)
    assert mean == pytest.approx(statistics.mean(values)) and std == pytest.approx(statistics.stdev(values))
    assert mean_std([5.0]).mean == 5.0 and math.isnan(mean_std([5.0]).std)
    assert mean_std([3.0, 3.0]) == (3.0, 0.0)


def test_paired_difference_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    a, b = [60.1, 61.5, 59.8, 62.0, 60.7], [59.2, 60.9, 60.1, 60.8, 60.7]
    result = paired_difference(a, b)
    reference = stats.ttest_rel(a, b)
    assert result.t == pytest.approx(reference.statistic) and result.t_p == pytest.approx(reference.pvalue)
    assert (result.n, result.wins, result.losses) == (5, 3, 1)
    assert result.sign_p == pytest.approx(stats.binomtest(3, 4).pvalue)
    assert result.mean == pytest.approx(0.48)
    back = paired_difference(b, a)
    assert (back.t, back.mean) == pytest.approx((-result.t, -result.mean)) and back.sign_p == result.sign_p


def test_paired_difference_by_hand():
    # differences 1, 2, 3: mean 2, std 1, t = 2 sqrt(3); three wins of three: p = 2 / 2^3
    result = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert result.mean == 2 and result.std == 1 and result.t == pytest.approx(2 * math.sqrt(3))
    assert result.sign_p == 0.25


def test_paired_difference_at_the_edges():
    single = paired_difference([2.0], [1.0])
    assert single.mean == 1 and math.isnan(single.std) and math.isnan(single.t) and math.isnan(single.t_p)
    assert single.sign_p == 1
    same = paired_difference([1.0, 2.0], [1.0, 2.0])
    assert (same.t, same.t_p, same.sign_p) == (0.0, 1.0, 1.0)
    constant = paired_difference([1.0, 2.0], [2.0, 3.0])
    assert (constant.t, constant.t_p) == (-math.inf, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of scipy's, on numbers that are equal but for their rounding
        rounded = paired_difference([89.6, 87.4], [86.0, 83.8])
    assert (rounded.t, rounded.t_p, rounded.std) == (math.inf, 0.0, 0.0)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="classes"):
        topk_correct(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="targets"):
        topk_correct(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="at least one value"):
        mean_std([])
    with pytest.raises(ValueError, match="seed"):
        paired_difference([1.0], [1.0, 2.0])
