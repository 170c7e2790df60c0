"""Places that hold no collection: said by what is there instead, each with the way out."""

from __future__ import annotations

import glob
import os
import posixpath
from collections import Counter
from collections.abc import Sequence

import braceexpand
import fsspec

from ddoq_ray.data.collections.archives import TARS, is_archive
from ddoq_ray.data.collections.classes import shown
from ddoq_ray.data.collections.contents import not_images
from ddoq_ray.data.collections.idx import is_training_idx
from ddoq_ray.data.collections.listing import absolute, image_extension
from ddoq_ray.data.collections.splits import split_of
from ddoq_ray.data.collections.tree import leftover, top, walk
from ddoq_ray.data.tar_samples import open_samples
from ddoq_ray.storage.quarantine import Refusal
from ddoq_ray.storage.transport import open_shard

EXPECTED = (
    "expected class folders of images (<class>/<image files>, or train/ and val/ of such), a metadata.csv with "
    "file_name and label, WebDataset shards (*.tar), *.parquet or *.arrow files, or MNIST's IDX files "
    "(train-images-idx3-ubyte and its labels)"
)
# Files of many images that other programs write: an ending -> what it is.
_OTHERS = {
    "npz": "NumPy's arrays", "npy": "NumPy's arrays", "mat": "MATLAB's arrays", "h5": "HDF5", "hdf5": "HDF5",
    "tfrecord": "TFRecord", "tfrecords": "TFRecord", "tfrec": "TFRecord", "mdb": "LMDB", "lmdb": "LMDB",
    "beton": "FFCV's file", "rec": "MXNet's RecordIO", "mds": "a shard of MosaicML's Streaming", "pkl": "a pickle",
    "pickle": "a pickle", "pt": "PyTorch's file", "pth": "PyTorch's file", "bin": "a file of raw bytes",
    "feather": "a Feather file", "lance": "a Lance table",
}  # fmt: skip
_WRITE = "write its images as files in a folder for each class, or as rows of Parquet files with their bytes and labels"
_LISTS = (".csv", ".tsv", ".jsonl", ".json", ".txt", ".xlsx")


def refuse_unread(path: str) -> None:
    """Refuse what is taken for shards since nothing else is found there, and is none.

    Raises:
        ValueError: With what is there, and the way out.
    """
    place = absolute(path)
    fs, root = fsspec.core.url_to_fs(place)
    if fs.isdir(root):
        if not any(name.endswith(".tar") for name in top(place)[1]):
            _refuse_folder(path, place)
    elif "://" not in place and fs.exists(root):
        _refuse_file(path, root)
    elif "://" not in place and any(ch in path for ch in "*?[{"):
        _refuse_folders(path)


def _refuse_folders(path: str) -> None:
    """Refuse a pattern that names folders of anything but shards.

    Raises:
        ValueError: With one of them.
    """
    for pattern in braceexpand.braceexpand(path) if path.count("{") == path.count("}") else [path]:
        for place in sorted(glob.glob(pattern)):
            if os.path.isdir(place) and not any(name.endswith(".tar") for name in top(place)[1]):
                raise ValueError(
                    f"dataset.path={path} names folders without *.tar, such as {place}; a pattern names shards or "
                    "tables (*.tar, *.parquet). Of folders of images give one: make one that holds links to the class "
                    "folders of all"
                )


def refuse_other_kind(key: str, path: str) -> None:
    """Refuse a place of validation images that holds no shards where the training images are in shards.

    Raises:
        ValueError: With what is there.
    """
    place = absolute(path)
    fs, root = fsspec.core.url_to_fs(place)
    if fs.isdir(root) and not any(name.endswith(".tar") for name in top(place)[1]):
        raise ValueError(
            f"{key}={path} holds no *.tar ({there_in(place)}), but dataset.path holds shards: give validation images "
            "of the same kind (`ddoq-ray prepare` makes shards of any collection)"
        )


def there_in(place: str) -> str:
    """What is directly in a folder, in words."""
    folders, files = top(place)
    return f"there: {shown([*(f'{name}/' for name in folders), *files]) or 'nothing'}"


def _refuse_file(path: str, place: str) -> None:
    """Refuse a single file that is an image, a list of images, another program's, or anything but a tar.

    Raises:
        ValueError: With the way out.
    """
    if image_extension(path) is not None:
        raise ValueError(f"dataset.path={path} is one image: give the folder that holds the class folders")
    if path.lower().endswith(_LISTS):
        raise ValueError(
            f"dataset.path={path} is a table or a list: name it metadata.csv (or .jsonl), with file_name and label, "
            "and give the folder that it lies in"
        )
    if (kind := _other_kind([path])) is not None:
        raise ValueError(f"dataset.path={path} is {kind}, which is not read: {_WRITE}; {EXPECTED}")
    if not os.path.isfile(place):
        raise ValueError(f"dataset.path={path} is a device or a pipe; {EXPECTED}")
    bad: list[Refusal] = []
    with open_shard(place) as f:
        if open_samples(f, bad.append) is None:
            raise ValueError(f"dataset.path={path} is {bad[0].reason}; {EXPECTED}")


