"""Centroids that generalize: each drawn towards its neighbours by what its own cell's size says of its noise.

Shape suffixes: N latents of a class, K centroids, D flattened latent dimension, P nodes of a level, G groups of these.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BRANCHING = 3  # nodes in a group, on average: 2 to 8 gave the same within 0.3 % on latents of CIFAR-10
# Of the spread within a group, the least part that is taken for real. Without it K near N, where every member is a
# centroid, would leave nothing but the groups' means (0.03 to 0.25 differ by at most 1 %; smaller K do not reach it).
LEAST_REAL = 0.25
# Weight of the variance about groups beside that about their nodes, as a share of the latents (0.02 to 0.4: the same
# within 1 % on latents of CIFAR-10). None would trust cells whose members were chosen for being near; all would blur
# clusters that are apart.
OF_GROUPS = 0.05
_ROWS = 64  # of latents whose deviations are in memory at a time

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


def shrunk(
    centroids: npt.NDArray[np.floating], counts: npt.NDArray[np.integer], distortion: float
) -> npt.NDArray[np.float32]:
    """Centroids of a class drawn towards the means of their neighbours, as the means of few members deserve.

    In high dimension the mean of m latents is off by about V/m (V: their variance), and an optimal grid has many small
    cells: so a grid that is better on the latents it was made of is worse on others. Centroids are grouped with their
    nearest, some three together, the groups' means likewise, until one is left, the class mean. Within a group each
    is taken for `group mean + own deviation + noise of variance V/m_k`, the deviations of variance tau, and becomes its
    posterior mean

        c_k  ->  mean + tau / (tau + V / m_k) (c_k - mean),

    with tau by the method of moments, and the mean what the next level has made of it. V is the latents' variance about
    the nodes of a level, pooled with a little of that about its groups: where every member is a centroid there is no
    other. Both follow from the codebook alone (the law of total variance): no latent is read.

    Args:
        centroids: [K, D], means of their cells.
        counts: int [K], members of the cells, each at least 1.
        distortion: mean squared distance of the class's latents to their centroids.

    Returns:
        float32 [K, D]. A single centroid stays as it is, and equal ones stay equal.

    Raises:
        ValueError: shapes that do not fit, an empty cell, or a distortion that is negative or not finite.

    Source: Efron & Morris, JASA 1973 (James-Stein as empirical Bayes, unequal variances); tau as in DerSimonian &
    Laird, Controlled Clinical Trials 1986; groups by Ward, JASA 1963.

    Differences from them: the pooled noise, since members of a cell were chosen for being near; tau is at least
    `LEAST_REAL` of the spread within the group; and the levels are ours: towards the class mean alone, classes of
    clusters that stand apart came out worse than not shrunk at all.

    >>> shrunk(np.array([[-1.0], [1.0]]), np.array([50, 50]), 0.5)[:, 0].round(3)
    array([-0.994,  0.994], dtype=float32)
    """
    x, m = np.asarray(centroids), np.asarray(counts, np.float64)
    x = x if x.dtype == np.float32 else x.astype(np.float64)
    if x.ndim != 2 or m.shape != x.shape[:1] or not len(m) or m.min() < 1:
        raise ValueError(f"expected centroids [K, D] and counts [K] of 1 or more, got {x.shape} and {counts}")
    if not (np.isfinite(distortion) and distortion >= 0):
        raise ValueError(f"expected a distortion of 0 or more, got {distortion}")
    mean = (m @ x / m.sum()).astype(x.dtype)
    own = x - mean
    made: npt.NDArray[np.float32] = (_posterior(own @ own.T, m, distortion).astype(x.dtype) @ own + mean).astype(
        np.float32
    )
    return made


def _posterior(products: npt.NDArray[np.floating], m: Float64, distortion: float) -> Float64:
    """[K, K]: the shrunk centroids as weighted means of the centroids, of which the inner products [K, K] are given.

    Every node is such a mean: D is met in the products and where these weights are used, and nowhere else.
    """
    gram, n = products.astype(np.float64), float(m.sum())
    nodes: Float64 = np.eye(len(m))  # [P, K]
    scatter = n * distortion  # about the nodes of the level, of all latents
    kept: list[tuple[Int64, Float64]] = []
    for group in _levels(gram):
        means, members = _means(nodes, m, group)
        deviations = nodes - means[group]
        squares = np.einsum("pk,pk->p", deviations @ gram, deviations).clip(0)
        among: Float64 = np.bincount(group, m * squares).astype(np.float64)
        about_groups = (scatter + float(among.sum())) / max(n - len(members), 1)
        noise = (scatter + OF_GROUPS * n * about_groups) / (n - len(m) + OF_GROUPS * n)
        scatter += float(among.sum())
        kept.append((group, deviations * _factors(m, group, members, among, noise)[:, None]))
        nodes, m = means, members
    for group, deviations in reversed(kept):
        nodes = nodes[group] + deviations
    return nodes


def _levels(gram: Float64) -> list[Int64]:
    """Of each level, from the centroids [K, K] up to their mean: int64 [P], the group of each of its nodes."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(gram) == 1:
        return []
    squared = np.diag(gram)
    apart = np.sqrt((squared[:, None] + squared - 2 * gram).clip(0))
    np.fill_diagonal(apart, 0)
    tree = linkage(squareform(apart, checks=False), "ward")
    node, levels, left = np.arange(len(gram)), [], len(gram)
    while left > 1:
        groups = np.unique(fcluster(tree, max(1, round(left / BRANCHING)), "maxclust"), return_inverse=True)[1]
        of_node = np.empty(left, np.int64)
        of_node[node] = groups  # Ward's groups are nested: all that a node holds are in one
        levels.append(of_node)
        node, left = groups, int(groups.max()) + 1
    return levels


