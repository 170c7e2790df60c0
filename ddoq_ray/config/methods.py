"""The methods of a comparison: a row each, of who chooses or makes its images, and how its students weigh them.

A new baseline is a row here and, where it chooses real images in a way of its own, a module in ``stages/select/``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ddoq_ray.config.quantizer import MinibatchKmeansConfig, QuantizerConfig

Scheme = Literal["counts", "sqrt", "uniform"]


@dataclass(frozen=True)
class MethodSpec:
    """What a method is.

    Attributes:
        name: The word of the report's rows and of `baselines`.
        words: What it does, for users.
        images: Where its images come from: `synthesize` (from a codebook), `select` (chosen real images, by the module
            of this method's name in ``stages/select/``), or `data` (all the real images).
        scheme: Weights of its images in the student's loss.
        own: Whether it shares the image set of the run's own quantizer, and differs by its weights alone.
        quantizer: Its codebook's algorithm, from the run's own; None for a method without a codebook.
        draws: Whether each seed has an image set of its own.
        reads: What beside the data its choice is made from: `latents`, `codebook` (the run's own).
    """

    name: str
    words: str
    images: Literal["synthesize", "select", "data"]
    scheme: Scheme = "uniform"
    own: bool = False
    quantizer: Callable[[QuantizerConfig], QuantizerConfig] | None = None
    draws: bool = False
    reads: tuple[Literal["latents", "codebook"], ...] = ()


def _run_own(quantizer: QuantizerConfig) -> QuantizerConfig:
    return quantizer


def _d4m(quantizer: QuantizerConfig) -> QuantizerConfig:
    return MinibatchKmeansConfig(name="minibatch_kmeans", variant="d4m", num_shards=quantizer.num_shards)


_ROWS = (
    MethodSpec("ddoq", "centroids weighed by their counts (Algorithm 4)", "synthesize", "counts", True, _run_own),
    MethodSpec("ddoq-sqrt", "the same images, weights by Eq. 33", "synthesize", "sqrt", True, _run_own),
    MethodSpec("ddoq-uniform", "the same images, all alike", "synthesize", "uniform", True, _run_own),
    MethodSpec("d4m", "D4M: mini-batch k-means as it was published", "synthesize", quantizer=_d4m),
    MethodSpec("random", "real images drawn at random, anew for each seed", "select", draws=True),
    MethodSpec("herding", "real images whose mean latent nears their class's", "select", reads=("latents",)),
    MethodSpec("medoids", "the real images nearest to the centroids", "select", reads=("latents", "codebook")),
    MethodSpec("full", "all the real images", "data"),
)
SPECS = {spec.name: spec for spec in _ROWS}
METHODS = tuple(SPECS)


def own_method(scheme: str) -> str:
    """The word of a run's own rows: the method of its own quantizer with this weight scheme."""
    return next(spec.name for spec in _ROWS if spec.own and spec.scheme == scheme)
