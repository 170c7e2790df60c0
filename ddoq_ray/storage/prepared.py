"""What prepare leaves behind: the run's data as later stages read it, and its figures for the user."""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.records import ClassInfo, ShardInfo, read_shards, total_counts


@dataclass(frozen=True)
class Data:
    """The prepared data of a run: its class list and its shards with what they hold.

    Shard paths inside the run directory are stored relative to it, so that a run can be moved.
    """

    run: Folder
    classes: tuple[ClassInfo, ...]
    train: tuple[ShardInfo, ...]
    val: tuple[ShardInfo, ...]

    def url(self, shard: ShardInfo) -> str:
        inside = "://" not in shard.path and not posixpath.isabs(shard.path)
        return self.run.path(shard.path) if inside else shard.path

    @property
    def train_urls(self) -> list[str]:
        return [self.url(s) for s in self.train]

    @property
    def val_urls(self) -> list[str]:
        return [self.url(s) for s in self.val]

    @cached_property
    def counts(self) -> dict[int, int]:
        """class_id -> labelled training images. Counted once: a class-mixed ImageNet-21K has 14 million pairs."""
        counts = dict(total_counts(shard.images for shard in self.train).items())
        return {c.class_id: counts.get(c.class_id, 0) for c in self.classes}

    @cached_property
    def digest(self) -> str:
        """Changes when a training shard, its place in the order, or the class list does."""
        shards = [(posixpath.basename(s.path), s.digest) for s in self.train]
        return digest_of([shards, [c.name for c in self.classes]])[:32]

    @staticmethod
    def load(run: Folder) -> Data:
        """Read the prepared data of a run.

        Raises:
            ValueError: When prepare has not finished, or a file of it is not what was written.
        """
        made = Artifact(run / layout.DATA, "prepare")
        made.require()
        classes = tuple(ClassInfo(**row) for row in json.loads(made.read(layout.SOURCE_CLASSES)))
        train = tuple(read_shards(made.read(layout.SHARDS)))
        val = tuple(read_shards(made.read(layout.VAL_SHARDS)))
        return Data(run, classes, train, val)


@dataclass
class Packed:
    """What was written, and what was refused by reason: by name alone (`unlisted`), or by content (`refused`)."""

    classes: list[ClassInfo]
    train: list[ShardInfo]
    val: list[ShardInfo]
    unlisted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    same: dict[str, Any] = field(default_factory=dict)  # pictures that both splits hold
    told: list[str] = field(default_factory=list)  # lines for the user


def summary(packed: Packed) -> dict[str, Any]:
    """What was prepared, in figures: for the manifest, and in words for the terminal."""
    facts: dict[str, Any] = {"classes": len(packed.classes)}
    for split, shards in (("train", packed.train), ("val", packed.val)):
        counts = dict(total_counts(shard.images for shard in shards).items())
        by_class = sorted(counts.get(c.class_id, 0) for c in packed.classes)
        facts[split] = {
            "images": sum(by_class),
            "images_a_class": {
                "min": by_class[0],
                "median": float(np.median(by_class)),
                "max": by_class[-1],
            },
            "shards": len(shards),
            "bytes": sum(s.bytes for s in shards),
        }
    if packed.same:
        facts["in_both_splits"] = packed.same
    return facts | {"refused": dict(packed.refused), "not_listed": dict(packed.unlisted)}


def summary_lines(facts: dict[str, Any], quarantine: str) -> list[str]:
    lines = []
    for split, words in (("train", "training"), ("val", "validation")):
        part = facts[split]
        if part["shards"]:
            a_class = part["images_a_class"]
            lines.append(
                f"prepare    {part['images']:,} {words} images of {facts['classes']:,} classes "
                f"({a_class['min']:,} to {a_class['max']:,} a class, median {a_class['median']:,.10g}), "
                f"{part['bytes'] / 1e6:,.1f} MB in {part['shards']:,} shards"
            )
    same = facts.get("in_both_splits")
    if same:
        lines.append(
            f"prepare    warning: {same['images']:,} of {same['of_training']:,} training images are among the "
            f"{same['of_validation']:,} validation images, byte for byte ({', '.join(same['examples'])}): "
            "scores will be too high"
        )
    refused = Counter(facts["refused"]) + Counter(facts["not_listed"])
    if refused:
        told = ", ".join(f"{reason}: {n:,}" for reason, n in refused.most_common())
        lines.append(f"prepare    refused {sum(refused.values()):,} files ({told}); each is named in {quarantine}")
    return lines
