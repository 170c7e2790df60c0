"""The keys of ``train-prior`` and ``train-teacher``: which images are learnt, and how each network is trained."""

from __future__ import annotations

from dataclasses import dataclass

from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.config.latents import Resize
from ddoq_ray.config.schema import option, require

DIGITS_SIDE = 16
GROUPS = 8  # of every group norm of a prior's networks: small networks have few channels
DTYPES = ("float32", "float16", "bfloat16")  # of a prior's saved weights
_PRECISION = "arithmetic: float32, or bfloat16, 2 to 7 times as fast on a processor with AMX and slower without"


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
    denoiser: str = option("unet", "the denoiser's architecture: unet or dit")
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
    prediction_type: str = option("epsilon", "what the denoiser predicts: epsilon or v_prediction")
    beta_schedule: str = option("linear", "the noise schedule, by diffusers' name")
    zero_snr: bool = option(False, "rescale the schedule to end in pure noise; wants prediction_type=v_prediction")
    min_snr: float | None = option(None, "gamma of min-SNR weighting, such as 5; null = none")
    flip: bool = option(False, "mirror images at random")
    minutes: float | None = option(
        None, "train for this long instead of for a number of steps; the bytes then depend on the machine's speed"
    )
    autoencoder_share: float = option(0.25, "share of `minutes` that the autoencoder is trained")
    precision: str = option("float32", _PRECISION)
    compile: bool = option(False, "run the networks through torch.compile: faster on a GPU, after a minute or so")
    checkpoint_every: int = option(200, "steps between checkpoints, from which a stopped training goes on")
    samples_every: int = option(
        1000, "steps of the denoiser between pictures of samples, on the page samples.html in OUT.training; 0 = none"
    )
    dtype: str = option("float16", "of the saved weights: float32, float16 or bfloat16")

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        require(self.samples_every >= 0, f"prior training: samples_every must be 0 or more, got {self.samples_every}")
        require(
            self.denoiser in ("unet", "dit"), f"prior training: denoiser must be unet or dit, got {self.denoiser!r}"
        )
        require(self.dtype in DTYPES, f"prior training: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        require(
            self.prediction_type in ("epsilon", "v_prediction"),
            f"prior training: expected epsilon or v_prediction, got {self.prediction_type!r}",
        )
        require(
            self.precision in ("float32", "bfloat16"),
            f"prior training: precision must be float32 or bfloat16, got {self.precision!r}",
        )
        require(
            self.minutes is None or self.minutes > 0, f"prior training: minutes must be positive, got {self.minutes}"
        )
        require(
            0 < self.autoencoder_share < 1,
            f"prior training: autoencoder_share must lie in (0, 1), got {self.autoencoder_share}",
        )
        require(
            not self.zero_snr or self.prediction_type == "v_prediction",
            "prior training: zero_snr=true needs prediction_type=v_prediction: from pure noise, epsilon says nothing",
        )
        for name in ("kl_weight", "feature_weight", "logit_weight"):
            require(getattr(self, name) >= 0, f"prior training: {name} must be 0 or more, got {getattr(self, name)}")
        require(
            self.min_snr is None or self.min_snr > 0, f"prior training: min_snr must be positive, got {self.min_snr}"
        )
        for name in (
            "latent_channels",
            "checkpoint_every",
            "autoencoder_steps",
            "autoencoder_batch",
            "denoiser_steps",
            "denoiser_batch",
        ):
            require(getattr(self, name) >= 1, f"prior training: {name} must be positive, got {getattr(self, name)}")
        for name in ("autoencoder_widths", "unet_widths"):
            widths = getattr(self, name)
            fit = bool(widths) and not any(width % GROUPS for width in widths)
            require(fit, f"prior training: {name} must be multiples of {GROUPS}, got {widths}")
        require(
            0 <= self.ema < 1 and 0 <= self.autoencoder_ema < 1 and 0 <= self.label_dropout < 1,
            "prior training: ema, autoencoder_ema and label_dropout must lie in [0, 1)",
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
    precision: str = option("float32", _PRECISION)
    compile: bool = option(False, "run the networks through torch.compile: faster on a GPU, after a minute or so")
    checkpoint_every: int = option(100, "steps between checkpoints, from which a stopped tuning goes on")

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        for key in ("steps", "batch", "checkpoint_every"):
            require(getattr(self, key) >= 1, f"decoder tuning: {key} must be positive, got {getattr(self, key)}")
        PriorTraining(minutes=self.minutes, precision=self.precision, autoencoder_ema=self.ema,
                      feature_weight=self.feature_weight, logit_weight=self.logit_weight)  # fmt: skip


@dataclass(frozen=True)
class TeacherTraining:
    """How `train_teacher` trains: a cosine schedule with a short warm-up."""

    seed: int = option(0, "of initialisation, batches and views")
    arch: str = option(
        "resnet18-small-w16", "a small-image network, a torchvision classifier, or package.module:callable"
    )
    epochs: int = option(60, "passes over the images")
    batch: int = option(64, "images in one step; the last incomplete batch of a pass opens the next one")
    optimizer: str = option("adamw", "adamw, or sgd with Nesterov momentum 0.9")
    lr: float = option(2e-3, "learning rate")
    weight_decay: float = option(1e-2, "weight decay")
    label_smoothing: float = option(0.0, "label smoothing of the cross-entropy")
    min_scale: float = option(0.5, "smallest crop area of a view")
    flip: bool = option(True, "flip views left to right at random")
    cutmix: bool = option(False, "paste a box of another image's view into each view")
    mixup: float = option(0.0, "alpha of MixUp, which mixes each view with another one of its batch; 0 = none")
    augment: str = option(
        "none", "torchvision's augmentation of each image before its view: randaugment, trivialaugment"
    )
    ema: float = option(0.0, "decay of the averaged weights, which are the ones saved; 0 = the last ones")
    minutes: float | None = option(
        None, "train for this long instead of for a number of epochs; the bytes then depend on the machine's speed"
    )
    precision: str = option("float32", _PRECISION)
    checkpoint_every: int = option(500, "steps between checkpoints, from which a stopped training goes on")
    dtype: str = option("float16", "of the saved weights: float32 or float16")

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        require(
            self.epochs >= 1 and self.batch >= 2,
            f"teacher training: expected epochs >= 1 and batch >= 2, got {self.epochs}, {self.batch}",
        )
        require(
            self.optimizer in ("adamw", "sgd"),
            f"teacher training: optimizer must be adamw or sgd, got {self.optimizer!r}",
        )
        require(
            self.dtype in ("float32", "float16"),
            f"teacher training: dtype must be float32 or float16, got {self.dtype!r}",
        )
        require(
            self.augment in ("none", "randaugment", "trivialaugment"),
            f"teacher training: augment must be none, randaugment or trivialaugment, got {self.augment!r}",
        )
        require(
            self.precision in ("float32", "bfloat16"),
            f"teacher training: precision must be float32 or bfloat16, got {self.precision!r}",
        )
        require(self.mixup >= 0, f"teacher training: mixup must be 0 or more, got {self.mixup}")
        require(0 <= self.ema < 1, f"teacher training: ema must lie in [0, 1), got {self.ema}")
        require(
            self.minutes is None or self.minutes > 0, f"teacher training: minutes must be positive, got {self.minutes}"
        )
        require(
            self.checkpoint_every >= 1,
            f"teacher training: checkpoint_every must be positive, got {self.checkpoint_every}",
        )


@dataclass(frozen=True)
class TrainingCommand:
    """The keys of each training command, which adds `training`, how its network is trained."""

    dataset: DatasetConfig = option(DatasetConfig, "the images to learn")
    out: str = option("model", "folder to write")
    image_size: int | None = option(None, "side of the images, in pixels: 16 for the digits, asked for with other data")
    resize: Resize = option("squash", "how a picture becomes a square: squash, center-crop or pad, as encoder.resize")
    device: str = option("cpu", "cpu or cuda")
    threads: int = option(1, "torch threads; the weights' bytes depend on it")
    overwrite: bool = option(False, "replace the folder when it exists")
    max_bad_fraction: float = option(0.01, "stop when more than this part of the samples cannot be used")
    workers: int = option(
        1, "ranks that share each batch, by Ray Train, with `threads` CPUs each and a GPU where device=cuda; 1 = no Ray"
    )
    address: str | None = option(None, "of the Ray cluster that has the workers, as cluster.address")

    def __post_init__(self) -> None:
        require(self.side >= 8, f"image_size={self.image_size}: expected 8 or more")
        require(
            0 <= self.max_bad_fraction <= 1, f"max_bad_fraction={self.max_bad_fraction}: expected a fraction, 0 to 1"
        )
        for key in ("threads", "workers"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: expected 1 or more")
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
