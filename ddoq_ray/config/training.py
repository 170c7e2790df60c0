"""Soft labels, weights, the student and the protocol it is trained by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ddoq_ray.config.schema import LARGEST_SIDE, option, require

_UNITS = ("B", "kB", "MB", "GB", "TB")
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})")


def resized_side(size: int, crop: float) -> int:
    """The side from whose middle a square of `size` is cut that keeps `crop` of it: 256 for 224 and 0.875."""
    return round(size / crop)


@dataclass(frozen=True)
class LabelsConfig:
    mode: Literal["auto", "logits", "features", "logits_int8", "online", "hard"] = option(
        "auto",
        "auto: the smaller of logits and features; online: the teacher labels while the student trains; hard: the "
        "images' classes, by cross-entropy",
    )
    budget: str | None = option(
        None, "most bytes of one image set's labels, such as 2GB: the most exact codec that fits; null: no bound"
    )
    workers: int = option(2, "teacher actors")
    epochs: int | None = option(
        None, "epochs that are labelled; a longer training sees their views, with their labels, again; null: all"
    )
    file_mb: int = option(128, "largest size of a label file: a range of epochs of a range of images")
    file_labels: int = option(262_144, "most labels in a file, which is a unit of work for a teacher")

    def __post_init__(self) -> None:
        for key in ("workers", "file_mb", "file_labels"):
            require(getattr(self, key) >= 1, f"labels.{key}={getattr(self, key)}: expected 1 or more")
        require(self.epochs is None or self.epochs >= 1, f"labels.epochs={self.epochs}: expected 1 or more, or null")
        require(
            self.budget is None or _SIZE.fullmatch(self.budget) is not None,
            f"labels.budget={self.budget}: expected a size such as 500MB or 2.5GB",
        )

    def labelled(self, epochs: int) -> int:
        """Of so many epochs of a training, those that have labels of their own."""
        return epochs if self.epochs is None else min(epochs, self.epochs)

    @property
    def budget_bytes(self) -> float | None:
        """`budget` as a number."""
        found = None if self.budget is None else _SIZE.fullmatch(self.budget)
        return None if found is None else float(found[1]) * 1000 ** _UNITS.index(found[2])

    @property
    def stored(self) -> bool:
        """Whether labels are made before students train."""
        return self.mode not in ("online", "hard")


@dataclass(frozen=True)
class WeightsConfig:
    scheme: Literal["counts", "sqrt", "uniform"] = option(
        "counts", "counts: Algorithm 4 (mean 1 in a class); sqrt: Eq. 33, as the paper's tables; uniform: as D4M"
    )
    across_classes: Literal["balanced", "empirical"] = option(
        "balanced", "balanced: every class counts the same; empirical: by its number of real images"
    )
    normalize: Literal["none", "class", "set"] = option(
        "none", "none: as the scheme prints them; class: of mean 1 in each class; set: of mean 1 over the set"
    )
    cutmix: Literal["base", "mixed"] = option(
        "base", "weight of a mixed view: base: that of its own image; mixed: of both images by their shares"
    )


@dataclass(frozen=True)
class StudentConfig:
    arch: str = option("convnet3-w8", "a small-image network, a torchvision classifier, or package.module:callable")
    image_size: int = option(16, "side of the square the student sees, in pixels")

    def __post_init__(self) -> None:
        require(
            4 <= self.image_size <= LARGEST_SIDE,
            f"student.image_size={self.image_size}: expected 4 or more, at most {LARGEST_SIDE:,}",
        )


@dataclass(frozen=True)
class ProtocolConfig:
    """The defaults are for 16 px digits on two cores: tuned with convnet3-w32 on random real images and the selection
    split only, so that they favour no method. Steps, not epochs: every method, and the row `full`, gets the same
    compute.
    """

    name: str = option("digits", "the preset's name, for tables")
    epochs: int | None = option(None, "passes over an image set; null where steps are given")
    full_epochs: int | None = option(None, "the same for the row `full`, which trains on all the real images")
    steps: int | None = option(400, "optimization steps instead of epochs: the same compute for every method")
    batch: int = option(50, "images in one step, over all workers")
    optimizer: Literal["adamw", "sgd"] = option("adamw", "optimizer")
    lr: float = option(5e-3, "learning rate")
    momentum: float = option(0.9, "momentum of sgd")
    weight_decay: float = option(0.01, "weight decay; none on biases and norms")
    decay_all: bool = option(False, "weight decay on biases and norms too")
    ema: float = option(0.0, "decay of the student's averaged weights, which are then scored and published; 0 = none")
    schedule: Literal["cosine", "step", "constant"] = option("cosine", "learning rate over the epochs")
    cosine_span: float = option(
        1.0, "schedule=cosine comes to 0 after this multiple of the epochs: 2 ends at half the rate, as RDED's does"
    )
    step_at: tuple[int, ...] = option((), "epochs at which schedule=step multiplies by step_factor")
    step_factor: float = option(0.25, "see step_at")
    temperature: float = option(4.0, "softmax temperature of teacher and student")
    direction: Literal["teacher-student", "student-teacher"] = option(
        "teacher-student",
        "teacher-student: KL(teacher || student), as the released codes; student-teacher: as the paper prints it",
    )
    label_smoothing: float = option(0.0, "label smoothing of labels.mode=hard")
    min_scale: float = option(0.5, "smallest crop area of a view")
    flip: bool = option(False, "flip views left to right at random")
    cutmix: bool = option(True, "paste a box of another image's view into each view")
    mixup: float = option(
        0.0, "alpha of MixUp, which blends another image's view into each view; with cutmix=false; 0 = none"
    )
    shuffle_patches: int = option(
        1, "cut each image into so many strips across and down, and shuffle them before the crop, as RDED does; 1 = no"
    )
    cutout: float = option(0.0, "paint a box of this share of each view's side over, in a random colour; 0 = none")
    val_crop: float = option(
        1.0,
        "part of the resized shorter side that the middle crop of a scored image keeps: 0.875 at 224 px is "
        "`resize 256, center crop 224`; 1.0 for small images, whose borders count",
    )
    eval_every: int = option(0, "epochs between two points of the validation curve; 0 = ten points")

    def __post_init__(self) -> None:
        for key in ("epochs", "full_epochs", "steps", "batch"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"protocol.{key}={value}: expected 1 or more")
        given = {key: getattr(self, key) for key in ("epochs", "full_epochs", "steps")}
        require(
            self.epochs is not None if self.steps is None else self.epochs is None and self.full_epochs is None,
            ", ".join(f"protocol.{k}={'null' if v is None else v}" for k, v in given.items())
            + ": give epochs (and full_epochs for the row `full`) and steps=null, or steps and null for both others",
        )
        require(0 < self.lr <= 1e30, f"protocol.lr={self.lr}: expected more than 0, within what float32 can hold")
        require(self.weight_decay >= 0, f"protocol.weight_decay={self.weight_decay}: expected 0 or more")
        require(self.step_factor > 0, f"protocol.step_factor={self.step_factor}: expected more than 0")
        require(0 <= self.momentum < 1, f"protocol.momentum={self.momentum}: expected 0 or more, below 1")
        require(0 <= self.ema < 1, f"protocol.ema={self.ema}: expected 0 or more, below 1")
        require(self.cosine_span >= 1, f"protocol.cosine_span={self.cosine_span}: expected 1 or more")
        require(
            0 <= self.label_smoothing < 1,
            f"protocol.label_smoothing={self.label_smoothing}: expected 0 or more, below 1",
        )
        require(self.eval_every >= 0, f"protocol.eval_every={self.eval_every}: expected 0 or more")
        require(self.temperature > 0, f"protocol.temperature={self.temperature}: expected more than 0")
        require(
            self.mixup == 0 or (self.mixup > 0 and not self.cutmix),
            f"protocol.mixup={self.mixup}, protocol.cutmix={str(self.cutmix).lower()}: expected 0 or more, and "
            "protocol.cutmix=false with more: a view is mixed in one way",
        )
        require(self.shuffle_patches >= 1, f"protocol.shuffle_patches={self.shuffle_patches}: expected 1 or more")
        require(0 <= self.cutout <= 1, f"protocol.cutout={self.cutout}: expected 0 to 1")
        require(0 < self.min_scale <= 1, f"protocol.min_scale={self.min_scale}: expected above 0, at most 1")
        require(0 < self.val_crop <= 1, f"protocol.val_crop={self.val_crop}: expected above 0, at most 1")
        require(
            bool(self.step_at) == (self.schedule == "step"),
            f"protocol.step_at={list(self.step_at)} and protocol.schedule={self.schedule}: "
            "step_at belongs to schedule=step, which needs it; give both or neither",
        )
        require(
            all(epoch >= 1 for epoch in self.step_at),
            f"protocol.step_at={list(self.step_at)}: expected epochs from 1 on",
        )

    def epochs_for(self, images: int, *, full: bool = False) -> int:
        """Passes over a set of `images`; from the number of steps where the protocol counts those."""
        if self.steps is not None:
            return -(-self.steps // -(-images // self.batch))
        epochs = self.full_epochs if full else self.epochs
        assert epochs is not None
        return epochs

    def stored_side(self, image_size: int) -> int:
        """Side at which training pictures of unlike sizes are kept, for a student that sees `image_size`.

        What a scored image is resized to: views are then cut from pictures of the resolution that is scored, and a set
        of N pictures takes 3 x side^2 x N bytes. A set whose pictures are all of one size keeps that.
        """
        return resized_side(image_size, self.val_crop)
