"""Labelled samples in WebDataset shards: found, read one by one, decoded, written.

No Ray here: the encode stage, the training commands and the evaluation all read through this file.
A sample that cannot be used is never dropped silently: it is handed to `on_bad` with its key, its byte
offset and the reason.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import braceexpand
import fsspec
import numpy as np
import webdataset as wds
from PIL import Image, ImageOps, UnidentifiedImageError

from ddoq_ray.records import ClassCounts, ClassInfo, ShardInfo

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "ppm", "pgm")


@dataclass(frozen=True)
class Sample:
    """A decoded sample: key, class_id, RGB picture, byte offset of its first member."""

    key: str
    class_id: int
    image: Image.Image
    offset: int


@dataclass(frozen=True)
class BadSample:
    """A refused sample: key, byte offset of its first member, reason."""

    key: str
    offset: int
    reason: str


@dataclass(frozen=True)
class _Group:
    key: str
    offset: int
    members: dict[str, tarfile.TarInfo]
    duplicate: str | None


def list_shards(path: str, *, key: str = "dataset.path") -> list[str]:
    """The tar shards of a folder, a glob or a brace pattern, sorted by name.

    Args:
        path: A folder (its ``*.tar``), a glob, or a brace pattern such as ``train-{0000..0099}.tar``;
            local or a URL that fsspec opens.
        key: The configuration key to name in an error.

    Raises:
        ValueError: When the path does not exist or holds no shard.
    """
    found: list[str] = []
    for pattern in braceexpand.braceexpand(path):
        fs, root = fsspec.core.url_to_fs(pattern)
        names: list[str] = []
        if any(ch in root for ch in "*?["):
            names = sorted(fs.glob(root))
        elif fs.isdir(root):
            names = sorted(fs.glob(root.rstrip("/") + "/*.tar"))
            if not names:
                raise ValueError(f"{key}={path}: the folder {root} holds no *.tar shard; expected WebDataset shards")
        elif fs.exists(root):
            names = [root]
        else:
            raise ValueError(
                f"{key}={path}: {root} does not exist; expected a folder, glob or brace pattern of "
                "WebDataset tar shards"
            )
        found += [str(fs.unstrip_protocol(n)) if fs.protocol not in ("file", ("file", "local")) else n for n in names]
    if not found:
        raise ValueError(f"{key}={path}: no shard matches; expected WebDataset tar shards (*.tar)")
    return [n.removeprefix("file://") for n in found]


def read_classes(path: str) -> list[ClassInfo]:
    """Read ``classes.json``: a list of names, or of objects with the fields of `ClassInfo`.

    Raises:
        ValueError: When the file is missing, is not such a list, or does not number its classes 0 to C - 1.
    """
    try:
        with fsspec.open(path, "rb") as f:
            rows = json.load(f)
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
            classes.append(ClassInfo(i, row, row))
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
            name = str(row["name"])
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


def _groups(tar: tarfile.TarFile, on_bad: Callable[[BadSample], None]) -> Iterator[_Group]:
    """Consecutive members with one key, by the webdataset library's naming (split at the first dot)."""
    key: str | None = None
    offset, position = 0, 0
    members: dict[str, tarfile.TarInfo] = {}
    duplicate: str | None = None
    try:
        for info in tar:
            position = info.offset
            if not info.isreg():
                continue
            prefix, suffix = wds.tariterators.base_plus_ext(info.name)
            if prefix is None or Path(prefix).name == "":
                on_bad(BadSample(info.name, info.offset, "member without an extension"))
                continue
            if prefix != key:
                if key is not None:
                    yield _Group(key, offset, members, duplicate)
                key, offset, members, duplicate = prefix, info.offset, {}, None
            suffix = suffix.lower()
            if suffix in members:
                duplicate = suffix
            members[suffix] = info
        # tarfile takes any block that is no header for the end; only zeros, or the end of the file, are one.
        position = tar.offset
        assert tar.fileobj is not None
        tar.fileobj.seek(position)
        block = tar.fileobj.read(tarfile.BLOCKSIZE)
        if block.strip(b"\0") or 0 < len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("no member header there")
    except (tarfile.ReadError, EOFError, zlib.error) as error:
        if key is not None:
            yield _Group(key, offset, members, duplicate)
            key = None
        on_bad(BadSample("", position, f"broken tar: from byte {position} on nothing can be read: {error}"))
    if key is not None:
        yield _Group(key, offset, members, duplicate)


def _label(tar: tarfile.TarFile, group: _Group, num_classes: int) -> int | str:
    """The group's class_id, or the reason why it has none."""
    if group.duplicate is not None:
        return f"two members named .{group.duplicate}"
    if "cls" not in group.members:
        return "no label (.cls)"
    text = _read(tar, group.members["cls"]).decode("utf-8", "replace").strip()
    try:
        class_id = int(text)
    except ValueError:
        return f"label {text[:40]!r} is not an integer"
    if not 0 <= class_id < num_classes:
        return f"label {class_id} is outside the class list (0 to {num_classes - 1})"
    return class_id


