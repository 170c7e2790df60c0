"""A distilled dataset on disk, written and read back: images, labels and weights.

The folder is a plain WebDataset (``<class_id>-<centroid_id>.{png,cls,json}``, jpg or webp in the place of png), so that
the webdataset library and Hugging Face datasets read it too; this module is the short way.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, Literal

import numpy as np
from PIL import Image

from ddoq_ray.data.pictures import IMAGE_EXTENSIONS, RefusedPicture
from ddoq_ray.data.samples import decode_rgb, encode_png, list_shards, to_square
from ddoq_ray.data.tar_headers import Header
from ddoq_ray.data.tar_samples import members_of
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.local_copies import local_copies
from ddoq_ray.storage.transport import open_shard

PictureFormat = Literal["png", "jpeg", "webp"]
EXTENSIONS: dict[PictureFormat, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}


@dataclass(frozen=True)
class DistilledImage:
    """One image of a distilled set.

    Attributes:
        weight: The mass of its Voronoi cell; sums to 1 in a class.
        attempt: How often it was made anew.
    """

    key: str
    class_id: int
    centroid_id: int
    weight: float
    prompt: str
    data: bytes
    shard: str = ""
    attempt: int = 0

    @property
    def picture(self) -> Image.Image:
        """The decoded picture, RGB.

        Raises:
            ValueError: It cannot be decoded. A set is made whole: leaving a picture out would move all that follow.
        """
        try:
            return decode_rgb(self.data)
        except RefusedPicture as error:
            raise ValueError(
                f"{self.shard}: the picture of {self.key} cannot be read ({error}); an image set is used whole: remove "
                "that file and the manifest.json beside it, and run again the stage that made it (synthesize)"
            ) from None


@dataclass(frozen=True)
class NewImage:
    """An image to write.

    Attributes:
        seed: What its noise, or the draw of real images, came from.
        data: The encoded picture (`encode_picture`).
        facts: What else is told.
        extension: Of the picture's file.
    """

    class_id: int
    centroid_id: int
    weight: float
    prompt: str
    seed: int
    data: bytes
    facts: Mapping[str, float | int] = field(default_factory=dict)
    extension: str = "png"

    @property
    def key(self) -> str:
        return f"{self.class_id:05d}-{self.centroid_id:04d}"


def encode_picture(pixels: np.ndarray, form: PictureFormat = "png", quality: int = 95) -> bytes:
    """A picture uint8 [H, W, 3] as a file.

    Args:
        quality: Of jpeg, whose colours keep their full resolution, and of webp: 1 to 100.
    """
    if form == "png":
        return encode_png(pixels)
    out = io.BytesIO()
    options: dict[str, Any] = {"subsampling": 0} if form == "jpeg" else {"method": 4}
    Image.fromarray(pixels).save(out, format=form, quality=quality, **options)
    return out.getvalue()


def write_images(images: Folder, name: str, made: Iterable[NewImage]) -> dict[str, Any]:
    """Publish an image shard, and give its record. The same images are the same bytes, whoever writes them."""
    members = []
    for image in made:
        facts = {
            "centroid_id": image.centroid_id,
            "weight": image.weight,
            "prompt": image.prompt,
            "seed": image.seed,
            **image.facts,
        }
        members += [
            (f"{image.key}.{image.extension}", image.data),
            (f"{image.key}.cls", str(image.class_id).encode()),
            (f"{image.key}.json", json.dumps(facts).encode()),
        ]
    tar = write_tar(members)
    images.publish(f"{name}.tar", tar)
    return shard_record(name, len(members) // 3, tar)


def shard_record(name: str, images: int, tar: bytes) -> dict[str, Any]:
    """What a manifest says of an image shard."""
    return {"name": name, "images": images, "bytes": len(tar), "sha256": digest_of(tar)}


def read_images(shards: list[str]) -> Iterator[DistilledImage]:
    """The images of image shards, in order.

    Raises:
        ValueError: When a shard is not one that `synthesize` (or a baseline) wrote.
    """
    for shard in shards:
        with _naming(shard):
            yield from _read_shard(shard)


@contextlib.contextmanager
def _naming(shard: str) -> Iterator[None]:
    """What is no tar is told by its shard's name."""
    try:
        yield
    except tarfile.ReadError as error:
        raise ValueError(f"{shard}: {error}; expected a whole tar of images, made by synthesize") from error


