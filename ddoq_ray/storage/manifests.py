"""What the JSON files of a run directory hold: a manifest's facts for each kind of artifact, and rows of results."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Manifest(TypedDict):
    """What every ``manifest.json`` holds.

    Attributes:
        stage: What made it (`Step.name`).
        identity: What its bytes follow from: settings, and digests of what it is made from.
        seconds: What it took.
        items: How many `unit`s were made or trained on.
        bytes: Size of what was made.
    """

    stage: str
    identity: dict[str, Any]
    identity_digest: str
    seconds: float
    items: int
    unit: str
    bytes: int


class DataManifest(Manifest):
    """prepare: the index of the data."""

    shards: int
    classes: int
    summary: dict[str, Any]


class LatentsManifest(Manifest):
    """encode, and the held-out latents (which have no batch and no environment of their own)."""

    shards: int
    refused: int
    digest: str
    kept: bool
    batch: NotRequired[int]
    refused_by_reason: NotRequired[dict[str, int]]
    latent_shape: NotRequired[list[int]]
    environment: NotRequired[dict[str, Any]]


class CodebookManifest(Manifest):
    """quantize."""

    digest: str
    wall_seconds: float
    parts: int
    centroids: int
    classes_by_algorithm: dict[str, int]
    dropped_classes: list[int]
    warnings: list[str]
    environment: dict[str, Any]


class ImageShard(TypedDict):
    """One tar of an image set; `constant` and `of` only of synthesized ones."""

    name: str
    images: int
    bytes: int
    sha256: str


class ImagesManifest(Manifest):
    """synthesize and select: an image set."""

    digest: str
    shards: list[ImageShard]
    constant: NotRequired[int]
    environment: NotRequired[dict[str, Any]]


class LabelsManifest(Manifest):
    """label: soft labels of an image set, or (codec `online`) only the check of the teacher that will make them.

    Attributes:
        label_files: How many hold them.
        codec_costs: `Labeller.codec_costs`, where the codec rounds more than fp16 does.
        head: sha256 of the teacher's head, which lies beside labels of features.
        grid: How labels lie in the files (`LabelGrid`).
        views: What was labelled: a `ViewSpec` with its seed, and `stored`, [N, H, W] of the images it is cut from.
    """

    digest: str
    codec: str
    outputs: int
    teacher_index: list[int]
    teacher: dict[str, Any]
    environment: dict[str, Any]
    label_files: NotRequired[int]
    grid: NotRequired[dict[str, int]]
    views: NotRequired[dict[str, Any]]
    head: NotRequired[str]
    codec_costs: NotRequired[dict[str, dict[str, float]]]


class StudentManifest(Manifest):
    """train: one student; what is None of one that diverged has no value."""

    method: str
    ipc: int
    student: str
    seed: int
    epochs: int
    train_images: int
    refused_images: int
    best_top1_pct: float | None
    best_epoch: int | None
    diverged: bool
    diverged_epoch: int | None


class Scored(TypedDict):
    """How many validation images a figure is of; `reasons` in words."""

    images: int
    refused: int
    reasons: str


class ResultRow(TypedDict):
    """A row of ``report/rows.json`` and ``results.json``: one student and its accuracy."""

    method: str
    ipc: int
    student: str
    size: int
    teacher: str
    protocol: str
    seed: int
    epochs: int
    train_images: int
    best_top1_pct: float | None
    best_epoch: int | None
    seconds: float
    top1_pct: float | None
    top5_pct: float | None
    val_images: int
    val_refused: int
    diverged: bool


class StageCost(TypedDict):
    """What a stage took in all its steps."""

    stage: str
    seconds: float
    items: int
    unit: str
    bytes: int
