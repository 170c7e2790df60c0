"""Accuracy, and what may be said about it over seeds.

Shapes: B images, C classes, n seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


def topk_correct(logits: torch.Tensor, targets: torch.Tensor, k: int) -> torch.Tensor:
    """How many targets are among the k largest logits.

    Ties go to the lowest class on every device (`torch.topk` leaves them open), so a student with constant
    logits scores only class 0. A row with NaN is wrong.

    Args:
        logits: float [B, C].
        targets: int64 [B], in 0..C-1.
        k: 1..C.

    Returns:
        int64 scalar tensor on the device of `logits`: add them over batches, read once.

    Raises:
        ValueError: shapes that do not agree, or k outside 1..C.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"expected logits [B, C] and targets [B], got {list(logits.shape)} and {list(targets.shape)}")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k must be in 1..{logits.shape[1]} (the number of classes), got {k}")
    column = targets.long().unsqueeze(1)
    own = logits.gather(1, column)
    classes = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > own) | ((logits == own) & (classes < column))
    return ((ahead.sum(dim=1) < k) & ~logits.isnan().any(dim=1)).sum()


def top_pct(correct: int | torch.Tensor, total: int) -> float:
    """Accuracy in percent.

    Args:
        correct: sum of `topk_correct`.
        total: images seen.

    Raises:
        ValueError: no image seen, or more correct than seen.

    >>> top_pct(3, 4)
    75.0
    """
    count = int(correct)
    if total < 1 or not 0 <= count <= total:
        raise ValueError(f"expected 0 <= correct <= total and total above 0, got {count} of {total}")
    return 100.0 * count / total


class MeanStd(NamedTuple):
    """Mean and sample standard deviation (n - 1); std is NaN for a single value, which has none."""

    mean: float
    std: float


def mean_std(values: Sequence[float]) -> MeanStd:
    """Mean and sample standard deviation over seeds.

    Args:
        values: n numbers.

    Raises:
        ValueError: no values.

    >>> mean_std([1.0, 2.0, 3.0])
    MeanStd(mean=2.0, std=1.0)
    """
    n = len(values)
    if n == 0:
        raise ValueError("mean_std needs at least one value")
    mean = math.fsum(values) / n
    if n == 1:
        return MeanStd(mean, math.nan)
    return MeanStd(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)))


class PairedDifference(NamedTuple):
    """Summary of a - b over pairs that share a seed.

    Attributes:
        mean: mean of a - b.
        std: sample standard deviation of a - b; NaN for one pair.
        n: pairs.
        wins: pairs with a above b.
        losses: pairs with a below b.
        t: Student's t of the mean, n - 1 degrees of freedom; NaN for one pair, infinite when all pairs differ
            alike.
        t_p: its two-sided p-value.
        sign_p: two-sided p-value of the sign test, ties left out. With n pairs it cannot go below 2 / 2^n.
        low: lower end of Student's 95 % confidence interval of the mean; NaN for one pair.
        high: its upper end.
    """

    mean: float
    std: float
    n: int
    wins: int
    losses: int
    t: float
    t_p: float
    sign_p: float
    low: float
    high: float


def paired_difference(a: Sequence[float], b: Sequence[float]) -> PairedDifference:
    """Compare two methods over the same seeds.

    Args:
        a: n results of a method.
        b: n results of another, in the same order of seeds.

    Raises:
        ValueError: no pairs, or different numbers of results.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"expected as many results of both methods, seed by seed, got {len(a)} and {len(b)}")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n = len(differences)
    mean, std = mean_std(differences)
    if std < 1e-9 * max(map(abs, (*a, *b))):  # equal differences, but for the rounding of the subtraction
        std = 0.0
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    t, t_p = _t_test(differences, mean, std)
    low, high = confidence_interval(differences)
    return PairedDifference(mean, std, n, wins, losses, t, t_p, _sign_test(wins, losses), low, high)


def confidence_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % confidence interval of the mean of independent, normal values.

    Args:
        values: n numbers; of one alone it has no ends (NaN).

    Raises:
        ValueError: no values.

    >>> [round(end, 3) for end in confidence_interval([1.0, 2.0, 3.0])]
    [-0.484, 4.484]
    """
    mean, std = mean_std(values)
    if len(values) == 1:
        return math.nan, math.nan
    from scipy.stats import t  # slow to import, and only reports need it

    half = float(t.ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
    return mean - half, mean + half


def _t_test(differences: Sequence[float], mean: float, std: float) -> tuple[float, float]:
    if len(differences) == 1 or math.isnan(mean):
        return math.nan, math.nan
    if std == 0:
        return (0.0, 1.0) if mean == 0 else (math.copysign(math.inf, mean), 0.0)
    from scipy.stats import ttest_1samp  # slow to import, and only reports need it

    found = ttest_1samp(differences, 0.0)
    return float(found.statistic), float(found.pvalue)


def _sign_test(wins: int, losses: int) -> float:
    if wins + losses == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue)
