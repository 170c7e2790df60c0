import os
import subprocess
import sys

import numpy as np
import pytest

from ddoq_ray.core.clvq import WINNERS, Clvq
from ddoq_ray.core.distortion import distortion, total_variation, voronoi_counts


def samples(n, dim, seed=0, offset=0.5):
    return (np.random.default_rng(seed).normal(size=(n, dim)) + offset).astype(np.float32)


def make(k=5, dim=7, **options):
    return Clvq(k, dim, **({"seed": 3, "class_id": 2} | options))


def fitted(x, k, **options):
    q = make(k, x.shape[1], **options)
    q.update(x)
    return q


def same_bytes(a, b):
    a, b = a.state(), b.state()
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() and a[n].shape == b[n].shape for n in a)


def test_by_hand():
    # Buffer 2 = both are centroids, in some order, with count 1 each. Then 3 (nearest 0: (0+3)/2), then 5.
    # paper: 5 is at 3.5 of 1.5 and at 5 of 10. corrected: 2/3 * 12.25 = 8.2 against 1/2 * 25 = 12.5.
    # Both: 1.5 wins, v = 3, 1.5 + 3.5/3 = 8/3.
    for winner in WINNERS:
        q = fitted(np.array([[0.0], [10.0], [3.0], [5.0]]), 2, buffer=2, winner=winner)
        centroids, counts = q.result()
        order = np.argsort(centroids[:, 0])
        np.testing.assert_allclose(centroids[order, 0], [8 / 3, 10], rtol=1e-6)
        assert counts[order].tolist() == [3, 1] and counts.dtype == np.int64


def test_the_two_rules_part_where_they_should():
    # 0 with v=3 (after 0, 0) and 10 with v=1; x=4.9: paper 24.01 < 26.01 takes 0; corrected
    # 3/4*24.01 = 18.0 against 1/2*26.01 = 13.0 takes 10.
    x = np.array([[0.0], [10.0], [0.0], [0.0], [4.9]])
    expected = {"paper": [(1.225, 4), (10.0, 1)], "corrected": [(0.0, 3), (7.45, 2)]}
    for winner, cells in expected.items():
        centroids, counts = fitted(x, 2, buffer=2, winner=winner).result()
        got = sorted(zip(centroids[:, 0].tolist(), counts.tolist(), strict=True))
        assert [c for _, c in got] == [c for _, c in cells]
        np.testing.assert_allclose([v for v, _ in got], [v for v, _ in cells], rtol=1e-6)


def reference(x, k, winner, start, skip):
    """Algorithm 3 word for word, in float64."""
    z, v = start.astype(np.float64), np.ones(k)
    for row in np.delete(x, skip, axis=0).astype(np.float64):
        score = ((z - row) ** 2).sum(1)
        best = np.argmin(score if winner == "paper" else score * v / (v + 1))
        v[best] += 1
        z[best] = (1 - 1 / v[best]) * z[best] + row / v[best]
    return z, v


@pytest.mark.parametrize("winner", WINNERS)
@pytest.mark.parametrize("dim", [3, 257])
def test_equals_the_algorithm_as_printed(winner, dim):
    x = samples(600, dim, 1)
    # The initial centroids: the same quantizer, stopped before it consumes the other buffered samples.
    probe = make(8, dim, winner=winner, buffer=20)
    probe._consume = lambda rows: None
    probe.update(x[:20])
    initial = probe.result()[0]
    skip = [int(np.flatnonzero((x == row).all(1))[0]) for row in initial]
    z, v = reference(x, 8, winner, initial, skip)
    centroids, counts = fitted(x, 8, winner=winner, buffer=20).result()
    assert (counts == v).all()
    np.testing.assert_allclose(centroids, z, atol=2e-5)


