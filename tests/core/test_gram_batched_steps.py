import itertools

import numpy as np
import pytest
import torch

from ddoq_ray.core import gram_batched_steps as gs
from ddoq_ray.core import gram_kmeans as g
from ddoq_ray.core.rng import philox


def mixture(n, dim, modes, seed):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(modes, dim))
    return (means[rng.integers(modes, size=n)] + rng.normal(size=(n, dim)) + 2).astype(np.float32)


def direct_sum(x, labels):
    x = x.astype(np.float64)
    return sum(((x[labels == c] - x[labels == c].mean(0)) ** 2).sum() for c in np.unique(labels))


def stacked(classes, masses=None):
    """Gram matrices and masses of unequal classes, padded."""
    largest = max(map(len, classes))
    gram = torch.zeros(len(classes), largest, largest)
    mass = torch.zeros(len(classes), largest, dtype=torch.float64)
    for c, x in enumerate(classes):
        gram[c, : len(x), : len(x)] = torch.from_numpy(g.gram_matrix(x))
        mass[c, : len(x)] = 1.0 if masses is None else torch.from_numpy(masses[c])
    return gram, mass


def some_labels(classes, k, seed=0):
    """Random labels, each used, of padded classes."""
    labels = torch.zeros(len(classes), max(map(len, classes)), dtype=torch.int64)
    for c, x in enumerate(classes):
        drawn = np.concatenate([np.arange(k), np.random.default_rng(seed + c).integers(k, size=len(x) - k)])
        labels[c, : len(x)] = torch.from_numpy(drawn)
    return labels


@pytest.mark.parametrize("k", [1, 2, 13])
def test_seeds_are_those_of_numpy(k):
    classes = [mixture(n, 40, 6, n) for n in (14, 80, 51)]
    masses = [np.random.default_rng(n).integers(1, 5, n).astype(np.float64) for n in (14, 80, 51)]
    gram, mass = stacked(classes, masses)
    ours = gs.kmeans_plus_plus(gram, mass, k, gs.seed_uniforms(3, [7, 8, 9], 1, k))
    for c, x in enumerate(classes):
        theirs = g.kmeans_plus_plus(g.gram_matrix(x), masses[c], k, philox("gram_kmeans", 3, 7 + c, 1))
        assert ours[c].tolist() == theirs.tolist()


def test_seeds_that_no_draw_can_reach_are_the_first_left():
    gram = torch.zeros(2, 5, 5)
    mass = torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.float64)
    uniforms = torch.zeros(2, 1 + 2 * 3, dtype=torch.float64)
    uniforms[1, 0] = 0.9
    assert gs.kmeans_plus_plus(gram, mass, 3, uniforms).tolist() == [[0, 1, 2], [4, 0, 1]]


def test_lloyd_is_that_of_numpy_for_each_class():
    classes = [mixture(n, 120, 6, n) for n in (150, 40, 97, 20)]
    masses = [np.random.default_rng(n).integers(1, 4, n).astype(np.float64) for n in map(len, classes)]
    gram, mass = stacked(classes, masses)
    labels = some_labels(classes, 7)
    ours = gs.lloyd(gram, mass, labels, 7, 300)
    for c, x in enumerate(classes):
        theirs = g.lloyd_gram(g.gram_matrix(x), masses[c], labels[c, : len(x)].numpy(), 7)
        assert (ours[c, : len(x)].numpy() == theirs).all()


def test_lloyd_goes_on_in_float64_where_float32_would_go_in_circles_and_ends(monkeypatch):
    # 40 modes far apart, 60 cells: within a mode the distances are as small as the rounding of their sums.
    rng = np.random.default_rng(0)
    modes = rng.normal(size=(40, 64))
    tight = (modes[rng.integers(40, size=400)] + 3e-4 * rng.normal(size=(400, 64))).astype(np.float32)
    gram, mass = stacked([tight, mixture(300, 64, 9, 0)])
    start = gs.start(gram, gs.kmeans_plus_plus(gram, mass, 60, gs.seed_uniforms(0, [0, 1], 0, 60)))
    passes = []
    exact_sums = gs.exact_sums
    monkeypatch.setattr(gs, "exact_sums", lambda *given: passes.append(given[4]) or exact_sums(*given))
    labels = gs.lloyd(gram, mass, start, 60, 300)
    assert 1 <= len(passes) < 50 and all(places == [0] for places in passes)
    theirs = g.lloyd_gram(gram[0].numpy(), np.ones(400), start[0].numpy(), 60)
    assert direct_sum(tight, labels[0].numpy()) == pytest.approx(direct_sum(tight, theirs), rel=0.02)