def _read(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    member = tar.extractfile(info)
    if member is None:
        raise tarfile.ReadError(f"{info.name} is not a file")
    data = member.read()
    if len(data) != info.size:
        raise tarfile.ReadError(f"{info.name}: {len(data)} of {info.size} bytes")
    return data


def _image_member(group: _Group) -> tarfile.TarInfo | None:
    return next((group.members[e] for e in IMAGE_EXTENSIONS if e in group.members), None)


def decode_rgb(data: bytes) -> Image.Image:
    """Decode to 8-bit RGB: EXIF orientation applied, 16-bit grey scaled, palette and alpha resolved on black."""
    image: Image.Image = Image.open(io.BytesIO(data))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")  # the colour of a transparent pixel is whatever the editor left there
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")


def read_samples(shard: str, num_classes: int, on_bad: Callable[[BadSample], None]) -> Iterator[Sample]:
    """Read and decode one shard sample by sample, in the tar's order.

    Args:
        shard: Path or URL of a tar.
        num_classes: Labels must be 0 to num_classes - 1.
        on_bad: Called for each refused sample; reading goes on with the next one.
    """
    with fsspec.open(shard, "rb") as f:
        try:
            tar = tarfile.open(fileobj=f, mode="r:*")  # noqa: SIM115 (closed with its file object)
        except tarfile.ReadError:  # its own words are those of four compressions
            on_bad(BadSample("", 0, "not a tar"))
            return
        for group in _groups(tar, on_bad):
            try:
                class_id = _label(tar, group, num_classes)
                if isinstance(class_id, str):
                    on_bad(BadSample(group.key, group.offset, class_id))
                    continue
                info = _image_member(group)
                if info is None:
                    names = ", ".join(sorted(group.members))
                    on_bad(BadSample(group.key, group.offset, f"no image among its members ({names})"))
                    continue
                data = _read(tar, info)
            except tarfile.ReadError as error:
                on_bad(BadSample(group.key, group.offset, f"broken tar: {error}"))
                continue
            try:
                image = decode_rgb(data)
            except UnidentifiedImageError:  # its own words hold a memory address, different in every run
                on_bad(BadSample(group.key, group.offset, "undecodable image: not in any known format"))
                continue
            except Exception as error:  # PIL raises many kinds; each is one bad picture, never a reason to stop
                on_bad(BadSample(group.key, group.offset, f"undecodable image: {type(error).__name__}: {error}"))
                continue
            yield Sample(group.key, class_id, image, group.offset)


def index_shard(shard: str, num_classes: int) -> ShardInfo:
    """Count a shard's labelled images from its member table and labels; pictures are not decoded.

    Raises:
        ValueError: When a label is outside the class list: counting it into another class, or leaving it out,
            would both be the silent mistake that ruins a distilled set.
    """
    digest = hashlib.blake2b(digest_size=16)
    images: Counter[int] = Counter()
    fs, root = fsspec.core.url_to_fs(shard)
    with fsspec.open(shard, "rb") as f:
        try:
            tar = tarfile.open(fileobj=f, mode="r:*")  # noqa: SIM115
        except tarfile.ReadError:
            return ShardInfo(shard, 0, int(fs.size(root)), ClassCounts({}), "not-a-tar")
        for group in _groups(tar, lambda bad: digest.update(repr(bad).encode())):
            for name, info in sorted(group.members.items()):
                digest.update(f"{group.key}.{name}:{info.size}:{info.mtime}:{info.chksum};".encode())
            try:
                class_id = _label(tar, group, num_classes)
            except tarfile.ReadError:
                continue
            digest.update(str(class_id).encode())
            if isinstance(class_id, str):
                if "outside the class list" in class_id:
                    raise ValueError(
                        f"{shard}: sample {group.key}: {class_id}; check that dataset.classes belongs to "
                        "dataset.path (one entry for each label)"
                    )
            elif _image_member(group) is not None:
                images[class_id] += 1
    return ShardInfo(shard, sum(images.values()), int(fs.size(root)), ClassCounts(images), digest.hexdigest())


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """Squash to size x size by antialiased bicubic resampling (as D4M resizes): uint8 [size, size, 3]."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


def load_arrays(
    shards: Iterable[str], size: int, num_classes: int, on_bad: Callable[[BadSample], None] | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Decode whole shards into memory.

    Returns:
        images uint8 [N, 3, size, size], class_ids int64 [N], keys (N strings), in shard order.
    """
    images, class_ids, keys = [], [], []
    for shard in shards:
        for sample in read_samples(shard, num_classes, on_bad or (lambda bad: None)):
            images.append(to_square(sample.image, size).transpose(2, 0, 1))
            class_ids.append(sample.class_id)
            keys.append(sample.key)
    stacked = np.stack(images) if images else np.empty((0, 3, size, size), np.uint8)
    return stacked, np.asarray(class_ids, np.int64), keys


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of uint8 [H, W, 3] (or [H, W])."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", compress_level=6)
    return out.getvalue()


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
