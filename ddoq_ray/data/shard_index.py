"""What a shard holds, told from its members and labels without decoding a picture; and what a list of shards says of
itself: which of them are training ones, what a damaged one must have had, whether both splits hold the same images.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import statistics
import tarfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import fsspec

from ddoq_ray.config.split_words import SPLIT_WORDS, tokens
from ddoq_ray.data.pictures import IMAGE_EXTENSIONS
from ddoq_ray.data.tar_samples import DAMAGE, OnBad, labelled, open_samples
from ddoq_ray.storage.quarantine import Refusal
from ddoq_ray.storage.records import ClassCounts, LabelsOutside, ShardInfo
from ddoq_ray.storage.transport import list_shards, open_shard

COMPARED_BYTES = 32 << 20  # of a training shard's pictures, at most, that are read to be compared with the validation's


@dataclass
class Pictures:
    """Which pictures of a shard are known by their bytes.

    Attributes:
        known: size in bytes -> digests of pictures of that size; None where this shard's are collected.
        found: Collected: (size, digest) of each. Else: the keys of those that are known.
        left: Bytes that may still be read to compare.
    """

    known: dict[int, set[bytes]] | None = None
    found: list[tuple[int, bytes]] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    left: int = COMPARED_BYTES

    def needed(self, extension: str, size: int) -> bool:
        """Whether a member's content is wanted: of a picture only where its size lets it be a known one."""
        if extension == "cls":
            return True
        if extension not in IMAGE_EXTENSIONS:
            return False
        if self.known is None:
            return True
        if size not in self.known or size > self.left:
            return False
        self.left -= size
        return True

    def see(self, key: str, data: bytes | None) -> None:
        if data is None:
            return
        digest = picture_digest(data)
        if self.known is None:
            self.found.append((len(data), digest))
        elif digest in self.known.get(len(data), ()):
            self.same.append(key)


def picture_digest(data: bytes) -> bytes:
    """8 bytes that tell an image file from any other."""
    return hashlib.blake2b(data, digest_size=8).digest()


