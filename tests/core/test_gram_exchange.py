import numpy as np
import pytest

from ddoq_ray.core import gram_exchange as e
from ddoq_ray.core.gram_kmeans import gram_matrix, lloyd_gram


def problem(n=120, dim=40, cells=9, seed=0, copies=False):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim)) + 3 * rng.normal(size=(6, dim))[rng.integers(6, size=n)]
    mass = rng.integers(1, 5, n).astype(float) if copies else np.ones(n)
    labels = rng.integers(cells, size=n)
    labels[:cells] = np.arange(cells)
    return x, mass, labels


def direct_sum(x, mass, labels):
    total = 0.0
    for cell in np.unique(labels):
        own = labels == cell
        mean = np.average(x[own], axis=0, weights=mass[own])
        total += mass[own] @ ((x[own] - mean) ** 2).sum(1)
    return total


def every_single_move(x, mass, labels, cells):
    for point in range(len(x)):
        if (labels == labels[point]).sum() > 1:
            for cell in range(cells):
                moved = labels.copy()
                moved[point] = cell
                yield direct_sum(x, mass, moved)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("cells", [2, 5, 15])
def test_at_the_end_no_single_move_helps(cells, copies):
    x, mass, labels = problem(40, 10, cells, cells, copies)
    end, total = e.exchange(gram_matrix(centred(x, mass)), mass, labels, cells)
    assert total == pytest.approx(direct_sum(x, mass, end), rel=1e-5)
    assert min(every_single_move(x, mass, end, cells)) > total - 1e-4 * total / len(x)
    assert (np.bincount(end, minlength=cells) > 0).all()


def centred(x, mass):
    return x - np.average(x, axis=0, weights=mass)


@pytest.mark.parametrize("copies", [False, True])
def test_an_end_is_one_of_lloyd_too(copies):
    x, mass, labels = problem(400, 60, 12, 3, copies)
    gram = gram_matrix(x)
    end, _ = e.exchange(gram, mass, labels, 12)
    assert (lloyd_gram(gram, mass, end, 12) == end).all()


@pytest.mark.parametrize("copies", [False, True])
def test_moves_that_share_no_cell_add_up_exactly(copies):
    x, mass, _ = problem(200, 30, 20, 1, copies)
    labels = ((x[:, None] - x[:20]) ** 2).sum(2).argmin(1)  # nearest of twenty samples
    state = e._Cells(gram_matrix(x), mass, labels, 20)
    before = direct_sum(x, mass, labels)
    points, targets = state.proposals(np.ones(20))
    touched = np.concatenate([labels[points], targets])
    assert len(points) > 2 and len(set(touched.tolist())) == len(touched)
    alone = []
    for point, target in zip(points, targets, strict=True):
        moved = labels.copy()
        moved[point] = target
        alone.append(before - direct_sum(x, mass, moved))
    assert state.move(points, targets)
    assert before - direct_sum(x, mass, state.labels) == pytest.approx(sum(alone), rel=1e-6)
    assert state.total - state.kept == pytest.approx(direct_sum(x, mass, state.labels), rel=1e-5)


def test_what_is_kept_up_to_date_is_what_a_fresh_look_sees():
    x, mass, labels = problem(300, 30, 8, 2, copies=True)
    gram = gram_matrix(x)
    state = e._Cells(gram, mass, labels, 8)
    for _ in range(12):
        state.move(*state.proposals(np.full(8, 6.0)))
    fresh = e._Cells(gram, mass, state.labels, 8)
    for name in ("sums", "sizes", "spread", "inner", "entering", "kept"):
        np.testing.assert_allclose(getattr(state, name), getattr(fresh, name), rtol=1e-5, atol=1e-3, err_msg=name)


def test_a_round_that_would_raise_the_sum_is_taken_back():
    # Each cell has a point at 0 and one at 10: one swap of points helps; all four moves only swap the names.
    x = np.array([[0.0], [0.0], [10.0], [10.0]])
    labels = np.array([0, 1, 0, 1])
    state = e._Cells(gram_matrix(x), np.ones(4), labels, 2)
    assert not state.move(np.arange(4), 1 - labels)
    fresh = e._Cells(gram_matrix(x), np.ones(4), labels, 2)
    for name in ("labels", "sums", "sizes", "spread", "inner", "entering", "kept"):
        assert np.array_equal(getattr(state, name), getattr(fresh, name)), name
    assert sorted(e.exchange(gram_matrix(x), np.ones(4), labels, 2)[0].tolist()) == [0, 0, 1, 1]
    assert e.exchange(gram_matrix(x), np.ones(4), labels, 2)[1] == 0.0


def test_turns():
    cells, rank = np.array([7, 2, 7, 7, 2, 5]), np.array([0, 1, 2, 0, 0, 2])
    # Cell 7 is named at ranks 0, 2 and 0 again: equal ranks in order; cell 2 at 1 and 0.
    assert e._turns(cells, rank).tolist() == [0, 1, 2, 1, 0, 0]


def test_the_only_point_of_a_cell_stays():
    x = np.array([[0.0], [0.1], [0.2], [5.0]])
    assert e.exchange(gram_matrix(x), np.ones(4), np.array([0, 0, 0, 1]), 2)[0].tolist() == [0, 0, 0, 1]