@pytest.mark.parametrize("winner", WINNERS)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("dim", [1, 64, 300])
def test_the_cut_of_the_stream_changes_no_byte(winner, batch, dim):
    x = samples(500, dim, 2)
    whole = fitted(x, 6, winner=winner, batch=batch)
    for seed in range(4):
        cut = make(6, dim, winner=winner, batch=batch)
        at = np.sort(np.random.default_rng(seed).integers(0, 500, size=[3, 40, 200, 1][seed]))
        for part in np.split(x, at):
            cut.update(part)
            cut.result()  # looking changes nothing
        assert same_bytes(whole, cut)
        assert whole.result()[0].tobytes() == cut.result()[0].tobytes()
    rows = make(6, dim, winner=winner, batch=batch)
    strided = np.asfortranarray(x)
    for i in range(500):
        rows.update(strided[i : i + 1])
    assert same_bytes(whole, rows)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("at", [0, 1, 5, 40, 63, 64, 65, 83, 200])
def test_state_goes_round_anywhere(batch, at):
    x = samples(300, 9, 3)
    straight = fitted(x, 6, batch=batch)
    q = fitted(x[:at], 6, batch=batch)
    saved = q.state()
    frozen = {name: array.copy() for name, array in saved.items()}
    copy = Clvq.from_state(saved)
    assert same_bytes(q, copy) and copy.n_seen == at
    q.update(x[at:])  # the saved arrays are not the live ones
    assert all((saved[name] == frozen[name]).all() for name in saved)
    copy.update(x[at:])
    assert same_bytes(copy, straight) and same_bytes(q, straight)


def test_state_survives_a_numpy_archive(tmp_path):
    q = fitted(samples(100, 9), 6)
    np.savez(tmp_path / "state.npz", **q.state())
    with np.load(tmp_path / "state.npz") as archive:
        assert same_bytes(Clvq.from_state(archive), q)


@pytest.mark.processes
def test_thread_count_changes_no_byte():
    code = (
        "import numpy as np, hashlib; from ddoq_ray.core.clvq import Clvq\n"
        "x = np.random.default_rng(0).normal(size=(900, 2000)).astype('f4'); h = hashlib.sha256()\n"
        "for b in (1, 32):\n"
        "  q = Clvq(40, 2000, seed=0, class_id=0, batch=b); q.update(x); h.update(q.result()[0].tobytes())\n"
        "print(h.hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"OPENBLAS_NUM_THREADS": threads, "OPENBLAS_CORETYPE": core},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads, core in (("1", "Haswell"), ("2", "Haswell"), ("1", "Nehalem"))
    }
    assert len(digests) == 1


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("n", [0, 1, 4, 30, 64, 66, 200])
def test_every_sample_is_counted(n, batch):
    q = fitted(samples(n, 3), 5, batch=batch)
    centroids, counts = q.result()
    assert counts.sum() == n == q.n_seen
    assert len(centroids) == len(counts) == min(5, n) and (counts >= 1).all()


def test_centroids_are_the_means_of_what_they_won():
    # The weighted mean of the centroids is the mean of the data, whichever rule and batch.
    x = samples(700, 40, 5)
    for winner in WINNERS:
        for batch in (1, 32):
            centroids, counts = fitted(x, 12, winner=winner, batch=batch).result()
            np.testing.assert_allclose(counts @ centroids / 700, x.mean(0), atol=1e-5)


def test_a_short_class_gives_its_distinct_samples():
    x = np.array([[1.0, 0.0], [2.0, 0.0], [1.0, -0.0], [1.0, 0.0]], np.float32)
    centroids, counts = fitted(x, 5).result()
    assert sorted(zip(centroids.tolist(), counts.tolist(), strict=True)) == [([1.0, 0.0], 3), ([2.0, 0.0], 1)]


@pytest.mark.parametrize("batch", [1, 4])
def test_copies_in_the_buffer_cost_no_centroid(batch):
    fresh = samples(20, 3)
    x = np.concatenate([np.repeat(fresh[:2], 5, axis=0), fresh[:1], fresh[2:]])
    q = make(4, 3, buffer=8, batch=batch)
    for n, row in enumerate(x, 1):
        q.update(row[None])
        assert len(q.result()[0]) == min(4, len(np.unique(x[:n], axis=0)))
        assert q.result()[1].sum() == n


def test_a_mini_batch_with_frozen_winners():
    # After the buffer: 0 and 10, v=1 each. Batch (1, 2, 9): cells {1, 2} and {9} at once.
    q = fitted(np.array([[0.0], [10.0], [1.0], [2.0], [9.0]]), 2, buffer=2, batch=3, winner="paper")
    centroids, counts = q.result()
    order = np.argsort(centroids[:, 0])
    np.testing.assert_allclose(centroids[order, 0], [1.0, 9.5], rtol=1e-6)
    assert counts[order].tolist() == [3, 2]