def _read_shard(shard: str) -> Iterator[DistilledImage]:
    with open_shard(shard) as f:
        for image, _, _ in _samples(shard, f):
            yield image


def _samples(shard: str, file: IO[bytes], *, pictures: bool = True) -> Iterator[tuple[DistilledImage, int, int]]:
    """The images of a tar, with the first byte of each one's members and the one after the last.

    Args:
        pictures: Whether `data` is read; empty otherwise.
    """
    with tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as tar:
        members: dict[str, bytes] = {}
        key, start, end = ("", ""), 0, 0
        for part, info in members_of(tar):
            folder, _, name = info.name.removeprefix("./").rpartition("/")
            stem, _, extension = name.partition(".")
            if not info.isreg() or not stem:  # a folder, or what Macs leave beside each file
                continue
            if (folder, stem) != key and members:
                yield _image(shard, key[1], members), start, end
                members = {}
            if not members:
                start = info.offset
            key, end = (folder, stem), part.offset
            extension = extension.lower()
            member = part.extractfile(info) if pictures or extension in ("cls", "json") else None
            members[extension] = member.read() if member else b""
        if members:
            yield _image(shard, key[1], members), start, end


def _image(shard: str, key: str, members: dict[str, bytes]) -> DistilledImage:
    picture = next((members[e] for e in IMAGE_EXTENSIONS if e in members), None)
    if picture is None or "json" not in members or "cls" not in members:
        raise ValueError(
            f"{shard}: sample {key} has {sorted(members)}; a distilled sample has an image, a .cls and a .json"
        )
    try:
        facts, class_id = json.loads(members["json"]), int(members["cls"].decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{shard}: the .json or .cls of {key} cannot be read ({error})") from None
    if not isinstance(facts, dict) or "centroid_id" not in facts or "weight" not in facts:
        raise ValueError(f"{shard}: {key}.json has {sorted(facts)}; a distilled sample has centroid_id and weight")
    try:
        number, weight = int(facts["centroid_id"]), float(facts["weight"])
    except (ValueError, TypeError):
        number, weight = 0, float("nan")
    if class_id < 0:
        raise ValueError(f"{shard}: {key}.cls is {class_id}; expected the number of a class, 0 or more")
    if not 0 <= weight <= 1:  # false for NaN too
        raise ValueError(
            f"{shard}: {key}.json has centroid_id {facts['centroid_id']!r} and weight {facts['weight']!r}; expected a "
            "number, and the mass of a Voronoi cell, 0 to 1"
        )
    return DistilledImage(
        key, class_id, number, weight, facts.get("prompt", ""), picture, shard, facts.get("attempt", 0)
    )


@dataclass(frozen=True)
class ImageArrays:
    """An image set in memory.

    Attributes:
        images: uint8 [N, 3, H, W].
        class_ids: int64 [N].
        weights: float64 [N], companion weights; they sum to 1 within each class.
    """

    images: np.ndarray
    class_ids: np.ndarray
    weights: np.ndarray


Make = Callable[[tuple[int, ...]], np.ndarray]  # an array uint8 of a shape


def load_image_arrays(shards: list[str], size: int, side: int | None = None, make: Make | None = None) -> ImageArrays:
    """Decode a distilled set once: 3 x H x W bytes an image, and one picture beside them.

    Views are cut from what is stored, so that nothing is shrunk before it is cropped: pictures that are all of one size
    keep it, unless they are smaller than the views: then they are enlarged once, here. Where sizes differ, as those of
    picked real images may, each picture becomes a square of `side`.

    Args:
        size: Side of the views that are cut.
        side: See above; by default `size`.
        make: Makes the array uint8 of a shape that is filled, such as a mapped file; by default in memory.

    Raises:
        ValueError: When there is no image, or one cannot be read.
    """
    class_ids, weights = [], []
    for shard in shards:
        with _naming(shard), open_shard(shard) as f:
            for item, _, _ in _samples(shard, f, pictures=False):
                class_ids.append(item.class_id)
                weights.append(item.weight)
    if not class_ids:
        raise ValueError(f"no image in {shards[:3]}; expected image shards made by synthesize")
    make = make or partial(np.empty, dtype=np.uint8)
    images = _filled(shards, len(class_ids), size, make)
    if images is None:
        images = _squares(shards, len(class_ids), size if side is None else side, make)
    return ImageArrays(images, np.asarray(class_ids, np.int64), np.asarray(weights, np.float64))


def _filled(shards: list[str], count: int, size: int, make: Make) -> np.ndarray | None:
    """The pictures, all of one size, and enlarged to `size` where that is smaller; None where sizes differ."""
    images, shape = np.empty(0, np.uint8), (0, 0)
    for i, item in enumerate(read_images(shards)):
        picture = item.picture
        if i == 0:
            shape = picture.size
            width, height = shape if min(shape) >= size else (size, size)
            images = make((count, 3, height, width))
        if picture.size != shape:
            return None
        images[i] = (np.asarray(picture) if min(shape) >= size else to_square(picture, size)).transpose(2, 0, 1)
    return images


def _squares(shards: list[str], count: int, side: int, make: Make) -> np.ndarray:
    images = make((count, 3, side, side))
    for i, item in enumerate(read_images(shards)):
        images[i] = to_square(item.picture, side).transpose(2, 0, 1)
    return images


class DistilledDataset:
    """A torch map-style dataset of (image, label, weight), for any number of DataLoader's workers.

    `image` is a uint8 tensor [3, H, W] (or what `transform` makes of the PIL picture), `label` the class_id,
    `weight` K times the mass of the image's Voronoi cell: mean 1 in a class, ready to multiply a loss
    (Algorithm 4, line 3). Images are read from their tars as they are asked for: what is held, and pickled for a
    worker, is some 40 bytes an image. Shards of a store are copied to this machine's disk first.

    Attributes:
        shards: The tars, as they were given.
        class_ids: int64 [N].
        weights: float64 [N], masses of the Voronoi cells, which sum to 1 in a class; a sampler that draws by them draws
            every class as often as any other.
        ipc: class_id -> its images.
    """

    def __init__(
        self, shards: list[str], transform: Callable[[Any], Any] | None = None, cache: str | None = None
    ) -> None:
        """`cache`: a folder for copies of shards of a store; by default one that goes with the dataset."""
        self.shards, self.transform = shards, transform
        self._files, self._folder = local_copies(shards, cache)
        columns: list[array[Any]] = [array(kind) for kind in "qdiqq"]
        for number, (shard, file) in enumerate(zip(shards, self._files, strict=True)):
            with _naming(shard), open(file, "rb") as f:
                for image, start, end in _samples(shard, f, pictures=False):
                    for column, value in zip(columns, (image.class_id, image.weight, number, start, end), strict=True):
                        column.append(value)
        if not columns[0]:
            raise ValueError(f"no image in {shards[:3]}; expected image shards made by synthesize")
        self.class_ids, self.weights, self._number, self._start, self._end = map(np.array, columns)
        found, counts = np.unique(self.class_ids, return_counts=True)
        self.ipc: dict[int, int] = dict(zip(found.tolist(), counts.tolist(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_folder": None}  # the copies are the first one's to remove

    def __len__(self) -> int:
        return len(self.class_ids)

    def item(self, index: int) -> DistilledImage:
        """An image with all that is known of it.

        Raises:
            ValueError: Its shard is no longer what it was.
        """
        shard, start = self.shards[self._number[index]], int(self._start[index])
        with _naming(shard):
            with open(self._files[self._number[index]], "rb") as f:
                f.seek(start)
                data = f.read(int(self._end[index]) - start)
            for image, _, _ in _samples(shard, io.BytesIO(data)):
                if (image.class_id, image.weight) == (self.class_ids[index], self.weights[index]):
                    return image
        raise ValueError(f"{shard} has changed since it was loaded; load the set again")

    def __getitem__(self, index: int) -> tuple[Any, int, float]:
        import torch

        item = self.item(index)
        picture = item.picture
        image = self.transform(picture) if self.transform else torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return image, item.class_id, item.weight * self.ipc[item.class_id]


def image_tars(path: str) -> list[str]:
    """The image shards of a run directory, of its images/ folder, or of a glob.

    Raises:
        ValueError: There are none.
    """
    folder = Folder(path)
    if folder.names("images/*.tar"):
        path = folder.path("images")
    listed = [s for s in list_shards(path, key="path") if not s.rpartition("/")[2].startswith(".")]
    if not listed:
        raise ValueError(f"path={path}: only hidden files; expected image shards made by synthesize")
    return listed
