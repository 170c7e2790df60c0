"""The keys of ``train-prior`` and ``train-teacher``: which images are learnt, and how each network is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.config.latents import Resize
from ddoq_ray.config.schema import LARGEST_SIDE, MOST_THREADS, MOST_WORKERS, option, require

DIGITS_SIDE = 16
GROUPS = 8  # of every group norm of a prior's networks: small networks have few channels
Precision = Literal["float32", "bfloat16"]
_PRECISION = "arithmetic: float32, or bfloat16, 2 to 7 times as fast on a processor with AMX and slower without"


def _at_least(training: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(training, name)
        require(value >= least, f"training.{name}={value}: expected {least} or more")


def _positive(training: object, *names: str) -> None:
    """Each above 0, and within what float32 holds; or null, where that is its default."""
    for name in names:
        value = getattr(training, name)
        require(value is None or 0 < value <= 1e30, f"training.{name}={value}: expected more than 0, at most 1e30")


def _below_one(training: object, *names: str) -> None:
    for name in names:
        value = getattr(training, name)
        require(0 <= value < 1, f"training.{name}={value}: expected 0 or more, below 1")


@dataclass(frozen=True)
class PriorTraining:
    """How `train_prior` trains: AdamW with a cosine schedule, for the autoencoder first, then for the denoiser."""

    seed: int = option(0, "of initialisations, batches and noise")
    latent_channels: int = option(4, "channels of the latents")
    autoencoder_widths: tuple[int, ...] = option(
        (16, 32, 32), "channels of the autoencoder's levels; each level after the first halves the side"
    )
    autoencoder_steps: int = option(1000, "optimization steps of the autoencoder")
    autoencoder_batch: int = option(64, "images in one step of the autoencoder")
    autoencoder_lr: float = option(2e-3, "learning rate of the autoencoder")
    kl_weight: float = option(
        1e-3, "weight of the KL term (a mean over latent values) against the mean squared pixel error"
    )
    feature_weight: float = option(
        0.1, "weight of the relative squared distance of the teacher's feature maps, where a teacher is given"
    )
    logit_weight: float = option(
        0.0, "weight of the relative squared distance of the teacher's logits, of which soft labels are made; 0 = none"
    )
    autoencoder_ema: float = option(0.998, "decay of the autoencoder's averaged weights, which are the ones saved")
    denoiser: Literal["unet", "dit"] = option("unet", "the denoiser's architecture: unet or dit")
    unet_widths: tuple[int, ...] = option((32, 64), "unet: channels of the levels")
    unet_layers: int = option(1, "unet: residual blocks of a level")
    dit_layers: int = option(4, "dit: blocks")
    dit_heads: int = option(4, "dit: heads of a block")
    dit_width: int = option(96, "dit: total width of the heads")
    dit_patch: int = option(1, "dit: side of a patch, in latent pixels")
    denoiser_steps: int = option(3500, "optimization steps of the denoiser")
    denoiser_batch: int = option(128, "latents in one step of the denoiser")
    denoiser_lr: float = option(2e-3, "learning rate of the denoiser")
    ema: float = option(0.998, "decay of the averaged weights, which are the ones saved")
    label_dropout: float = option(
        0.1, "share of labels replaced by the null label, for classifier-free guidance; 0 = no guidance later"
    )
    prediction_type: Literal["epsilon", "v_prediction"] = option(
        "epsilon", "what the denoiser predicts: epsilon or v_prediction"
    )
    beta_schedule: str = option("linear", "the noise schedule, by diffusers' name")
    zero_snr: bool = option(False, "rescale the schedule to end in pure noise; wants prediction_type=v_prediction")
    min_snr: float | None = option(None, "gamma of min-SNR weighting, such as 5; null = none")
    flip: bool = option(False, "mirror images at random")
    minutes: float | None = option(
        None, "train for this long instead of for a number of steps; the bytes then depend on the machine's speed"
    )
    autoencoder_share: float = option(0.25, "share of `minutes` that the autoencoder is trained")
    precision: Precision = option("float32", _PRECISION)
    compile: bool = option(False, "run the networks through torch.compile: faster on a GPU, after a minute or so")
    checkpoint_every: int = option(200, "steps between checkpoints, from which a stopped training goes on")
    samples_every: int = option(
        1000, "steps of the denoiser between pictures of samples, on the page samples.html in OUT.training; 0 = none"
    )
    dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float16", "of the saved weights: float32, float16 or bfloat16"
    )

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        _at_least(self, 0, "seed", "samples_every", "kl_weight", "feature_weight", "logit_weight")
        _at_least(self, 1, "latent_channels", "autoencoder_steps", "autoencoder_batch", "checkpoint_every")
        _at_least(self, 1, "denoiser_steps", "denoiser_batch", "unet_layers")
        _at_least(self, 1, "dit_layers", "dit_heads", "dit_patch")
        _positive(self, "minutes", "min_snr", "autoencoder_lr", "denoiser_lr")
        _below_one(self, "ema", "autoencoder_ema", "label_dropout")
        require(
            0 < self.autoencoder_share < 1,
            f"training.autoencoder_share={self.autoencoder_share}: expected above 0, below 1",
        )
        require(
            not self.zero_snr or self.prediction_type == "v_prediction",
            "training.zero_snr=true needs training.prediction_type=v_prediction: from pure noise, epsilon says nothing",
        )
        for name in ("autoencoder_widths", "unet_widths"):
            widths = getattr(self, name)
            fit = bool(widths) and all(width >= GROUPS and width % GROUPS == 0 for width in widths)
            require(fit, f"training.{name}={list(widths)}: expected multiples of {GROUPS}")
        step = math.lcm(4, self.dit_heads)  # a sine and a cosine of each of two axes
        require(
            self.dit_width >= step and self.dit_width % step == 0,
            f"training.dit_width={self.dit_width}: expected a multiple of 4 and of training.dit_heads={self.dit_heads}",
        )


@dataclass(frozen=True)
class DecoderTuning:
    """How `tune-decoder` trains: AdamW with a cosine schedule on pixels and a classifier's features."""

    seed: int = option(0, "of batches and mirrored images")
    steps: int = option(1000, "optimization steps")
    minutes: float | None = option(
        None, "train for this long instead of for a number of steps; the bytes then depend on the machine's speed"
    )
    batch: int = option(64, "images in one step")
    lr: float = option(5e-4, "learning rate")
    feature_weight: float = option(
        0.3, "weight of the relative squared distance of the classifier's feature maps against the squared pixel error"
    )
    logit_weight: float = option(
        0.0,
        "weight of the relative squared distance of the classifier's logits, of which soft labels are made; 0 = none",
    )
    ema: float = option(0.99, "decay of the averaged weights, which are the ones saved")
    flip: bool = option(True, "mirror images at random")
    precision: Precision = option("float32", _PRECISION)
    compile: bool = option(False, "run the networks through torch.compile: faster on a GPU, after a minute or so")
    checkpoint_every: int = option(100, "steps between checkpoints, from which a stopped tuning goes on")

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        _at_least(self, 0, "seed", "feature_weight", "logit_weight")
        _at_least(self, 1, "steps", "batch", "checkpoint_every")
        _positive(self, "minutes", "lr")
        _below_one(self, "ema")


