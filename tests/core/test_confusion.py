"""Teachers made by hand: a wrong mapping is found, a hard class is not."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ddoq_ray.core.confusion import Mistaken, swapped_classes


def teacher(classes: int, images: int, accuracy: float = 0.97, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(true class, what a good teacher calls it) of `images` a class; its errors are spread over the other classes."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(classes), images)
    wrong = (truth + rng.integers(1, max(2, classes), truth.size)) % classes
    return truth, np.where(rng.random(truth.size) < accuracy, truth, wrong)


def judged(truth: np.ndarray, output: np.ndarray, columns: list[int]) -> list[tuple[int, int, bool]]:
    """Of a teacher whose largest output is `output`: chosen among the data's columns where it is one of them."""
    place = {column: c for c, column in enumerate(columns)}
    chosen = np.array([place.get(o, 0) for o in output.tolist()])
    return [(m.class_id, m.called, m.foreign) for m in swapped_classes(truth, chosen, output, columns)]


@pytest.mark.parametrize("images", [5, 8, 50])
@pytest.mark.parametrize("accuracy", [1.0, 0.97])
def test_two_swapped_classes_are_found(images: int, accuracy: float) -> None:
    truth, output = teacher(10, images, accuracy)
    columns = [0, 1, 2, 5, 4, 3, 6, 7, 8, 9]
    expected = [(3, 5, False), (5, 3, False)]
    found = judged(truth, output, columns)
    assert found == expected if images > 5 or accuracy == 1 else set(found) <= set(expected)


def test_a_cycle_and_a_shifted_list_are_found() -> None:
    truth, output = teacher(10, 20)
    assert [m[0] for m in judged(truth, output, [1, 2, 0, *range(3, 10)])] == [0, 1, 2]
    assert len(judged(truth, output, [*range(1, 10), 0])) == 10


def test_an_index_of_no_class_of_the_data_is_found_by_what_the_class_is_called() -> None:
    truth, output = teacher(3, 20)
    assert judged(truth, output, [0, 1, 134]) == [(2, 2, True)]


@pytest.mark.parametrize("images", [2, 5, 20, 200])
def test_a_hard_class_that_another_takes_in_is_not_a_wrong_mapping(images: int) -> None:
    for own in (0.0, 0.1, 0.3):  # none, or few, of its images are recognised: a class of few training images
        truth, output = teacher(10, images)
        hard = np.flatnonzero(truth == 4)
        output[hard] = np.where(np.arange(len(hard)) < own * len(hard), 4, 7)
        assert judged(truth, output, list(range(10))) == []
    truth, output = teacher(10, images)
    output[np.isin(truth, (1, 2, 3))] = 9  # three classes that all end in one
    assert judged(truth, output, list(range(10))) == []


def test_siblings_that_nobody_can_tell_apart_do_not_stop_a_run() -> None:
    for seed in range(20):  # 100 pairs, each class called by either name: some pairs look swapped by chance
        rng = np.random.default_rng(seed)
        truth = np.repeat(np.arange(200), 5)
        output = np.where(rng.random(truth.size) < 0.5, truth, truth ^ 1)
        assert judged(truth, output, list(range(200))) == []


def test_a_weak_teacher_is_only_weak() -> None:
    for seed in range(20):
        truth, output = teacher(100, 10, 0.15, seed)
        assert judged(truth, output, list(range(100))) == []


def test_shares_and_borders_by_hand() -> None:
    """Of class 0 so many images are called 0, 1 and 2; those of class 1 are called 0."""

    def suspects(own: int, other: int, third: int) -> list[Mistaken]:
        truth = np.repeat([0, 1], [own + other + third, 100])
        named = np.concatenate([np.repeat([0, 1, 2], [own, other, third]), np.zeros(100, np.int64)])
        return swapped_classes(truth, named, named, [0, 1, 2])

    swapped = [Mistaken(0, 1, False, 0.76, 0.2, 100), Mistaken(1, 0, False, 1.0, 0.0, 100)]
    assert suspects(20, 76, 4) == swapped
    assert [len(suspects(*names)) for names in ((25, 75, 0), (24, 76, 0))] == [0, 2]  # three times, and more
    assert [len(suspects(*names)) for names in ((0, 50, 50), (0, 51, 49))] == [0, 2]  # half, and more


def test_little_evidence_and_one_class_prove_nothing() -> None:
    truth, output = teacher(10, 2, 1.0)
    assert judged(truth, output, [1, 0, *range(2, 10)]) == []
    assert swapped_classes(*np.zeros((3, 5), np.int64), [0]) == []
    assert swapped_classes(*np.zeros((3, 0), np.int64), [0, 1]) == []


def test_every_class_of_imagenet_21k_in_seconds() -> None:
    truth, output = teacher(21841, 20)
    start = time.process_time()
    columns = list(range(21841))
    columns[7], columns[9] = 9, 7
    assert judged(truth, output, columns) == [(7, 9, False), (9, 7, False)]
    assert time.process_time() - start < 10