def _means(nodes: Float64, m: Float64, group: Int64) -> tuple[Float64, Float64]:
    """[G, K], [G]: the means of groups, by the members of their nodes, and how many members they have."""
    order = np.argsort(group, kind="stable")
    firsts = np.searchsorted(group[order], np.arange(group.max() + 1))
    members = np.add.reduceat(m[order], firsts)
    return np.add.reduceat((m[:, None] * nodes)[order], firsts) / members[:, None], members


def _factors(m: Float64, group: Int64, members: Float64, among: Float64, noise: float) -> Float64:
    """[P]: what is left of each node's deviation from its group's mean.

    Args:
        m: [P], members of the nodes.
        group: int64 [P].
        members: [G], of the groups.
        among: [G], sums of the nodes' squared deviations, each times its members.
        noise: variance of a latent.
    """
    nodes, squares = np.bincount(group), np.bincount(group, m * m)
    effective = np.where(nodes > 1, members - squares / members, 1.0)
    real = np.maximum((among - (nodes - 1) * noise) / effective, LEAST_REAL * among / members)[group]
    moved = (nodes[group] > 1) & (among[group] > 0)
    return np.where(moved, real / np.where(moved, real + noise / m, 1.0), 1.0)


def shrunk_means(
    x: npt.NDArray[np.floating], centroids: npt.NDArray[np.floating], counts: npt.NDArray[np.integer]
) -> npt.NDArray[np.float32]:
    """As `shrunk`, where the centroids are known to be the means of cells of x: no distance is measured.

    The distortion is what the spread of x leaves beside that between the means (the law of total variance), which takes
    one look at x where distances take K.

    Args:
        x: [N, D], the latents of the class.
        centroids: [K, D], means of their cells.
        counts: int [K], members of the cells, which sum to N.

    Returns:
        float32 [K, D].

    Raises:
        ValueError: as `shrunk`, or counts that do not sum to N.
    """
    if int(np.sum(counts)) != len(x):
        raise ValueError(f"expected counts that sum to the {len(x)} latents, got {int(np.sum(counts))}")
    mean = x.mean(0, dtype=np.float64)
    spread = sum(_square_sum(x[i : i + _ROWS], mean.astype(x.dtype)) for i in range(0, len(x), _ROWS))
    between = float(counts @ np.square(centroids - mean).sum(1))
    return shrunk(centroids, counts, max(0.0, spread - between) / len(x))


def _square_sum(rows: npt.NDArray[np.floating], mean: npt.NDArray[np.floating]) -> float:
    deviations = (rows - mean).ravel()
    return float(deviations @ deviations)
