"""The whole configuration of a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from ddoq_ray.config.baselines import ImagesConfig, RdedConfig, RecoveryConfig
from ddoq_ray.config.cluster import ClusterConfig
from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.config.latents import EncoderConfig, LatentsConfig
from ddoq_ray.config.methods import GIVEN, METHODS, SPECS, MethodSpec, own_method
from ddoq_ray.config.models import PriorConfig, TeacherConfig
from ddoq_ray.config.paths import plain_paths
from ddoq_ray.config.quantizer import QUANTIZERS, ClvqConfig, QuantizerConfig
from ddoq_ray.config.report import ReportConfig
from ddoq_ray.config.schema import from_mapping, option, require
from ddoq_ray.config.synthesizer import SynthesizerConfig
from ddoq_ray.config.training import LabelsConfig, ProtocolConfig, StudentConfig, WeightsConfig

Config = TypeVar("Config", bound="RunConfig")
MOST_SEEDS = 10_000  # each is a student of every method: more are a slip of the hand, and a list that fills memory
STAGES = ("prepare", "encode", "quantize", "synthesize", "label", "train", "evaluate", "report")


@dataclass(frozen=True)
class RunConfig:
    compared: ClassVar[bool] = False  # whether it is a comparison, or a part of one

    run_dir: str | None = option(None, "where everything goes; by default runs/<dataset>-ipc<ipc>")
    seed: int = option(0, "the one seed from which everything derives")
    ipc: int = option(5, "images per class")
    stages: tuple[str, ...] = option(STAGES, "the stages to run, in order")
    small_class: Literal["error", "cap", "drop"] = option(
        "error", "a class with fewer than ipc images: error, cap (as many centroids as images) or drop (left out)"
    )
    baselines: tuple[str, ...] = option(
        ("ddoq-sqrt", "d4m", "random", "full"), "methods to measure beside the run's own: " + ", ".join(METHODS)
    )
    num_seeds: int = option(3, "students of each method, with seeds 0 to num_seeds - 1")
    max_bad_fraction: float = option(0.01, "stop when more than this part of the samples is refused")
    tracking: Literal["tensorboard", "wandb", "mlflow"] | None = option(
        None, "hand the report's curves, table and sample images to a tracker too, by an extra of this package"
    )
    overwrite: bool = option(False, "make anew a stage that another configuration made in the same run_dir")
    dataset: DatasetConfig = option(DatasetConfig, "what is distilled")
    latents: LatentsConfig = option(LatentsConfig, "the latent store")
    prior: PriorConfig = option(PriorConfig, "encoder, latent diffusion and decoder")
    encoder: EncoderConfig = option(EncoderConfig, "images to latents")
    quantizer: QuantizerConfig = option(ClvqConfig, "latents to centroids and weights")
    synthesizer: SynthesizerConfig = option(SynthesizerConfig, "centroids to images")
    images: ImagesConfig = option(ImagesConfig, "a set that another method made")
    rded: RdedConfig = option(RdedConfig, "the method rded")
    recovery: RecoveryConfig = option(RecoveryConfig, "the methods sre2l and cda")
    teacher: TeacherConfig = option(TeacherConfig, "the network that labels")
    labels: LabelsConfig = option(LabelsConfig, "soft labels")
    weights: WeightsConfig = option(WeightsConfig, "weights of the images in the student's loss")
    student: StudentConfig = option(StudentConfig, "the network that is trained")
    protocol: ProtocolConfig = option(ProtocolConfig, "how it is trained")
    report: ReportConfig = option(ReportConfig, "what is measured beside the students")
    cluster: ClusterConfig = option(ClusterConfig, "resources")

    def __post_init__(self) -> None:
        require(self.ipc >= 1, f"ipc={self.ipc}: expected 1 or more images per class")
        require(self.seed >= 0, f"seed={self.seed}: expected 0 or more")
        require(
            self.run_dir is None or not set(self.run_dir) & set("*?[]"),
            f"run_dir={self.run_dir}: a run directory's name cannot hold * ? [ or ]; choose another",
        )
        require(
            1 <= self.num_seeds <= MOST_SEEDS, f"num_seeds={self.num_seeds}: expected 1 or more, at most {MOST_SEEDS:,}"
        )
        require(
            0 <= self.max_bad_fraction <= 1, f"max_bad_fraction={self.max_bad_fraction}: expected a fraction, 0 to 1"
        )
        unknown = [s for s in self.stages if s not in STAGES]
        require(not unknown and bool(self.stages), f"stages={list(self.stages)}: expected some of {', '.join(STAGES)}")
        require(
            list(self.stages) == sorted(set(self.stages), key=STAGES.index),
            f"stages={list(self.stages)}: expected each at most once, in the order {', '.join(STAGES)}",
        )
        unknown = [m for m in self.baselines if m not in METHODS]
        require(not unknown, f"baselines={unknown}: expected some of {', '.join(METHODS)}")
        require(
            self.images.name not in METHODS,
            f"images.name={self.images.name} is a method's own word; choose another for the set of images.path",
        )
        require(
            "full" not in self.methods or self.protocol.steps is not None or self.protocol.full_epochs is not None,
            "protocol.full_epochs is not set, and the row `full` needs it: set it, or leave `full` out of baselines",
        )
        level, start, strength = self.quantizer.noise_level, self.synthesizer.start, self.synthesizer.strength
        require(
            level == 0 or (start == "noised" and strength == level),
            f"quantizer.noise_level={level} with synthesizer.start={start} and synthesizer.strength={strength}: "
            "centroids of noised latents are denoised from the level they have; expected synthesizer.start=noised and "
            f"synthesizer.strength={level}",
        )
        require(
            not (self.quantizer.shrink and self.synthesizer.rescale),
            "quantizer.shrink=true with synthesizer.rescale=true: one draws centroids to their class's mean, the other "
            "moves them away from it; choose one",
        )

    @property
    def folder(self) -> str:
        return self.run_dir or f"runs/{self.dataset.title}-ipc{self.ipc}"

    @property
    def own_method(self) -> str:
        """The word of this run's own rows: Algorithm 4 is `ddoq`; other weights add their scheme."""
        return own_method(self.weights.scheme)

    @property
    def specs(self) -> tuple[MethodSpec, ...]:
        """The methods of this run: its own first, its baselines, and the set of `images.path`."""
        known = [SPECS[name] for name in dict.fromkeys((self.own_method, *self.baselines))]
        return (*known, *self.given)

    @property
    def given(self) -> tuple[MethodSpec, ...]:
        """The set of `images.path`, as a method; empty without one."""
        return (replace(GIVEN, name=self.images.name),) if self.images.path is not None else ()

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs)

    def methods_of(self, read: str) -> list[str]:
        """The methods whose images are made from what `read` names: `latents`, `codebook` or `teacher`."""
        return [spec.name for spec in self.specs if read in spec.reads]


def configured(cls: type[Config], values: dict[str, Any]) -> Config:
    """The frozen configuration of a run or of a comparison, from plain nested values.

    Raises:
        ValueError: Naming the key, what was expected and what came.
    """
    values = plain_paths(values)
    quantizer = values.pop("quantizer", {})
    name = quantizer.get("name", ClvqConfig.name)
    if name not in QUANTIZERS:
        raise ValueError(f"quantizer.name={name}: expected one of {', '.join(QUANTIZERS)}")
    config = from_mapping(cls, values)
    return dataclasses.replace(config, quantizer=from_mapping(QUANTIZERS[name], quantizer, "quantizer."))
