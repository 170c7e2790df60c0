"""Places that hold no collection: said by what is there instead, each with the way out."""

from __future__ import annotations

import posixpath

import fsspec

from ddoq_ray.data.collections.archives import is_archive
from ddoq_ray.data.collections.classes import shown
from ddoq_ray.data.collections.contents import not_images
from ddoq_ray.data.collections.listing import absolute, image_extension
from ddoq_ray.data.collections.tree import leftover, top, walk

EXPECTED = (
    "expected class folders of images (<class>/<image files>, or train/ and val/ of such), a metadata.csv with "
    "file_name and label, WebDataset shards (*.tar), or *.parquet or *.arrow files"
)
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
        _refuse_file(path)


def _refuse_file(path: str) -> None:
    """Refuse a single file that is an image, or a list of images.

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


def _refuse_folder(path: str, place: str) -> None:
    """Refuse a folder in which no kind of collection is found.

    Raises:
        ValueError: With what is there, and the way out.
    """
    _, folders, files = next(walk(place))
    there = [(name, size) for name, size in files if not leftover(name)]
    none = not_images(place, there)
    images = [name for name, _ in there if name not in none]
    if images:
        raise ValueError(
            f"dataset.path={path} holds {len(images):,} images in no class folder (such as {images[0]}), so nothing "
            "says which class each is of: expected a folder for each class, or a metadata.csv with file_name and label "
            f"beside them{table_hint(place)}"
        )
    archives = sorted(
        posixpath.join(here, name)
        for here, _, inside in walk(place)
        for name, _ in inside
        if not leftover(name) and (is_archive(name) or (here and name.endswith(".tar")))
    )
    if archives:
        raise ValueError(
            f"dataset.path={path} holds archives ({shown(archives, 3)}) and no images beside them: unpack them where "
            "they are, and give the folder again; where they are shards, give the folder that holds them"
        )
    names = [*(f"{name}/" for name in folders), *(name for name, _ in there)]
    raise ValueError(
        f"dataset.path={path} holds no *.tar and no images (there: {shown(names) or 'nothing'}); {EXPECTED}"
    )


def table_hint(place: str) -> str:
    """A question about a file that may be the table of images without a class folder; empty without one."""
    tables = [n for n in top(place)[1] if n.lower().endswith((".csv", ".tsv", ".jsonl"))]
    return f"; is {shown(tables, 3)} its table? Name it so, with these columns" if tables else ""