@dataclass(frozen=True)
class TeacherTraining:
    """How `train_teacher` trains: a cosine schedule with a short warm-up."""

    seed: int = option(0, "of initialisation, batches and views")
    arch: str = option(
        "resnet18-small-w16", "a small-image network, a torchvision classifier, or package.module:callable"
    )
    epochs: int = option(60, "passes over the images")
    batch: int = option(64, "images in one step; the last incomplete batch of a pass opens the next one")
    optimizer: Literal["adamw", "sgd"] = option("adamw", "adamw, or sgd with Nesterov momentum 0.9")
    lr: float = option(2e-3, "learning rate")
    weight_decay: float = option(1e-2, "weight decay")
    label_smoothing: float = option(0.0, "label smoothing of the cross-entropy")
    min_scale: float = option(0.5, "smallest crop area of a view")
    flip: bool = option(True, "flip views left to right at random")
    cutmix: bool = option(False, "paste a box of another image's view into each view")
    mixup: float = option(0.0, "alpha of MixUp, which mixes each view with another one of its batch; 0 = none")
    augment: Literal["none", "randaugment", "trivialaugment"] = option(
        "none", "torchvision's augmentation of each image before its view: none, randaugment or trivialaugment"
    )
    ema: float = option(0.0, "decay of the averaged weights, which are the ones saved; 0 = the last ones")
    minutes: float | None = option(
        None, "train for this long instead of for a number of epochs; the bytes then depend on the machine's speed"
    )
    precision: Precision = option("float32", _PRECISION)
    checkpoint_every: int = option(500, "steps between checkpoints, from which a stopped training goes on")
    dtype: Literal["float32", "float16"] = option("float16", "of the saved weights: float32 or float16")

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        _at_least(self, 0, "seed", "weight_decay", "mixup")
        _at_least(self, 1, "epochs", "checkpoint_every")
        _at_least(self, 2, "batch")  # batch norm has no variance of one image
        _positive(self, "minutes", "lr")
        _below_one(self, "ema", "label_smoothing")
        require(0 < self.min_scale <= 1, f"training.min_scale={self.min_scale}: expected above 0, at most 1")