def test_an_empty_cell_is_seeded_with_the_farthest_point():
    labels = torch.tensor([[0, 0, 0, 2, 0], [0, 1, 2, 2, 2], [0, 0, 0, 0, 0]])
    pull = torch.tensor([[1.0, 5, 2, 9, 99], [1, 5, 2, 9, 3], [1, 5, 2, 9, 3]], dtype=torch.float64)
    real = torch.tensor([[True] * 4 + [False], [True] * 5, [True] * 5])
    gs._reseed_empty(labels, pull, real, 3)
    assert labels.tolist() == [[0, 1, 0, 2, 0], [0, 1, 2, 2, 2], [0, 2, 0, 1, 0]]


def test_every_round_of_exchanges_lowers_each_distortion_by_its_gains(monkeypatch):
    classes = [mixture(n, 50, 10, n) for n in (120, 60, 33)]
    gram, mass = stacked(classes)
    labels = some_labels(classes, 9)
    claimed = []

    def record(gain, *rest):
        taken = choose(gain, *rest)
        claimed.append((gain * taken).sum(dim=1))
        assert (gain[taken] > 0).all()
        return taken

    choose = gs.disjoint_exchanges
    monkeypatch.setattr(gs, "disjoint_exchanges", record)
    rounds = 0
    while True:
        moved, made = gs.exchange(gram, mass, labels, 9, 1)
        if not made:
            break
        for c, x in enumerate(classes):
            before, after = (direct_sum(x, step[c, : len(x)].numpy()) for step in (labels, moved))
            assert before - after == pytest.approx(float(claimed[-1][c]), rel=1e-5, abs=1e-5 * before)
        labels, rounds = moved, rounds + 1
    assert rounds > 5
    assert not [c for c in range(3) if len(set(labels[c, : len(classes[c])].tolist())) < 9]


def test_no_single_exchange_helps_any_class_at_the_end():
    classes = [mixture(n, 6, 5, n) for n in (40, 25, 12, 9)]
    copies = [np.random.default_rng(n).integers(1, 4, n).astype(np.float64) for n in map(len, classes)]
    gram, mass = stacked(classes, copies)
    k = 6
    labels, _ = gs.exchange(gram, mass, some_labels(classes, k), k, 1000)
    for x, w, own in zip(classes, copies, labels.numpy(), strict=True):
        repeated, own = np.repeat(x, w.astype(int), axis=0), own[: len(x)]
        least = direct_sum(repeated, np.repeat(own, w.astype(int)))
        for j, b in itertools.product(range(len(x)), range(k)):
            moved = own.copy()
            moved[j] = b
            if len({*moved.tolist()}) == k:
                assert direct_sum(repeated, np.repeat(moved, w.astype(int))) >= least * (1 - 1e-6)


def test_exchanges_of_a_round_are_those_of_the_greedy_choice():
    rng = np.random.default_rng(0)
    gain = torch.from_numpy(rng.integers(1, 12, size=(20, 30)).astype(float))  # with ties
    source = torch.from_numpy(rng.integers(8, size=(20, 30)))
    target = (source + torch.from_numpy(rng.integers(1, 8, size=(20, 30)))) % 8
    useful = gain > 3
    taken = gs.disjoint_exchanges(gain, source, target, useful, 8)
    for c in range(20):
        used, greedy = set(), []
        for j in sorted(range(30), key=lambda j, c=c: (-float(gain[c, j]), j)):
            pair = {int(source[c, j]), int(target[c, j])}
            if useful[c, j] and not pair & used:
                used |= pair
                greedy.append(j)
        assert taken[c].nonzero()[:, 0].tolist() == sorted(greedy)
