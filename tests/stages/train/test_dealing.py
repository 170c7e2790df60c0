"""Which student a group takes next: each once, whatever group asks when, and after a death its own again."""

from __future__ import annotations

import pytest

from ddoq_ray.core.rng import philox
from ddoq_ray.stages.train.dealing import Dealer, Dealt


def shares(*counts: int) -> list[list[Dealt]]:
    rows = iter(range(sum(counts)))
    return [
        [Dealt(0, row, 1, f"student {row}") for _, row in zip(range(count), rows, strict=False)] for count in counts
    ]


@pytest.mark.parametrize("seed", range(20))
def test_each_student_is_dealt_once_whoever_asks_and_dies(seed: int) -> None:
    """Groups ask and start again at random; what a group was at when it died comes to it again, and to no other."""
    rng = philox("dealing", seed)
    counts = rng.integers(0, 5, 3)
    dealer, finished = Dealer(shares(*counts)), []
    at: list[Dealt | None] = [None] * 3
    through = [False] * 3
    while not all(through):
        group = int(rng.integers(3))
        if rng.random() < 0.3:
            dealer.begin(group, None)
            other = (group + 1) % 3
            finished += [at[other]] if at[other] is not None else []
            at[other] = dealer.next(other)  # between a group's beginning and its first question
            through[other] = at[other] is None
            before, at[group] = at[group], dealer.next(group)
            assert before is None or at[group] == before
        else:
            finished += [at[group]] if at[group] is not None else []
            at[group] = dealer.next(group)
        through[group] = at[group] is None
    assert sorted(d.row for d in finished) == list(range(counts.sum()))


def test_a_group_that_is_through_takes_the_last_of_the_one_with_most_left() -> None:
    dealer = Dealer(
        [[Dealt(0, 0, 1)], [Dealt(0, 1, 1), Dealt(0, 2, 1), Dealt(0, 3, 1)], [Dealt(0, 4, 5), Dealt(0, 5, 5)]]
    )
    assert [dealer.next(0).row for _ in range(4)] == [0, 5, 4, 3]
    assert [dealer.next(1).row for _ in range(2)] == [1, 2] and dealer.next(1) is dealer.next(2) is None


def test_a_checkpoints_student_comes_first_wherever_it_was_dealt() -> None:
    """A run that was cut off while a group trained another's student goes on with it."""
    dealer = Dealer(shares(3, 2))
    dealer.begin(1, "student 2")
    dealer.begin(0, "of another configuration")
    assert [dealer.next(1).row, dealer.next(0).row, dealer.next(1).row] == [2, 0, 3]
