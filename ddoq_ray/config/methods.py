"""The methods of a comparison: a row each, of who chooses or makes its images, and how its students weigh them.

A new baseline is a row here and, where it chooses real images in a way of its own, a module in ``stages/select/``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from ddoq_ray.config.quantizer import BalancedConfig, MinibatchKmeansConfig, QuantizerConfig
from ddoq_ray.config.synthesizer import SynthesizerConfig

Scheme = Literal["counts", "sqrt", "uniform"]


@dataclass(frozen=True)
class MethodSpec:
    """What a method is.

    Attributes:
        name: The word of the report's rows and of `baselines`.
        words: What it does, for users.
        images: Where its images come from: `synthesize` (from a codebook), `select` (chosen real images, by the module
            of this method's name in ``stages/select/``), `recover` (found in the teacher by gradients), `given` (from
            `images.path`), or `data` (all the real images).
        scheme: Weights of its images in the student's loss.
        own: Whether it shares the image set of the run's own quantizer, and differs by its weights alone.
        quantizer: Its codebook's algorithm, from the run's own; None for a method without a codebook, whose images are
            synthesized from the run's own, if they are.
        draws: Whether each seed has an image set of its own.
        reads: What beside the data its images are made from: `latents`, `codebook` (the run's own), `teacher`.
        tiles: Centroids of an image, which lie on a square grid.
        synthesizer: How its centroids become images, from the run's own way; None: as the run's own.
        curriculum: Whether recovered images are first optimized whole, and then by smaller and smaller crops.
    """

    name: str
    words: str
    images: Literal["synthesize", "select", "recover", "given", "data"]
    scheme: Scheme = "uniform"
    own: bool = False
    quantizer: Callable[[QuantizerConfig], QuantizerConfig] | None = None
    draws: bool = False
    reads: tuple[Literal["latents", "codebook", "teacher"], ...] = ()
    tiles: int = 1
    synthesizer: Callable[[SynthesizerConfig], SynthesizerConfig] | None = None
    curriculum: bool = False


def _run_own(quantizer: QuantizerConfig) -> QuantizerConfig:
    return quantizer


def _d4m(quantizer: QuantizerConfig) -> QuantizerConfig:
    return MinibatchKmeansConfig(name="minibatch_kmeans", variant="d4m", num_shards=quantizer.num_shards)


def _uniform_grid(quantizer: QuantizerConfig) -> QuantizerConfig:
    return BalancedConfig(num_shards=quantizer.num_shards)


def _from_noise(synthesizer: SynthesizerConfig) -> SynthesizerConfig:
    return replace(synthesizer, start="noise", rescale=False, keep="confident")


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
    MethodSpec(
        "confident",
        "Of each Voronoi cell of the run's own codebook the real image that the teacher is surest of; weights as ddoq.",
        "select",
        "counts",
        reads=("latents", "codebook", "teacher"),
    ),
    MethodSpec(
        "rded",
        "Mosaics of those crops of real images that the teacher is surest of (RDED)" + _SAME_WEIGHT,
        "select",
        reads=("teacher",),
    ),
    MethodSpec(
        "uniform-grid",
        "Centroids made for uniform weights, the Wasserstein barycenter of each class, decoded" + _SAME_WEIGHT,
        "synthesize",
        quantizer=_uniform_grid,
    ),
    MethodSpec(
        "stitched",
        "Four centroids an image, each at half the side; the image weighs what their four cells do.",
        "synthesize",
        "counts",
        quantizer=_run_own,
        tiles=4,
    ),
    MethodSpec(
        "noise-init",
        "Diffusion from pure noise, told the class alone, without a centroid" + _SAME_WEIGHT,
        "synthesize",
        reads=("codebook",),
        synthesizer=_from_noise,
    ),
    MethodSpec(
        "sre2l",
        "Images that the teacher names rightly and that have the statistics of its batch norms, found by gradients "
        "(SRe2L)" + _SAME_WEIGHT,
        "recover",
        reads=("teacher",),
    ),
    MethodSpec(
        "cda",
        "As sre2l, with crops that begin with the whole image and become smaller (CDA)" + _SAME_WEIGHT,
        "recover",
        reads=("teacher",),
        curriculum=True,
    ),
    MethodSpec("full", "The whole training set, nothing distilled: the upper reference.", "data"),
)
SPECS = {spec.name: spec for spec in _ROWS}
METHODS = tuple(SPECS)
# The set of `images.path`, whose name the configuration gives.
GIVEN = MethodSpec("given", "Images that another method made, as images.path gives them.", "given", "counts")


def own_method(scheme: str) -> str:
    """The word of a run's own rows: the method of its own quantizer with this weight scheme."""
    return next(spec.name for spec in _ROWS if spec.own and spec.scheme == scheme)