def index_shard(
    shard: str, num_classes: int, pictures: Pictures | None = None, refused: OnBad = lambda bad: None
) -> ShardInfo:
    """Count a shard's labelled images from its member table and labels; pictures are not decoded.

    Labels outside the class list and damage are counted apart, not as images.

    Args:
        pictures: Collects, or compares with those collected before.
        refused: Called for each sample that cannot be used, but for its label's number or its picture's content.

    Raises:
        ValueError: When the shard cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    images: Counter[int] = Counter()
    outside: Counter[int] = Counter()
    damage: list[Refusal] = []

    def on_member(info: tarfile.TarInfo) -> None:
        digest.update(f"{info.name}:{info.size}:{info.mtime}:{info.chksum};".encode("utf-8", "surrogateescape"))

    def on_bad(bad: Refusal) -> None:
        digest.update(repr((bad.name, bad.offset, bad.reason)).encode())
        if bad.reason.startswith(DAMAGE):
            damage.append(bad)
        else:
            refused(bad)

    def needed(extension: str, size: int) -> bool:
        return extension == "cls" if pictures is None else pictures.needed(extension, size)

    with open_shard(shard) as f:
        size = f.seek(0, io.SEEK_END)
        f.seek(0)
        tar = open_samples(f, on_bad)
        for group, class_id in labelled(tar, on_bad, needed, on_member) if tar is not None else ():
            if 0 <= class_id < num_classes:
                images[class_id] += 1
            else:
                outside[class_id] += 1
            digest.update(str(class_id).encode())
            if pictures is not None:
                pictures.see(group.key, group.members[group.images[0]])
    return ShardInfo(
        shard,
        sum(images.values()),
        size,
        ClassCounts(images),
        digest.hexdigest() if tar is not None else "not-a-tar",
        damage="; ".join(b.reason for b in damage[-1:]),
        outside=LabelsOutside.of(outside),
    )


def with_losses(shards: Sequence[ShardInfo]) -> list[ShardInfo]:
    """Each damaged shard with the samples that it must have lost: what a whole one of them holds, less what it gave.

    A shard that was cut off says nothing of what stood behind; its neighbours do (the median of the whole ones), and so
    do its own bytes, at the whole ones' mean bytes a sample. At least one sample is lost.
    """
    whole = [s for s in shards if not s.damage and s.samples]
    usual = statistics.median(s.samples for s in whole) if whole else 0
    bytes_each = sum(s.bytes for s in whole) / sum(s.samples for s in whole) if whole else 0.0
    filled = []
    for s in shards:
        if s.damage:
            by_bytes = s.bytes / bytes_each if bytes_each else 0.0
            had = max(usual, by_bytes)
            filled.append(replace(s, lost=max(1, round(had) - s.samples)))
        else:
            filled.append(s)
    return filled


def split_of(shard: str) -> str | None:
    """`train`, `val` or `test` when a word of a shard's name says so, else a word of its folder's; None without one."""
    folder, _, name = shard.rpartition("/")
    for part in (name, folder.rpartition("/")[2]):
        said = {SPLIT_WORDS[word] for word in tokens(part) if word in SPLIT_WORDS}
        for split in ("train", "val", "test"):
            if split in said:
                return split
    return None


def apart(shards: Sequence[str]) -> dict[str, list[str]]:
    """The shards of one list by the split that their names say: train (and those without a word), val, test.

    A word of the folder counts only where the shards lie in several: `data/train/*.tar` alone is one split.
    """
    folders = {s.rpartition("/")[0] for s in shards}
    named: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for shard in shards:
        split = split_of(shard if len(folders) > 1 else shard.rpartition("/")[2])
        named[split or "train"].append(shard)
    return named


def in_both(train: Collection[str], val: Collection[str]) -> list[str]:
    """Shards that both lists name, by whatever path."""
    real = {resolved(s) for s in val}
    return [s for s in train if resolved(s) in real]


def resolved(shard: str) -> str:
    """One name for a file, by whatever path or link it is asked for."""
    if "://" in shard and not shard.startswith("file:"):
        return shard
    return os.path.realpath(str(fsspec.core.url_to_fs(shard)[1]))


def each_once(path: str, key: str, told: list[str]) -> list[str]:
    """The shards of a folder or a pattern; hidden files, which Macs leave beside others, are none.

    Raises:
        ValueError: When there are none, or one is no file: reading a pipe would wait for ever.
    """
    listed = list_shards(path, key=key)
    plain = [s for s in listed if not s.rpartition("/")[2].startswith(".")] or listed
    once: dict[str, str] = {}
    for shard in plain:
        once.setdefault(resolved(shard), shard)
        if "://" not in shard and os.path.exists(shard) and not os.path.isfile(shard):
            raise ValueError(f"{key}={path}: {shard} is a folder, a pipe or a device, no shard; move it away")
    if deeper := _folders_of_tars(path):
        told.append(f"the folders {shown(deeper)} in {key}={path} hold *.tar of their own, which are not read")
    if len(plain) < len(listed):
        told.append(f"{len(listed) - len(plain)} hidden files of {key}={path} are no shards")
    if len(once) < len(plain):
        told.append(f"{len(plain) - len(once)} shards of {key}={path} are links to others: each is read once")
    return list(once.values())


def _folders_of_tars(path: str) -> list[str]:
    """The folders in a folder of this machine that hold shards; a store is not asked, as that takes a request each."""
    found = []
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(path), key=lambda e: e.name) if os.path.isdir(path) else ():
            if entry.is_dir() and not entry.name.startswith("."):
                found += [entry.name] if any(name.endswith(".tar") for name in os.listdir(entry)) else []
    return found


def train_and_val(path: str, val_path: str | None, told: list[str] | None = None) -> tuple[list[str], list[str]]:
    """The training and the validation shards of `dataset.path` and `dataset.val_path`; lines on it go to `told`.

    A folder often holds both: shards whose names say `val` or `test` are never trained on beside others.

    Raises:
        ValueError: When a list is empty, or both lists hold the same shard.
    """
    told = [] if told is None else told
    shards = each_once(path, "dataset.path", told)
    named = apart(shards)
    train, held = named["train"], named["val"] or named["test"]
    if not train:  # all of one word: that is what was asked for
        train, held = shards, []
        told.append(
            f"every shard of dataset.path={path} is named as held-out data ({shown(shards)}): trained on, as asked"
        )
    chosen = set(train)
    left = [s for s in shards if s not in chosen]
    if val_path is None:
        if held:
            told.append(f"{len(held)} shards are taken for validation by their names ({shown(held)})")
        taken = set(held)
        left = [s for s in left if s not in taken]
        val = held
    else:
        val = each_once(val_path, "dataset.val_path", told)
        same = in_both(train, val)
        if same:
            raise ValueError(
                f"dataset.path and dataset.val_path hold the same shards ({shown(same)}): a student must not be scored "
                "on what was distilled; give lists that share none"
            )
        taken = set(in_both(left, val))
        left = [s for s in left if s not in taken]
    if left:
        told.append(f"{len(left)} shards of dataset.path are left out by their names ({shown(left)})")
    return train, val


def shown(shards: Sequence[str]) -> str:
    """The first names of a list of shards."""
    names = [s.rpartition("/")[2] for s in shards[:3]]
    return ", ".join(names) + (", ..." if len(shards) > 3 else "")
