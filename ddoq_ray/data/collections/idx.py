"""IDX files: a block of images and a block of labels, as MNIST and Fashion-MNIST come."""

from __future__ import annotations

import gzip
import posixpath
import zlib
from collections.abc import Iterator, Sequence

import fsspec
import numpy as np

from ddoq_ray.data.collections.classes import given_classes, numbered_classes
from ddoq_ray.data.collections.listing import NO_LABEL, Listing, Picture, Source, Survey, absolute
from ddoq_ray.data.pictures import encode_png
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.quarantine import Refusal
from ddoq_ray.storage.transport import read_file

# Split -> (images, labels) by the files' usual names, each possibly followed by .gz.
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def is_training_idx(name: str) -> bool:
    """Whether a file is the training images, or a folder in which some archives have that file."""
    return name.removesuffix(".gz").replace(".idx", "-idx") == FILES["train"][0]


_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4"}


class Idx(Source):
    """A folder with train-images-idx3-ubyte[.gz] and its labels, and t10k-... as the validation part.

    The files hold no class names: MNIST's and Fashion-MNIST's look alike. They come from a classes.json.
    """

    def __init__(self, path: str, classes: str | None) -> None:
        self.root = absolute(path)
        self.classes = classes

    def survey(self) -> Survey:
        train, val = self._listing("train"), self._listing("val") if self._find(FILES["val"][0]) else None
        notes = []
        if not len(train.names):
            raise ValueError(f"{self.root}: no train image has a label in {FILES['train'][1]}")
        if val is not None and not len(val.names):
            notes = [f"none of {len(val.refused):,} validation images has a label: they cannot be used to measure"]
            train.refused, val = [*train.refused, *val.refused], None
        given = given_classes(self.classes, posixpath.join(self.root, "classes.json"))
        labels = {int(c) for split in (train, val) if split is not None for c in np.unique(split.class_ids)}
        return Survey(numbered_classes(labels, None, given, self.root), train, val, notes)

    def _listing(self, split: str) -> Listing:
        images, labels = self._images(split), self._array(FILES[split][1], 1)
        if len(images) != len(labels):
            raise ValueError(f"{self.root}: {len(images)} {split} images, but {len(labels)} labels; get the files anew")
        if not len(images):
            raise ValueError(f"{self.root}: no {split} image in {FILES[split][0]}")
        size = int(np.prod(images.shape[1:]))
        # -1 is no label; as an unsigned byte it is 255, unless 254 shows that there are so many classes.
        nothing = labels == (255 if labels.dtype == np.uint8 and 254 not in labels else -1)
        names = [f"{i:09d}" for i in np.flatnonzero(~nothing)]
        refused = [Refusal(f"{FILES[split][0]}#{i:09d}", NO_LABEL) for i in np.flatnonzero(nothing)]
        return Listing(names, labels[~nothing].astype(np.int32), np.full(len(names), size, np.int64), refused)

    def read(self, split: str, names: Sequence[str], scratch: Folder) -> Iterator[Picture | Refusal]:
        images = self._images(split)
        for name in names:
            yield Picture(encode_png(images[int(name)]), "png")

    def _images(self, split: str) -> np.ndarray:
        return self._array(FILES[split][0], 3)

    def _find(self, name: str) -> str | None:
        """The file, with a dot in the place of its second dash as some archives have it, or in a folder of its name."""
        fs, root = fsspec.core.url_to_fs(self.root)
        for file in (name, name.replace("-idx", ".idx")):
            for there in (file, f"{file}.gz", f"{file}/{file}"):
                if fs.isfile(posixpath.join(root, there)):
                    return there
        return None

    def _array(self, name: str, dims: int) -> np.ndarray:
        found = self._find(name)
        if found is None:
            raise ValueError(f"dataset.path={self.root}: no {name} or {name}.gz there; expected IDX files")
        path = posixpath.join(self.root, found)
        data = read_file(path)
        if found.endswith(".gz"):
            try:
                data = gzip.decompress(data)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{path} cannot be decompressed: {error}; get it anew") from error
        return read_idx(data, dims, path)


def read_idx(data: bytes, dims: int, where: str) -> np.ndarray:
    """The array of an IDX file: two zeros, the type, the number of dimensions, their sizes, the data.

    Pixels are unsigned bytes; labels, of one dimension, may be of any whole type.

    Raises:
        ValueError: When it is another kind of file, or its length is not what its header says.
    """
    head = 4 + 4 * dims
    known = _TYPES if dims == 1 else {8: _TYPES[8]}
    if data[:2] != bytes(2) or len(data) < head or data[2] not in known or data[3] != dims:
        raise ValueError(f"{where} is not an IDX file of unsigned bytes in {dims} dimensions: it starts {data[:4]!r}")
    shape = tuple(int(n) for n in np.frombuffer(data[4:head], ">u4"))
    dtype = np.dtype(known[data[2]])
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(data) - head != count:
        raise ValueError(f"{where}: {len(data) - head:,} bytes of data for {shape}, expected {count:,}; get it anew")
    array = np.frombuffer(data, dtype, offset=head).reshape(shape)
    return array if dtype == np.uint8 else array.astype(np.int64)
