"""What every labelled image collection is to `prepare`: a survey of names, and the bytes behind some of them."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

import fsspec
import numpy as np
import numpy.typing as npt

from ddoq_ray.data.picture_kinds import HEAD_BYTES, READ, signature, unread
from ddoq_ray.data.pictures import FORMATS as READ_FORMATS
from ddoq_ray.data.pictures import IMAGE_EXTENSIONS, tiff_words
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.quarantine import Refusal
from ddoq_ray.storage.records import ClassInfo

NO_IMAGE = "no image extension"  # and no image by its first bytes
LEFTOVER = "hidden, or left by the system"
NO_LABEL = "no label"
NO_LABEL_IN_TABLE = "no label in the metadata"
NO_CLASS_IMAGE = "class folder without an image"
OTHER_SPLIT = "of a split that is not used"
MASK = "mask of an image beside it"
# Kinds of refusal by which no labelled image is lost: they are told, and are no damage that max_bad_fraction limits.
HARMLESS = frozenset((NO_IMAGE, LEFTOVER, NO_LABEL, NO_LABEL_IN_TABLE, NO_CLASS_IMAGE, OTHER_SPLIT, MASK))
# Pillow's word for a format -> the extension that a file of it gets in a shard if its own is none of the usual.
_EXTENSIONS = {
    "PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "BMP": "bmp", "DIB": "bmp", "TIFF": "tif", "PPM": "ppm",
    "GIF": "gif",
}  # fmt: skip
_USUAL = IMAGE_EXTENSIONS[:9]


@dataclass
class Listing:
    """The samples of one split by name; no image is in it.

    Attributes:
        names: Where each sample is, in the source's own words; sorted, each once.
        class_ids: int32 [N].
        sizes: int64 [N], bytes of each sample, or a fixed guess where telling would mean reading it.
        refused: What was refused by its name alone.
    """

    names: list[str]
    class_ids: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int64]
    refused: list[Refusal] = field(default_factory=list)


@dataclass
class Survey:
    """A collection before any image of it is read; `notes` are what its owner should know of how it was read."""

    classes: list[ClassInfo]
    train: Listing
    val: Listing | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """One image file's bytes; `extension` is None where the source does not name one."""

    data: bytes
    extension: str | None = None


class Source(ABC):
    """A collection; small and picklable, made of paths and options."""

    @abstractmethod
    def survey(self) -> Survey:
        """Names and labels of everything there.

        Raises:
            ValueError: When the collection is missing, empty, or its classes are ambiguous.
        """

    @abstractmethod
    def read(self, split: str, names: Sequence[str], scratch: Folder) -> Iterator[Picture | Refusal]:
        """The images of some names of a split, one by one and in their order."""

    def containers(self) -> list[str]:
        """Files that must be unpacked before single samples of them can be read; usually none."""
        return []

    def unpack(self, container: int, scratch: Folder) -> None:
        """Publish in `scratch` what `read` needs of the container with that number. Running it twice is harmless."""
        raise AssertionError("this source has no containers")


def harmless(refusal: Refusal) -> bool:
    """Whether no labelled image is lost by it."""
    return refusal.kind in HARMLESS


def no_image(picture: Picture) -> str | None:
    """Why bytes are no image, by their header; None when they may be one. Decoding is the encode stage's."""
    if not picture.data:
        return "empty file"
    kind = _header(picture.data)
    if kind is None:
        kind = signature(picture.data[:HEAD_BYTES])
        damaged = f"damaged, or cut off: it begins as {kind}" if kind in READ else ""
        return unread(picture.data) or tiff_words(picture.data) or damaged or "not an image in a known format"
    if not _keeps_name(picture) and kind not in _EXTENSIONS:
        return f"image format {kind} is not one that is read"
    return None


def extension_of(picture: Picture) -> str:
    """The extension that the image has in a shard: its own in lower case if it is usual, else that of its format.

    Decoding goes by content, but other readers of shards know the usual names only.
    """
    if _keeps_name(picture):
        return str(picture.extension).lower()
    return _EXTENSIONS[str(_header(picture.data))]


def _keeps_name(picture: Picture) -> bool:
    return picture.extension is not None and picture.extension.lower() in _USUAL


def _header(data: bytes) -> str | None:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures: whether one is too large is decided where it is decoded
        try:
            with Image.open(io.BytesIO(data), formats=READ_FORMATS) as image:
                return image.format
        except Image.DecompressionBombError:
            return "PNG"  # it has a header, and that is all that is asked here
        except Exception:  # Pillow raises many kinds for a broken header
            return None


def image_extension(name: str) -> str | None:
    """A file name's extension when it is an image's, as written; else None."""
    stem, dot, extension = name.rpartition("/")[2].rpartition(".")
    return extension if dot and stem and extension.lower() in IMAGE_EXTENSIONS else None


@contextlib.contextmanager
def looking_at(asked: str) -> Iterator[None]:
    """What a disk, a network or a store's library says of a place becomes the user's to mend.

    Args:
        asked: The key and the place, for the error.

    Raises:
        ValueError: With its words.
    """
    try:
        yield
    except Exception as error:
        library = type(error).__module__.partition(".")[0] not in ("builtins", "ddoq_ray")
        if not isinstance(error, OSError) and not ("://" in asked and library):
            raise
        raise ValueError(
            f"{asked} cannot be looked at: {type(error).__name__}: {error}; check the address and its permissions, or "
            "copy what is there to a disk"
        ) from error


def absolute(path: str) -> str:
    """A path that means the same in every process of this machine; URLs are kept.

    Raises:
        ValueError: For a URL whose protocol nobody knows, or needs a library that is not there.
    """
    if path.startswith("pipe:"):
        raise ValueError(f"{path}: commands are not run; give the address itself (https://, s3://, gs://), or a path")
    if "::" in path and "://" not in path:
        raise ValueError(
            f"{path}: fsspec takes a path with :: for a chain of several; rename the folder, or link to it"
        )
    if "://" in path and not path.lower().startswith(("file://", "local://")):
        if path.endswith("://"):
            raise ValueError(f"{path} names no place in the store; expected a bucket and a path in it")
        try:
            fsspec.get_filesystem_class(path.partition("://")[0].partition("::")[0])
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"{path}: {error}; expected a local path, or a URL such as s3://, gs:// or https://"
            ) from None
        return path.rstrip("/")
    place = str(fsspec.core.url_to_fs(path)[1])
    if "://" in path and not os.path.exists(place):
        return unquote(place)  # file:///photos%20of%202023
    return place


def sorted_listing(names: list[str], class_ids: list[int], sizes: list[int], refused: list[Refusal]) -> Listing:
    """A listing in the order of its names, whatever the order in which a file system gave them."""
    order = sorted(range(len(names)), key=names.__getitem__)
    return Listing(
        [names[i] for i in order],
        np.asarray([class_ids[i] for i in order], np.int32),
        np.asarray([sizes[i] for i in order], np.int64),
        sorted(refused, key=lambda r: (r.name, r.reason)),
    )
