"""Labelled samples in WebDataset shards: read one by one, decoded, indexed, written.

No Ray here: the encode stage, the training commands and the evaluation all read through this file.
A sample that cannot be used is never dropped silently: it is handed to `on_bad` with its key, its byte
offset and the reason.

A sample is a run of adjacent members with one key; the key of ``a/b.jpg`` is ``a/b``, what follows is the extension,
in any case of letters. A key ends at its file name's first dot, so that ``x.seg.png`` belongs to sample ``x``, as in
the webdataset library; but where no ``x.jpg`` or ``x.cls`` is beside them, ``x.0.jpg`` and ``x.0.cls`` are sample
``x.0``. Hidden files are no samples.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import lzma
import re
import tarfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

import fsspec
import numpy as np
from PIL import Image

from ddoq_ray.pictures import IMAGE_EXTENSIONS, RefusedPicture, Resize, decode_rgb, encode_png, to_square
from ddoq_ray.records import ClassCounts, ClassInfo, ShardInfo
from ddoq_ray.tar_headers import open_tar
from ddoq_ray.transport import list_shards, open_shard, retried

__all__ = [
    "BadSample", "Sample", "decode_rgb", "encode_png", "index_shard", "list_shards", "load_arrays", "read_classes",
    "read_samples", "to_square", "write_tar",
]  # fmt: skip

NOT_ADJACENT = "members of one key are not next to each other in the tar"


@dataclass(frozen=True)
class Sample:
    """A decoded sample: key, class_id, RGB picture, byte offset of its first member."""

    key: str
    class_id: int
    image: Image.Image
    offset: int


@dataclass(frozen=True)
class BadSample:
    """A refused sample: key, byte offset of its first member, reason (``kind`` or ``kind: detail``)."""

    key: str
    offset: int
    reason: str


OnBad = Callable[[BadSample], None]
OnMember = Callable[[tarfile.TarInfo], None]


@dataclass
class _Group:
    """Adjacent members of one key.

    Attributes:
        members: extension -> content; None for one that nobody needs.
        duplicate: An extension that came twice.
        broken: Why a member could not be read.
        cut: Whether the tar breaks right after it.
    """

    key: str
    offset: int
    members: dict[str, bytes | None] = field(default_factory=dict)
    duplicate: str | None = None
    broken: str | None = None
    cut: bool = False

    @property
    def images(self) -> list[str]:
        return [e for e in IMAGE_EXTENSIONS if e in self.members]

    @property
    def whole(self) -> bool:
        return "cls" in self.members and bool(self.images)


def read_classes(path: str) -> list[ClassInfo]:
    """Read ``classes.json``: a list of names, or of objects with the fields of `ClassInfo`.

    Raises:
        ValueError: When the file is missing, is not such a list, or does not number its classes 0 to C - 1.
    """
    try:
        fs, root = fsspec.core.url_to_fs(path)
        rows = json.loads(retried(path, lambda: fs.cat_file(root)))
    except FileNotFoundError:
        raise ValueError(
            f"no class list at {path}: expected a classes.json, a JSON list of class names in label order "
            '(or of objects with "class_id", "name", "prompt", "teacher_index", "prior_label"); '
            "set dataset.classes to yours"
        ) from None
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"cannot read the class list {path}: {why}; set dataset.classes to a file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}; expected a JSON list of class names in label order") from None
    if not isinstance(rows, list) or not rows:
        came = "an empty list" if rows == [] else f"a JSON {type(rows).__name__}"
        raise ValueError(f"{path}: expected a non-empty JSON list of classes, got {came}")
    classes = []
    for i, row in enumerate(rows):
        if isinstance(row, str):
            name = unicodedata.normalize("NFC", row)  # Macs write names in another form than others
            classes.append(ClassInfo(i, name, name))
        elif isinstance(row, dict) and "name" in row:
            unknown = set(row) - {"class_id", "name", "prompt", "teacher_index", "prior_label"}
            if unknown:
                raise ValueError(
                    f"{path}: class {i} has unknown fields {sorted(unknown)}; expected some of class_id, name, prompt, "
                    "teacher_index, prior_label"
                )
            for field in ("class_id", "teacher_index", "prior_label"):
                value = row.get(field)
                if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                    raise ValueError(f"{path}: class {i} has {field}={value!r}; expected a whole number")
            name = unicodedata.normalize("NFC", str(row["name"]))
            classes.append(
                ClassInfo(
                    i if row.get("class_id") is None else row["class_id"],
                    name,
                    str(row.get("prompt", name)),
                    row.get("teacher_index"),
                    row.get("prior_label"),
                )
            )
        else:
            raise ValueError(f"{path}: class {i} is {row!r}; expected a name, or an object with a name")
    ids = [c.class_id for c in classes]
    if ids != list(range(len(ids))):
        shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
        raise ValueError(f"{path}: expected class_id 0 to {len(ids) - 1} in order, got {shown}; mend the list")
    return classes


# What a damaged tar, or the decompression around it, raises. An OSError with a number is the disk's: it must surface.
_BROKEN = (tarfile.ReadError, EOFError, zlib.error, lzma.LZMAError, OSError)


def _why_broken(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise error
    return str(error)


def _split(name: str) -> tuple[str, str, str] | None:
    """(key up to the first dot, what stands between it and the extension, extension); None without an extension."""
    folder, slash, file = name.rpartition("/")
    key, dot, rest = file.partition(".")
    if not key or not dot:
        return None
    stem, _, extension = rest.rpartition(".")
    return folder + slash + key, stem, extension.lower()


def _samples_of(parts: dict[str, _Group]) -> list[_Group]:
    """The samples among adjacent members whose names agree up to the first dot; `parts` by what follows that dot."""
    bare = parts.get("")
    if bare is None or not ("cls" in bare.members or bare.images):
        return list(parts.values())
    for stem, part in parts.items():
        if stem:  # x.seg.png, beside x.jpg and x.cls
            bare.members |= {f"{stem}.{extension}": None for extension in part.members}
            bare.offset = min(bare.offset, part.offset)
    return [bare]


def _groups(tar: tarfile.TarFile, on_bad: OnBad, needed: Collection[str], on_member: OnMember) -> Iterator[_Group]:
    """Runs of adjacent members, with the content of the extensions in `needed`.

    It is read as it passes: going back costs a request to the store, or the decompression of all that lies before.
    """
    prefix, position = "", 0
    parts: dict[str, _Group] = {}
    try:
        for info in tar:
            position = info.offset
            tar.members.clear()  # type: ignore[attr-defined]  # else the table of a long shard stays in memory
            name = info.name.rpartition("/")[2]
            if info.isdir() or name.startswith("."):
                continue
            on_member(info)
            split = _split(info.name)
            if split is None:
                on_bad(BadSample(info.name, info.offset, "member without an extension"))
                continue
            if not info.isreg():
                on_bad(BadSample(info.name, info.offset, "member is a link or device, not a file"))
                continue
            key, stem, extension = split
            # Two labels after different stems, none before: the dots belong to the keys.
            dotted = "" not in parts and sum("cls" in p.members for p in parts.values()) > 1
            if key != prefix or (dotted and stem not in parts):
                yield from _samples_of(parts)
                prefix, parts = key, {}
            if stem not in parts:
                parts[stem] = _Group(f"{key}.{stem}" if stem else key, info.offset)
            group = parts[stem]
            if extension in group.members:
                group.duplicate = extension
            try:
                group.members[extension] = _read(tar, info) if extension in needed else None
            except tarfile.ReadError as error:
                group.members[extension], group.broken = None, str(error)
        # tarfile takes any block that is no header for the end; only zeros, or the end of the file, are one.
        position = tar.offset
        assert tar.fileobj is not None
        tar.fileobj.seek(position)
        block = tar.fileobj.read(tarfile.BLOCKSIZE)
        if block.strip(b"\0") or 0 < len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("no member header there")
    except _BROKEN as error:
        why = _why_broken(error)
        for group in _samples_of(parts):
            group.cut = True
            yield group
        on_bad(BadSample("", position, f"broken tar: from byte {position} on nothing can be read: {why}"))
        return
    yield from _samples_of(parts)


def labelled(
    tar: tarfile.TarFile, on_bad: OnBad, needed: Collection[str], on_member: OnMember = lambda info: None
) -> Iterator[tuple[_Group, int]]:
    """Samples that have one label and one picture; whether the label is a class's is not looked at.

    A key that comes again is refused there. What a key lacks may still come, so that its refusal waits for the end.
    """
    came: dict[str, bool] = {}  # key -> whether it came with a picture and a label
    again: set[str] = set()
    lacking: list[_Group] = []
    for group in _groups(tar, on_bad, needed, on_member):
        if group.key in came:
            again.add(group.key)
            twice = group.whole and came[group.key]
            reason = "a sample with this key came before in the shard" if twice else NOT_ADJACENT
            on_bad(BadSample(group.key, group.offset, reason))
            continue
        came[group.key] = group.whole
        if not group.whole and not group.cut and group.duplicate is None:
            group.members = dict.fromkeys(group.members)  # their content could fill the memory
            lacking.append(group)
            continue
        label = _label(group)
        if isinstance(label, str):
            on_bad(BadSample(group.key, group.offset, label))
        else:
            yield group, label
    for group in lacking:
        names = ", ".join(sorted(group.members))
        lack = "no label (.cls)" if "cls" not in group.members else f"no image among its members: {names}"
        on_bad(BadSample(group.key, group.offset, NOT_ADJACENT if group.key in again else lack))


def _label(group: _Group) -> int | str:
    """The label of a group, or the reason why it is refused."""
    if group.broken is not None:
        return f"broken tar: {group.broken}"
    if group.duplicate is not None:
        return f"two members named .{group.duplicate}"
    if not group.whole:
        return "broken tar: it ends before the sample's last member"
    if len(group.images) > 1:
        return f"more than one picture: {', '.join(group.images)}"
    label = group.members["cls"]
    assert label is not None
    text = label.decode("utf-8", "replace").strip()
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else f"label is not a number: {text[:40]!r}"


def _read(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    try:
        member = tar.extractfile(info)
        assert member is not None
        data = member.read()
    except _BROKEN as error:
        raise tarfile.ReadError(f"{info.name}: {_why_broken(error)}") from error
    if len(data) != info.size:
        raise tarfile.ReadError(f"{info.name}: {len(data)} of {info.size} bytes")
    return data


def read_samples(shard: str, num_classes: int, on_bad: OnBad) -> Iterator[Sample]:
    """Read and decode one shard sample by sample, in the tar's order.

    Args:
        shard: Path or URL of a tar.
        num_classes: Labels must be 0 to num_classes - 1.
        on_bad: Called for each refused sample; reading goes on with the next one. Not always in the tar's order: what
            a key lacks is known only at the end.

    Raises:
        ValueError: When the shard cannot be read at all, now or from some byte on: that says nothing about its samples.
    """
    with open_shard(shard) as f:
        try:
            tar = open_tar(f)
        except tarfile.ReadError:  # its own words are those of four compressions
            on_bad(BadSample("", 0, "not a tar"))
            return
        for group, class_id in labelled(tar, on_bad, ("cls", *IMAGE_EXTENSIONS)):
            if not 0 <= class_id < num_classes:
                reason = f"label is outside the class list (0 to {num_classes - 1}): {class_id}"
                on_bad(BadSample(group.key, group.offset, reason))
                continue
            data = group.members[group.images[0]]
            assert data is not None
            try:
                image = decode_rgb(data)
            except RefusedPicture as error:
                on_bad(BadSample(group.key, group.offset, str(error)))
            else:
                yield Sample(group.key, class_id, image, group.offset)


def index_shard(shard: str, num_classes: int) -> ShardInfo:
    """Count a shard's labelled images from its member table and labels; pictures are not decoded.

    Raises:
        ValueError: When the shard cannot be read, or when a label is outside the class list: counting it into another
            class, or leaving it out, would both be the silent mistake that ruins a distilled set.
    """
    digest = hashlib.blake2b(digest_size=16)
    images: Counter[int] = Counter()

    def on_member(info: tarfile.TarInfo) -> None:
        digest.update(f"{info.name}:{info.size}:{info.mtime}:{info.chksum};".encode("utf-8", "surrogateescape"))

    with open_shard(shard) as f:
        size = f.seek(0, io.SEEK_END)
        f.seek(0)
        try:
            tar = open_tar(f)
        except tarfile.ReadError:
            return ShardInfo(shard, 0, size, ClassCounts({}), "not-a-tar")
        for group, class_id in labelled(tar, lambda bad: digest.update(repr(bad).encode()), ("cls",), on_member):
            if not 0 <= class_id < num_classes:
                raise ValueError(
                    f"{shard}: sample {group.key}: label {class_id} is outside the class list "
                    f"(0 to {num_classes - 1}); check that dataset.classes belongs to dataset.path (one entry for each "
                    "label)"
                )
            digest.update(str(class_id).encode())
            images[class_id] += 1
    return ShardInfo(shard, sum(images.values()), size, ClassCounts(images), digest.hexdigest())


def load_arrays(
    shards: Iterable[str], size: int, num_classes: int, on_bad: OnBad | None = None, resize: Resize = "squash"
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Decode whole shards into memory.

    Returns:
        images uint8 [N, 3, size, size], class_ids int64 [N], keys (N strings), in shard order.
    """
    images, class_ids, keys = [], [], []
    for shard in shards:
        for sample in read_samples(shard, num_classes, on_bad or (lambda bad: None)):
            images.append(to_square(sample.image, size, resize).transpose(2, 0, 1))
            class_ids.append(sample.class_id)
            keys.append(sample.key)
    stacked = np.stack(images) if images else np.empty((0, 3, size, size), np.uint8)
    return stacked, np.asarray(class_ids, np.int64), keys


def write_tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar whose bytes depend on names and contents only (no times, owners or modes of this machine)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mode = 0o644
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()
