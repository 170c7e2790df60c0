"""How the classes of a latent log become codebooks: streamed, or whole by an algorithm that wants all of a class."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddoq_ray.config.quantizer import BalancedConfig, ClvqConfig, GramConfig, MinibatchKmeansConfig, QuantizerConfig
from ddoq_ray.core.clvq import Clvq
from ddoq_ray.core.distortion import assign, voronoi_counts
from ddoq_ray.core.gram_kmeans import KMeansSettings, gram_kmeans
from ddoq_ray.core.noising import NoiseLevel
from ddoq_ray.core.pooling import Pooling
from ddoq_ray.core.shrinkage import shrunk, shrunk_means
from ddoq_ray.core.sizing import GIB, exact_algorithm
from ddoq_ray.execution.workers import device
from ddoq_ray.storage.records import Codebook

BATCH_BYTES = 256 << 20  # of fp16 latents that one call of an exact algorithm gets: fixed, so that its bytes are
READ_BYTES = 512 << 20  # of fp16 latents that one pass over the log collects

Centroids = tuple[np.ndarray, np.ndarray]  # centroids float32 [K', D], the algorithm's own counts int64 [K']
ChunksOf = Callable[[Iterable[int]], Iterator[tuple[int, npt.NDArray[np.floating]]]]


@dataclass(frozen=True)
class Settings:
    """What an actor is told beside its parts: small values and paths only, an ObjectRef would not survive a restart."""

    ipc: int
    seed: int
    small_class: str
    threads: int
    latent_shape: tuple[int, ...]
    prior_id: str
    identity: str
    num_actors: int
    together: bool = False  # the actor has a GPU: classes of the Gram space go to it many at once, faiss runs on it
    noise: NoiseLevel | None = None
    pool: int = 1  # side of the squares over which latents are averaged before their distances are taken
    need: int = 0  # bytes that the actor was planned to need
    driver: str = ""  # tells this run of the command from the next

    @property
    def dim(self) -> int:
        return int(np.prod(self.latent_shape))

    @property
    def pooling(self) -> Pooling:
        return Pooling(self.latent_shape, self.pool)

    def algorithm_of(self, algorithm: QuantizerConfig, n: int) -> str:
        """The algorithm that a class of n latents gets."""
        return algorithm_of(algorithm, n, self.pooling.dim, self.ipc, together=self.together)


def new_clvq(settings: Settings, class_id: int, options: ClvqConfig) -> Clvq:
    return Clvq(
        settings.ipc,
        settings.pooling.dim,
        winner=options.winner,
        batch=options.batch,
        buffer=options.buffer or None,
        seed=settings.seed,
        class_id=class_id,
    )


def algorithm_of(algorithm: QuantizerConfig, n: int, dim: int, k: int, *, together: bool) -> str:
    """The algorithm that a class of n latents gets (`core.sizing.exact_algorithm`)."""
    if not isinstance(algorithm, GramConfig):
        return algorithm.name
    limits = {"max_gram_bytes": algorithm.max_gram_gb * GIB, "max_class_bytes": algorithm.max_class_gb * GIB}
    return exact_algorithm(n, dim, k, together=together, **limits)


def whole_centroids(found: Mapping[int, Centroids], chunks_of: ChunksOf, pooling: Pooling) -> dict[int, Centroids]:
    """Centroids of pooled latents as means of the whole latents of their cells, from one pass over the log.

    Means commute with the pooling: pooled, they are the means of the pooled cells. A centroid without a cell of its own
    is a copy of the one that has it, as it was before.
    """
    sums = {c: np.zeros((len(centroids), int(np.prod(pooling.shape)))) for c, (centroids, _) in found.items()}
    counts = {c: np.zeros(len(centroids), np.int64) for c, (centroids, _) in found.items()}
    for c, latents in chunks_of(found):
        labels, _ = assign(pooling(latents), found[c][0])
        order = labels.argsort(kind="stable")
        cells, first = np.unique(labels[order], return_index=True)
        sums[c][cells] += np.add.reduceat(latents[order], first, axis=0, dtype=np.float64)
        counts[c] += np.bincount(labels, minlength=len(counts[c]))
    whole = {}
    for c, (centroids, stream) in found.items():
        full = np.flatnonzero(counts[c])
        means = (sums.pop(c)[full] / counts[c][full, None]).astype(np.float32)
        nearest, _ = assign(centroids, centroids[full])
        whole[c] = (means[nearest], stream)
    return whole


def exact_codebooks(
    found: Mapping[int, Centroids], chunks_of: ChunksOf, *, shrink: bool = False, pooling: Pooling | None = None
) -> Iterator[Codebook]:
    """A codebook for each class's centroids, in order, with exact Voronoi counts from one pass over the log.

    Args:
        found: The arrays are kept, and written to where they shrink.
        chunks_of: Reads classes from the log, in one pass.
        shrink: Draw centroids towards their neighbours (`core.shrinkage`); a second pass measures these.
        pooling: Of the latents that `found` are centroids of; a first pass gives those of the whole ones.
    """
    if pooling is not None and pooling.side > 1:
        found = whole_centroids(found, chunks_of, pooling)
    if shrink:
        for book in exact_codebooks(found, chunks_of):
            full = book.counts > 0  # the cell of a copy of another centroid is empty, and it stays
            book.centroids[full] = shrunk(book.centroids[full], book.counts[full], book.distortion)
    counts = {c: np.zeros(len(centroids), np.int64) for c, (centroids, _) in found.items()}
    totals = dict.fromkeys(found, 0.0)
    for c, latents in chunks_of(found):
        labels, squared = assign(latents, found[c][0])
        counts[c] += np.bincount(labels, minlength=len(counts[c]))
        totals[c] += float(squared.sum())
    for c, (centroids, stream) in found.items():
        yield Codebook(c, centroids, counts[c], totals[c] / counts[c].sum(), stream)


@dataclass(frozen=True)
class WholeClasses:
    """Codebooks by an algorithm that wants a class whole.

    Attributes:
        sizes: class_id -> its latents in the log.
        part_of: class_id -> its part of the codebook.
        chunks_of: Reads classes from the log, in one pass.
    """

    algorithm: QuantizerConfig
    settings: Settings
    sizes: Mapping[int, int]
    part_of: Mapping[int, int]
    chunks_of: ChunksOf

    def codebooks(self, classes: Sequence[int]) -> Iterator[Codebook]:
        """In the order of `classes`; as many of them in memory at a time as `READ_BYTES` allows."""
        group: list[list[int]] = []
        size = 0
        for batch in self._batches(classes):
            own = sum(map(self._bytes, batch))
            if group and size + own > READ_BYTES:
                yield from self._of_group(group)
                group, size = [], 0
            group.append(batch)
            size += own
        if group:
            yield from self._of_group(group)

    def _bytes(self, c: int) -> int:
        return 2 * self.sizes[c] * self.settings.pooling.dim

    def _kind(self, c: int) -> str:
        return self.settings.algorithm_of(self.algorithm, self.sizes[c])

    def _batches(self, classes: Sequence[int]) -> Iterator[list[int]]:
        """Cut into what one call gets: never across a part, so that neither actors nor arrival change a batch."""
        batch: list[int] = []
        size = 0
        for c in classes:
            if batch and (size + self._bytes(c) > BATCH_BYTES or self.part_of[c] != self.part_of[batch[0]]):
                yield batch
                batch, size = [], 0
            batch.append(c)
            size += self._bytes(c)
        if batch:
            yield batch

    def _of_group(self, group: list[list[int]]) -> Iterator[Codebook]:
        pieces: dict[int, list[np.ndarray]] = {c: [] for batch in group for c in batch if self._kind(c) != "clvq"}
        pooling = self.settings.pooling
        for c, latents in self.chunks_of(pieces):
            pieces[c].append(pooling(latents).copy())  # a slice would keep its whole chunk in memory
        for batch in group:
            together = self._together([c for c in batch if self._kind(c) == "gram"], pieces)
            for c in batch:
                if self._kind(c) == "clvq":
                    stream = new_clvq(self.settings, c, ClvqConfig(name="clvq"))
                    for _, latents in self.chunks_of([c]):
                        stream.update(pooling(latents))
                    yield from self._exact({c: stream.result()}, self.chunks_of)
                    continue
                x = np.concatenate(pieces.pop(c)).astype(np.float32)
                centroids, counts = together[c] if c in together else self._alone(c, x)
                if pooling.side > 1:
                    yield from self._exact({c: (centroids, counts)}, self.chunks_of)
                    continue
                known = self.algorithm.shrink and self._kind(c) == "gram"  # these are the means of such counts
                found = {c: (shrunk_means(x, centroids, counts) if known else centroids, counts)}
                yield from self._exact(found, _whole(c, x), shrink=self.algorithm.shrink and not known)

    def _exact(
        self, found: Mapping[int, Centroids], chunks_of: ChunksOf, *, shrink: bool | None = None
    ) -> Iterator[Codebook]:
        shrink = self.algorithm.shrink if shrink is None else shrink
        return exact_codebooks(found, chunks_of, shrink=shrink, pooling=self.settings.pooling)

    def _together(self, classes: list[int], pieces: Mapping[int, list[np.ndarray]]) -> dict[int, Centroids]:
        """All classes of the Gram space at once, where the actor has a GPU."""
        if not classes or not isinstance(self.algorithm, GramConfig) or not self.settings.together:
            return {}
        from ddoq_ray.core.gram_batched import gram_kmeans_batched

        made = gram_kmeans_batched(
            [np.concatenate(pieces[c]) for c in classes],
            self.settings.ipc,
            seed=self.settings.seed,
            class_ids=classes,
            settings=_settings(self.algorithm, self.algorithm.max_class_gb),
            device=device(),
        )
        return dict(zip(classes, made, strict=True))

    def _alone(self, c: int, x: npt.NDArray[np.float32]) -> Centroids:
        """One class, float32 [n, D] in the log's order, by its algorithm."""
        from ddoq_ray.core.baselines import d4m_kmeans, faiss_kmeans, lloyd, minibatch_kmeans

        k, seed = min(self.settings.ipc, len(x)), self.settings.seed
        options, kind = self.algorithm, self._kind(c)
        if kind == "faiss":
            on = device() if self.settings.together else "cpu"  # not asked without need: the answer loads torch
            return faiss_kmeans(x, k, seed=seed, class_id=c, device=on)
        if isinstance(options, MinibatchKmeansConfig):
            quantize = {"d4m": d4m_kmeans, "sklearn": minibatch_kmeans}[options.variant]
            return quantize(x, k, seed=seed, class_id=c)
        if kind == "kmeans":
            return lloyd(x, k, seed=seed, class_id=c)
        if isinstance(options, BalancedConfig):
            return _balanced(x, k, options, seed=seed, class_id=c)
        assert isinstance(options, GramConfig), kind
        return gram_kmeans(x, k, seed=seed, class_id=c, settings=_settings(options, options.max_gram_gb))


def _balanced(x: npt.NDArray[np.float32], k: int, options: BalancedConfig, *, seed: int, class_id: int) -> Centroids:
    """The grid for uniform weights, descended to from that of k-means; counts of its Voronoi cells."""
    os.environ["POT_BACKEND_DISABLE_PYTORCH"] = "1"  # else POT loads torch: seconds and 0.9 GB for nothing
    from ddoq_ray.core.balanced import balanced
    from ddoq_ray.core.baselines import lloyd

    start, _ = lloyd(x, k, seed=seed, class_id=class_id)
    centroids = balanced(x, start, max_rounds=options.rounds).centroids
    return centroids, voronoi_counts(x, centroids)


def _settings(options: GramConfig, most_gb: float) -> KMeansSettings:
    return KMeansSettings(options.hartigan, options.restarts, options.product, max_bytes=int(most_gb * GIB))


def _whole(c: int, x: npt.NDArray[np.float32]) -> ChunksOf:
    """The chunks of one class that is in memory: all of it at once."""
    return lambda _: iter([(c, x)])