@dataclass(frozen=True)
class TrainingCommand:
    """The keys of each training command, which adds `training`, how its network is trained."""

    dataset: DatasetConfig = option(DatasetConfig, "the images to learn")
    out: str = option("model", "folder to write")
    image_size: int | None = option(None, "side of the images, in pixels: 16 for the digits, asked for with other data")
    resize: Resize = option("squash", "how a picture becomes a square: squash, center-crop or pad, as encoder.resize")
    device: Literal["cpu", "cuda"] = option("cpu", "cpu or cuda")
    threads: int = option(1, "torch threads; the weights' bytes depend on it")
    overwrite: bool = option(False, "replace the folder when it exists")
    max_bad_fraction: float = option(0.01, "stop when more than this part of the samples cannot be used")
    workers: int = option(
        1, "ranks that share each batch, by Ray Train, with `threads` CPUs each and a GPU where device=cuda; 1 = no Ray"
    )
    address: str | None = option(None, "of the Ray cluster that has the workers, as cluster.address")

    def __post_init__(self) -> None:
        require(
            8 <= self.side <= LARGEST_SIDE,
            f"image_size={self.image_size}: expected 8 or more, at most {LARGEST_SIDE:,}",
        )
        require(
            0 <= self.max_bad_fraction <= 1, f"max_bad_fraction={self.max_bad_fraction}: expected a fraction, 0 to 1"
        )
        for key, most in (("threads", MOST_THREADS), ("workers", MOST_WORKERS)):
            value = getattr(self, key)
            require(1 <= value <= most, f"{key}={value}: expected 1 or more, at most {most:,}")
        require(
            self.workers > 1 or self.address is None,
            f"address={self.address} has no effect with workers=1, which needs no Ray; leave one of the two out",
        )

    @property
    def side(self) -> int:
        return DIGITS_SIDE if self.image_size is None else self.image_size

    @property
    def folder(self) -> str:
        return self.out


@dataclass(frozen=True)
class TrainPriorConfig(TrainingCommand):
    perceptual: str | None = option(
        None, "a classifier of such images, as teacher.path: the autoencoder keeps what it sees; null = pixels alone"
    )
    judge: str | None = option(
        None, "a classifier that says what it sees of the finished prior's images; null = the perceptual one"
    )
    training: PriorTraining = option(PriorTraining, "how the prior is trained")


@dataclass(frozen=True)
class TrainTeacherConfig(TrainingCommand):
    through: str | None = option(
        None, "a prior: each image is learnt a second time as its autoencoder gives it back, so that the teacher is as "
        "right on what it will label; null = real images alone"
    )  # fmt: skip
    training: TeacherTraining = option(TeacherTraining, "how the teacher is trained")


@dataclass(frozen=True)
class TuneDecoderConfig(TrainingCommand):
    source: str = option("shipped:digits-prior", "the prior whose decoder is tuned: folder, shipped:NAME or hub id")
    perceptual: str | None = option(None, "the classifier whose view of an image the decoder is to keep")
    judge: str | None = option(
        None, "a classifier that says what it sees before and after; null = the perceptual one, whose view is too kind"
    )
    training: DecoderTuning = option(DecoderTuning, "how the decoder is tuned")
