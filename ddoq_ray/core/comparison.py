"""What a comparison says of each method: its spread over seeds, and its paired differences.

Rows are plain mappings, one a trained student, with the keys method, ipc, student, size, teacher, protocol, labels
(`soft` or `hard`), seed, top1_pct (None where it diverged) and train_images. Figures are percent or points of top-1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ddoq_ray.core.metrics import mean_std, paired_difference

Row = Mapping[str, Any]
RANDOM, FULL = "random", "full"
SETTING = ("student", "size", "teacher", "labels")


def lines_of(rows: Sequence[Row], reference: str = RANDOM) -> list[dict[str, Any]]:
    """One line a (student, teacher, labels, ipc, method), in the order of the rows.

    A method of which a student diverged has no figures: the mean of the seeds that went well is not the method's.

    Args:
        rows: One a student.
        reference: The method from which differences are taken.

    Returns:
        Mappings with the setting, `seeds`, `top1_pct` of each, `mean_pct` and `std_pct` (None for one seed),
        `against` (None, or see `against`), `ior_pct` and `hlr_pct`. The whole training set has no ipc.
    """
    groups: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault(_key(row), {})[row["seed"]] = row
    scores = {key: _scores(seeds) for key, seeds in groups.items()}
    lines = []
    for key, seeds in groups.items():
        found = scores[key]
        first = next(iter(seeds.values()))
        line: dict[str, Any] = dict(zip((*SETTING, "ipc", "method"), key, strict=True))
        line |= {
            "protocol": first["protocol"],
            "train_images": first["train_images"],
            "seeds": sorted(seeds),
            "top1_pct": [seeds[s]["top1_pct"] for s in sorted(seeds)],
            "diverged": sum(row["top1_pct"] is None for row in seeds.values()),
            "mean_pct": mean_std(list(found.values())).mean if found else None,
            "std_pct": _known(mean_std(list(found.values())).std) if found else None,
            "against": against(found, _other(scores, key, reference), reference),
        }
        drawn = against(found, _other(scores, key, RANDOM), RANDOM)
        line["ior_pct"] = drawn["mean_pct"] if drawn is not None else None
        line["hlr_pct"] = hard_label_recovery(scores, key)
        lines.append(line)
    return lines


def against(mine: Mapping[int, float], other: Mapping[int, float], name: str) -> dict[str, Any] | None:
    """A method's top-1 less another's over the seeds that both have; None where there are none.

    Args:
        mine, other: seed -> top-1.
        name: The other's.

    Returns:
        method, n, mean_pct, std_pct, low_pct and high_pct (Student's 95 % interval of the mean; None for one pair).
    """
    seeds = sorted(set(mine) & set(other))
    if not seeds or mine is other:
        return None
    d = paired_difference([mine[s] for s in seeds], [other[s] for s in seeds])
    return {
        "method": name, "n": d.n, "mean_pct": d.mean, "std_pct": _known(d.std), "low_pct": _known(d.low),
        "high_pct": _known(d.high),
    }  # fmt: skip


def hard_label_recovery(scores: Mapping[tuple[Any, ...], Mapping[int, float]], key: tuple[Any, ...]) -> float | None:
    """How far students of the set's hard labels stay below those of all real images, in points; less is better.

    HLR = Acc(real, hard) - Acc(set, hard), of the means over seeds. Its companion is the improvement over random,
    IOR = Acc(set, any labels) - Acc(random, the same labels).

    Source: Li et al., "DD-Ranking: Rethinking the Evaluation of Dataset Distillation", arXiv 2505.13300;
    NUS-HPC-AI-Lab/DD-Ranking@5c94181, README.md. There students of hard labels have a protocol of their own, with a
    learning rate that is searched for; here they have the comparison's.

    Args:
        scores: Of all lines, by (student, size, teacher, labels, ipc, method): seed -> top-1.
        key: A line; None comes back where no student learnt its hard labels, or none those of the real images.
    """
    student, size, _, _, ipc, method = key

    def hard(of: str, at: int | None) -> Mapping[int, float]:
        # Whatever the teacher: it has no part in hard labels.
        found = (s for k, s in scores.items() if (*k[:2], *k[3:]) == (student, size, "hard", at, of))
        return next(found, {})

    mine, real = hard(method, ipc), hard(FULL, None)
    if not mine or not real or method == FULL:
        return None
    return mean_std(list(real.values())).mean - mean_std(list(mine.values())).mean


def _key(row: Row) -> tuple[Any, ...]:
    ipc = None if row["method"] == FULL else row["ipc"]
    return (*(row[name] for name in SETTING), ipc, row["method"])


def _scores(seeds: Mapping[int, Row]) -> dict[int, float]:
    """seed -> top-1; none where one of them diverged."""
    found = {seed: seeds[seed]["top1_pct"] for seed in sorted(seeds)}
    return {} if None in found.values() else found


def _other(
    scores: Mapping[tuple[Any, ...], Mapping[int, float]], key: tuple[Any, ...], name: str
) -> Mapping[int, float]:
    *setting, ipc, method = key
    if method == FULL:  # it has more images than any other: a difference would say nothing
        return {}
    return scores.get((*setting, None if name == FULL else ipc, name), {})


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def settings_of(lines: Iterable[Row]) -> list[tuple[Any, ...]]:
    """The distinct (student, size, teacher, labels) of lines, in order."""
    return list(dict.fromkeys(tuple(line[name] for name in SETTING) for line in lines))
