"""The real validation images, read in one way by all who score on them: teacher check, training curve, evaluation.

An image that cannot be decoded is named in ``quarantine/val-<shard>.jsonl``, counts towards `max_bad_fraction`, and is
told wherever a score is: a figure says of how many images it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from ddoq_ray.config import RunConfig
from ddoq_ray.config.training import resized_side
from ddoq_ray.data.samples import read_samples
from ddoq_ray.execution.workers import say
from ddoq_ray.storage import layout
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import shard_name
from ddoq_ray.storage.manifests import Scored
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.quarantine import Refusal, publish_refusals, refused_kinds

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Validation:
    """Where the validation images are and how they become squares; small and picklable.

    Attributes:
        urls: The shards.
        samples: How many samples of each must be accounted for, as scored or refused.
        num_classes: C.
        crop: Part of the resized shorter side that the middle crop keeps (`protocol.val_crop`).
        digests: sha256 of each shard; empty where none is known.
        every, first: Of the usable images every so manieth is kept, from this one on.
    """

    urls: tuple[str, ...]
    samples: tuple[int, ...]
    num_classes: int
    crop: float
    every: int = 1
    first: int = 0
    digests: tuple[str, ...] = ()

    @staticmethod
    def of(config: RunConfig, data: Data) -> Validation:
        samples = tuple(s.expected for s in data.val)
        digests = tuple(s.sha256 for s in data.val)
        return Validation(tuple(data.val_urls), samples, len(data.classes), config.protocol.val_crop, digests=digests)

    def of_rank(self, rank: int, world: int) -> Validation:
        """A rank's part: shards of its own where there are enough of them, else every `world`-th image of all."""
        if len(self.urls) >= 2 * world:
            mine = slice(rank, None, world)
            return replace(self, urls=self.urls[mine], samples=self.samples[mine], digests=self.digests[mine])
        return replace(self, every=world, first=rank)


@dataclass
class Refused:
    """What was refused: shard -> its samples; and how many in all, with those that the index knew and nobody saw."""

    shards: dict[int, list[Refusal]] = field(default_factory=dict)
    total: int = 0

    def note(self, shard: int, bad: Sequence[Refusal], missing: int) -> None:
        """Take the refusals of a shard, of which `missing` of the samples in the index did not come."""
        more = missing - sum(b.samples for b in bad)
        if more > 0:
            reason = f"images that the index names cannot be read any more: {more}"
            bad = [*bad, Refusal("", reason, more, bad[-1].offset if bad else 0)]
        if bad:
            self.shards[shard] = sorted(bad, key=lambda b: b.offset or 0)
            self.total += sum(b.samples for b in bad)

    @property
    def reasons(self) -> str:
        """Kinds of reasons and how often each, in words."""
        kinds = refused_kinds(b for bad in self.shards.values() for b in bad)
        return ", ".join(f"{reason}: {n}" for reason, n in kinds.most_common(5))

    def publish(self, run: Folder) -> None:
        """Name each in the run's quarantine; what an earlier reading wrote there goes."""
        quarantine = run / layout.QUARANTINE
        written = {f"val-{shard_name(shard)}.jsonl" for shard in self.shards}
        for name in quarantine.names("val-*.jsonl"):
            if name not in written:
                quarantine.remove(name)
        for shard, bad in self.shards.items():
            publish_refusals(quarantine, f"val-{shard_name(shard)}.jsonl", bad, "key")


