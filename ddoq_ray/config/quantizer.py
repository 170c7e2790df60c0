"""The quantizers, one dataclass an algorithm; each has only the keys that it obeys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ddoq_ray.config.schema import MOST_WORKERS, option, plain, require

_NAME = "the algorithm; set by the choice of the group (quantizer=gram)"


@dataclass(frozen=True)
class QuantizerConfig:
    """What every quantizer has. `streaming`: centroids move while latents arrive; else when a class is complete."""

    streaming: ClassVar[bool] = False
    name: str = option("", _NAME)
    num_shards: int = option(2, "quantizer actors; the codebook's bytes do not depend on it")
    noise_level: float = option(
        0.0, "quantize latents noised to this level, as the paper does; 0 = clean, else equal to synthesizer.strength"
    )
    shrink: bool = option(
        False, "draw centroids to their neighbours' mean by what their cells' sizes say of noise: for unseen images"
    )
    pool: int = option(
        1, "measure distances on latents averaged over squares of this side; centroids are means of the whole latents"
    )
    snapshot_every: int = option(16, "shards consumed between two snapshots of an actor's open classes")

    def __post_init__(self) -> None:
        require(
            1 <= self.num_shards <= MOST_WORKERS,
            f"quantizer.num_shards={self.num_shards}: expected 1 or more, at most {MOST_WORKERS:,}",
        )
        require(0 <= self.noise_level <= 1, f"quantizer.noise_level={self.noise_level}: expected 0 to 1")
        require(self.pool >= 1, f"quantizer.pool={self.pool}: expected 1 or more")
        require(self.snapshot_every >= 1, f"quantizer.snapshot_every={self.snapshot_every}: expected 1 or more")

    def identity(self) -> dict[str, Any]:
        """The keys that change centroids; how many actors hold them does not.

        `shrink` and `pool` are named where they do something, so that codebooks that are older than these keys stay
        what they are.
        """
        idle = {"num_shards", "snapshot_every"}
        idle |= {key for key, does in (("shrink", self.shrink), ("pool", self.pool > 1)) if not does}
        return {k: v for k, v in plain(self).items() if k not in idle}


@dataclass(frozen=True)
class ClvqConfig(QuantizerConfig):
    streaming: ClassVar[bool] = True
    name: str = option("clvq", _NAME)
    winner: Literal["corrected", "paper"] = option(
        "corrected", "corrected: argmin v/(v+1)||x-c||^2; paper: Algorithm 3's nearest centroid"
    )
    batch: int = option(1, "samples that share one assignment; 1 is the algorithm as printed")
    buffer: int = option(0, "first samples of a class, from which k-means++ seeds; 0 = chosen from K")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch >= 1, f"quantizer.batch={self.batch}: expected 1 or more")
        require(self.buffer >= 0, f"quantizer.buffer={self.buffer}: expected 0 or more")


@dataclass(frozen=True)
class GramConfig(QuantizerConfig):
    name: str = option("gram", _NAME)
    hartigan: bool = option(True, "finish Lloyd's optimum with Hartigan exchanges")
    restarts: int = option(1, "independent runs on a class's one Gram matrix; the lowest distortion is kept")
    product: Literal["float32", "bfloat16"] = option(
        "float32", "precision of the Gram matrix's product; bfloat16 is for a GPU or a CPU with AMX"
    )
    max_gram_gb: float = option(2.0, "classes with a larger Gram matrix (4 n^2 bytes, GiB) go to faiss")
    max_class_gb: float = option(8.0, "classes that need more memory than this (GiB) go to clvq, one pass over the log")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.restarts >= 1, f"quantizer.restarts={self.restarts}: expected 1 or more")
        for key in ("max_gram_gb", "max_class_gb"):
            require(getattr(self, key) > 0, f"quantizer.{key}={getattr(self, key)}: expected more than 0")


@dataclass(frozen=True)
class MinibatchKmeansConfig(QuantizerConfig):
    name: str = option("minibatch_kmeans", _NAME)
    variant: Literal["d4m", "sklearn"] = option(
        "d4m", "d4m: partial_fit on batches of K, leftovers dropped, as D4M ran it; sklearn: MiniBatchKMeans.fit"
    )


@dataclass(frozen=True)
class KmeansConfig(QuantizerConfig):
    """scikit-learn's Lloyd with k-means++; no keys of its own."""

    name: str = option("kmeans", _NAME)


@dataclass(frozen=True)
class FaissConfig(QuantizerConfig):
    """faiss.Kmeans; no keys of its own."""

    name: str = option("faiss", _NAME)


@dataclass(frozen=True)
class BalancedConfig(QuantizerConfig):
    name: str = option("balanced", _NAME)
    rounds: int = option(30, "rounds of transport and barycentric means, at most")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rounds >= 0, f"quantizer.rounds={self.rounds}: expected 0 or more")
        require(
            not self.shrink,
            "quantizer.shrink=true with quantizer.name=balanced: it draws centroids by what their Voronoi cells hold, "
            "and these are made for uniform weights; choose one",
        )
        require(
            self.pool == 1,
            f"quantizer.pool={self.pool} with quantizer.name=balanced: its centroids are no means of cells; choose one",
        )


_ALGORITHMS: tuple[type[QuantizerConfig], ...] = (
    ClvqConfig, GramConfig, MinibatchKmeansConfig, KmeansConfig, FaissConfig, BalancedConfig,
)  # fmt: skip
QUANTIZERS: dict[str, type[QuantizerConfig]] = {algorithm.name: algorithm for algorithm in _ALGORITHMS}
