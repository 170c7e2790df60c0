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


_SAME_WEIGHT = "; all with the same weight."
# In the order of tables.
_ROWS = (
    MethodSpec(
        "ddoq",
        "Optimal quantization of each class in latent space; an image weighs the share of real images nearest to its "
        "centroid (Algorithm 4).",
        "synthesize",
        "counts",
        own=True,
        quantizer=_run_own,
    ),
    MethodSpec(
        "ddoq-sqrt",
        "The same images as ddoq; their weights in the loss follow the square root of that share (Eq. 33).",
        "synthesize",
        "sqrt",
        own=True,
        quantizer=_run_own,
    ),
    MethodSpec(
        "ddoq-uniform",
        "The same images as ddoq, all with the same weight.",
        "synthesize",
        "uniform",
        own=True,
        quantizer=_run_own,
    ),
    MethodSpec(
        "d4m",
        "Centroids of mini-batch k-means in latent space, decoded" + _SAME_WEIGHT,
        "synthesize",
        quantizer=_d4m,
    ),
    MethodSpec("random", "Real images drawn at random from each class" + _SAME_WEIGHT, "select", draws=True),
    MethodSpec(
        "herding",
        "Real images chosen one by one so that their mean in latent space follows that of the class" + _SAME_WEIGHT,
        "select",
        reads=("latents",),
    ),
    MethodSpec(
        "medoids",
        "The real images nearest to the centroids of the run's own codebook" + _SAME_WEIGHT,
        "select",
        reads=("latents", "codebook"),
    ),
    MethodSpec("full", "The whole training set, nothing distilled: the upper reference.", "data"),
)
SPECS = {spec.name: spec for spec in _ROWS}
METHODS = tuple(SPECS)


def own_method(scheme: str) -> str:
    """The word of a run's own rows: the method of its own quantizer with this weight scheme."""
    return next(spec.name for spec in _ROWS if spec.own and spec.scheme == scheme)
