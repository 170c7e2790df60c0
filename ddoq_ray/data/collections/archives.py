"""Archives of collections, which are not read: refused with the way out, as are tars that are no shards."""

from __future__ import annotations

import contextlib
import posixpath
import tarfile

from ddoq_ray.data.pictures import IMAGE_EXTENSIONS

_ARCHIVES = (".zip", ".7z", ".rar", ".tgz", ".tar.gz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".gz", ".xz")
TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")  # as tarfile opens them
_LOOKED_AT = 200  # members


def is_archive(name: str) -> bool:
    return name.lower().endswith(_ARCHIVES)


def refuse_archive(path: str, local: str) -> None:
    """Refuse a file that is an archive of image files: a tar without a label among its first members is one too.

    Raises:
        ValueError: With the way out.
    """
    if local.lower().endswith(TARS):
        if "://" in local or _has_labels(local):
            return
    elif not is_archive(local):
        return
    which = "" if posixpath.basename(local) == posixpath.basename(path) else f": {posixpath.basename(local)}"
    raise ValueError(
        f"dataset.path={path}{which} is an archive, not shards with <key>.jpg and <key>.cls: unpack it, and give the "
        "folder that it makes (dataset.path=FOLDER); where each archive is of one class, unpack it into a folder of "
        "the class's name"
    )


def _has_labels(path: str) -> bool:
    """Whether a tar has a label among its first members, or cannot be judged so."""
    images = 0
    with contextlib.suppress(OSError, tarfile.TarError, EOFError), tarfile.open(path, mode="r|*") as tar:
        for number, member in enumerate(tar):
            ending = member.name.rpartition(".")[2].lower()
            if ending == "cls":
                return True
            images += ending in IMAGE_EXTENSIONS
            if number >= _LOOKED_AT:
                break
    return not images