def middle_square(image: Image.Image, size: int, crop: float) -> UInt8:
    """The middle of a picture as size x size: the shorter side resized to size / crop, then the square in the middle.

    Shrunk bilinearly and antialiased, as torchvision's `Resize` and `CenterCrop` do it on pictures, which made the
    published figures (crop 0.875 at 224 px is "resize 256, center crop 224"). What is smaller is enlarged bicubically,
    as small training pictures are. A square picture of that size is not touched.

    Returns:
        uint8 [size, size, 3].
    """
    side, shorter = resized_side(size, crop), min(image.size)
    if max(image.size) > 8 * shorter:  # resampled, a very long picture would not fit in memory; only its middle counts
        image = _middle(image, min(image.width, 8 * shorter), min(image.height, 8 * shorter))
    width, height = side * image.width // shorter, side * image.height // shorter
    if image.size != (width, height):
        how = Image.Resampling.BICUBIC if side > shorter else Image.Resampling.BILINEAR
        image = image.resize((width, height), how)
    return np.asarray(_middle(image, size, size), dtype=np.uint8)


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def scored_images(validation: Validation, size: int, crop: float, refused: Refused) -> Iterator[tuple[UInt8, int]]:
    """(uint8 [3, size, size], class_id) of every image that can be scored, in order; the others go to `refused`."""
    digests = validation.digests or ("",) * len(validation.urls)
    for shard, (url, indexed, sha256) in enumerate(zip(validation.urls, validation.samples, digests, strict=True)):
        bad: list[Refusal] = []
        usable = 0
        for sample in read_samples(url, validation.num_classes, bad.append, sha256):
            usable += 1
            yield middle_square(sample.image, size, crop).transpose(2, 0, 1), sample.class_id
        refused.note(shard, bad, indexed - usable)


def in_batches(images: Iterable[tuple[UInt8, int]], size: int) -> Iterator[tuple[UInt8, list[int]]]:
    """Images one by one become batches; memory is one batch, however many images there are."""
    pixels: list[UInt8] = []
    ids: list[int] = []
    for image, class_id in images:
        pixels.append(image)
        ids.append(class_id)
        if len(ids) == size:
            yield np.stack(pixels), ids
            pixels, ids = [], []
    if ids:
        yield np.stack(pixels), ids


def load_scored(validation: Validation, size: int, refused: Refused) -> tuple[UInt8, npt.NDArray[np.int64]]:
    """Those of the part that is asked for, in memory: uint8 [N, 3, size, size] (N x 3 x size^2 bytes), int64 [N]."""
    images = np.empty((-(-sum(validation.samples) // validation.every), 3, size, size), np.uint8)
    class_ids: list[int] = []
    for number, (image, class_id) in enumerate(scored_images(validation, size, validation.crop, refused)):
        if number % validation.every != validation.first:
            continue
        if len(class_ids) == len(images):  # more than the index says: a shard that grew since
            more = max(1, len(images) // 8)  # not one by one, each of which would copy all
            images = np.concatenate([images, np.empty((more, 3, size, size), np.uint8)])
        images[len(class_ids)] = image
        class_ids.append(class_id)
    return images[: len(class_ids)], np.asarray(class_ids, np.int64)


def check_refused(config: RunConfig, run: Folder, scored: int, refused: int, reasons: str = "") -> None:
    """Stop where too many validation images cannot be scored: every figure would be of the rest.

    Raises:
        ValueError: More than `max_bad_fraction` of them are refused, or none is left.
    """
    seen = scored + refused
    place = f"each is listed in {run.path('quarantine')}/val-*.jsonl"
    if refused > config.max_bad_fraction * max(1, seen):
        why = f" ({reasons})" if reasons else ""
        raise ValueError(
            f"{refused} of {seen} validation images refused, more than max_bad_fraction={config.max_bad_fraction}"
            f"{why}; {place}. Mend the validation shards, or raise max_bad_fraction to score on the other {scored}"
        )
    if not scored:
        raise ValueError(f"no usable validation image to score on; {place}; see dataset.val_path")


def say_refused(stage: str, run: Folder, facts: Scored) -> None:
    """One line where images were refused; `facts`: images, refused, reasons."""
    if facts["refused"]:
        seen = facts["images"] + facts["refused"]
        why = f" ({facts['reasons']})" if facts["reasons"] else ""
        say(
            f"{stage:<10} {facts['refused']:,} of {seen:,} validation images refused{why}, {facts['images']:,} scored; "
            f"each is listed in {run.path('quarantine')}/val-*.jsonl"
        )


def teacher_columns(data: Data) -> tuple[int, ...]:
    """The teacher's output for each class, in order of class_id: a student's columns that are scored.

    Raises:
        ValueError: A class has none: scoring the others only would move every label behind it.
    """
    lost = [c.name for c in data.classes if c.teacher_index is None]
    if lost:
        raise ValueError(
            f"{len(lost)} classes have no teacher_index ({', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}); "
            "give it for each in classes.json, or a teacher that knows these classes by name"
        )
    return tuple(int(c.teacher_index) for c in data.classes if c.teacher_index is not None)