def test_corrected_beats_paper_in_high_dimension():
    x = samples(1300, 2048, 7)
    result = {winner: fitted(x, 10, winner=winner, buffer=10).result() for winner in WINNERS}
    value = {winner: distortion(x, centroids) for winner, (centroids, _) in result.items()}
    # An isotropic Gaussian: all any quantizer can do is to explain K of its n noise directions.
    explained = {winner: x.var(axis=0).sum() - value[winner] for winner in WINNERS}
    assert value["corrected"] < value["paper"] and explained["corrected"] > 1.3 * explained["paper"]
    # The paper's rule gives nearly everything to few cells; the corrected one shares.
    assert result["paper"][1].max() > 0.9 * 1300
    assert result["corrected"][1].max() < 0.25 * 1300


def test_counts_are_close_to_the_voronoi_masses():
    x = samples(3000, 4, 8)
    centroids, counts = fitted(x, 10).result()
    assert total_variation(counts / 3000, voronoi_counts(x, centroids) / 3000) < 0.12


def sample_by_sample(x, k, winner):
    """The same arithmetic with every distance made anew and in float64, after the first k samples."""
    z, v = fitted(x[:k], k, buffer=k, winner=winner).result()
    for row in x[k:]:
        score = ((z.astype(np.float64) - row) ** 2).sum(1) * (v / (v + 1) if winner == "corrected" else 1.0)
        best = int(np.argmin(score))
        v[best] += 1
        z[best] += (row - z[best]) * np.float32(1.0 / v[best])
    return z, v


@pytest.mark.parametrize("winner", WINNERS)
@pytest.mark.parametrize(
    ("dim", "offset", "spread"),
    [(2, 0.5, 1.0), (3, 3000.0, 1.0), (300, 0.5, 1.0), (40, 1e4, 1.0), (40, 1e4, 0.01), (5, 0.0, 1e18)],
)
def test_products_kept_up_to_date_decide_as_distances_made_anew(winner, dim, offset, spread):
    x = (np.random.default_rng(dim).normal(size=(700, dim)) * spread + offset).astype(np.float32)
    x[300:340] = x[10:50]  # copies make ties
    with np.errstate(over="ignore"):
        z, v = sample_by_sample(x, 9, winner)
    centroids, counts = fitted(x, 9, buffer=9, winner=winner).result()
    assert centroids.tobytes() == z.tobytes() and (counts == v).all()


def test_close_calls_are_decided_exactly():
    # Far from the origin float32 products cannot tell the centroids apart: the float64 differences do.
    base = np.full(64, 4096.0, np.float32)
    a, b, x = base.copy(), base.copy(), base.copy()
    a[0] += 1.0
    b[0] -= 1.0
    x[0] += 0.25
    centroids, counts = fitted(np.stack([a, b] + [x] * 3), 2, buffer=2, winner="paper").result()
    assert counts[np.argmax(centroids[:, 0])] == 4 and counts.min() == 1


def test_refusals_leave_the_state_alone():
    q = fitted(samples(70, 7), 5)
    before = q.state()
    for bad in (
        np.zeros((2, 3), "f4"),
        np.full((1, 7), np.inf, "f4"),
        np.zeros(7, "f4"),
        np.full((1, 7), 1e300),
    ):
        with pytest.raises(ValueError):
            q.update(bad)
    assert all(before[n].tobytes() == q.state()[n].tobytes() for n in before)
    for options in ({"k": 0}, {"dim": 0}, {"batch": 0}, {"winner": "best"}, {"buffer": 4}, {"seed": 2**63}):
        with pytest.raises(ValueError):
            make(**options)
    with pytest.raises(ValueError, match="version"):
        Clvq.from_state(before | {"version": np.array(9)})
    with pytest.raises(ValueError, match="contradicts"):
        Clvq.from_state(before | {"n_seen": np.array(1)})
    with pytest.raises(ValueError, match="missing"):
        Clvq.from_state({})