def _refuse_folder(path: str, place: str) -> None:
    """Refuse a folder in which no kind of collection is found.

    Raises:
        ValueError: With what is there, and the way out.
    """
    _, _, files = next(walk(place))
    there = [(name, size) for name, size in files if not leftover(name)]
    none = not_images(place, there)
    images = [name for name, _ in there if name not in none]
    if images:
        raise ValueError(
            f"dataset.path={path} holds {len(images):,} images in no class folder (such as {images[0]}), so nothing "
            "says which class each is of: expected a folder for each class, or a metadata.csv with file_name and label "
            f"beside them{table_hint(place)}"
        )
    inside = sorted(
        posixpath.join(here, name) for here, _, inside in walk(place) for name, _ in inside if not leftover(name)
    )
    _refuse_shards_below(path, [name for name in inside if name.lower().endswith(TARS)])
    idx = [name for name in inside if is_training_idx(posixpath.basename(name))]
    if idx:
        raise ValueError(
            f"dataset.path={path} holds IDX files further down: give dataset.path="
            f"{posixpath.join(path, posixpath.dirname(idx[0]))}"
        )
    other = [name for name in inside if "idx3-ubyte" in posixpath.basename(name)]
    if other:
        raise ValueError(
            f"dataset.path={path} holds IDX files of other names than MNIST's ({shown(other, 3)}): give a folder "
            "in which train-images-idx3-ubyte and train-labels-idx1-ubyte (and t10k-...) are these files, or links to "
            "them"
        )
    if "data_batch_1" in (name for name, _ in there):
        raise ValueError(
            f"dataset.path={path} holds CIFAR-10's pickles: give the folder above it, with dataset=torchvision "
            "dataset.torchvision=CIFAR10"
        )
    archives = [name for name in inside if is_archive(name)]
    if archives:
        shards = " (.tar.zst of shards: decompress them by unzstd)" * any(n.endswith(".tar.zst") for n in archives)
        raise ValueError(
            f"dataset.path={path} holds archives ({shown(archives, 3)}) and no images beside them: unpack them where "
            f"they are, and give the folder again{shards}"
        )
    if (kind := _other_kind(inside)) is not None:
        raise ValueError(
            f"dataset.path={path} holds {kind} ({there_in(place)}), which is not read: {_WRITE}; {EXPECTED}"
        )
    endings = Counter(f"*.{name.rpartition('.')[2]}" for name in inside if "." in posixpath.basename(name))
    counts = ", ".join(f"{n:,} {ending}" for ending, n in endings.most_common(3))
    every = f"; in all {counts}" if counts else ""
    raise ValueError(f"dataset.path={path} holds no *.tar and no images ({there_in(place)}{every}); {EXPECTED}")


def _other_kind(names: Sequence[str]) -> str | None:
    """In words: what files of another program are, by the first ending that is known."""
    endings = [part.rpartition(".")[2].lower() for name in names for part in name.split("/") if "." in part]
    return next((_OTHERS[ending] for ending in endings if ending in _OTHERS), None)


def _refuse_shards_below(path: str, tars: Sequence[str]) -> None:
    """Refuse a folder whose tars lie in folders of it, or are named otherwise than shards are looked for.

    Raises:
        ValueError: With how to give them if they are shards.
    """
    if not tars:
        return
    folders = {split_of(f) or f: posixpath.join(path, f) for f in sorted({posixpath.dirname(t) for t in tars})}
    place = folders.get("train", posixpath.join(path, posixpath.dirname(tars[0])))
    held = folders.get("val", folders.get("test"))
    ending = tars[0][-len(next(end for end in TARS if tars[0].lower().endswith(end))) :]
    pattern = "" if ending == ".tar" else f"/*{ending}"
    given = f"dataset.path='{place.rstrip('/')}{pattern}'"
    given += f" dataset.val_path='{held}{pattern}'" if held is not None and "train" in folders else ""
    raise ValueError(
        f"dataset.path={path} holds tars ({shown(tars, 3)}), and no *.tar or images of its own: where they are shards "
        f"(<key>.jpg and <key>.cls), give {given}; where they are archives of images, unpack them where they are, and "
        "give the folder again"
    )


def table_hint(place: str) -> str:
    """A question about a file that may be the table of images without a class folder; empty without one."""
    tables = [n for n in top(place)[1] if n.lower().endswith((".csv", ".tsv", ".jsonl"))]
    tables = [n for n in tables if "submission" not in n.lower()]  # what a contest wants of its test images
    return f"; is {shown(tables, 3)} its table? Name it so, with these columns" if tables else ""
