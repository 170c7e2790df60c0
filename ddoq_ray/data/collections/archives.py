"""Archives of collections, which are not read: refused with the way out, as are tars that are no shards."""

from __future__ import annotations

import contextlib
import posixpath
import tarfile
from collections.abc import Sequence

from ddoq_ray.data.pictures import IMAGE_EXTENSIONS

_ARCHIVES = (".zip", ".7z", ".rar", ".tgz", ".tar.gz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".gz", ".xz")
TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")  # as tarfile opens them
_LOOKED_AT = 200  # members


def is_archive(name: str) -> bool:
    return name.lower().endswith(_ARCHIVES)


def refuse_archive(path: str, local: str) -> None:
    """Refuse a file that is an archive of any files: a tar without a label among its first members is one too.

    Raises:
        ValueError: With the way out.
    """
    which = "" if posixpath.basename(local) == posixpath.basename(path) else f": {posixpath.basename(local)}"
    if local.lower().endswith(TARS):
        members = None if "://" in local else _members(local)
        if not members or "cls" in {ending for _, ending in members}:
            return
        beside = sorted(_beside_images(members))
        if beside:
            raise ValueError(
                f"dataset.path={path}{which} holds images with .{' and .'.join(beside)} of the same key, and no label: "
                "labels are read from <key>.cls, the class's number as text; write the shards anew with one in each "
                "sample (of what is a caption alone, no class is known)"
            )
    elif not is_archive(local):
        return
    elif local.lower().endswith(".tar.zst"):
        raise ValueError(
            f"dataset.path={path}{which} is compressed by zstd, which is not read: decompress it (unzstd); shards "
            "may stay .tar or .tar.gz, an archive of images is to be unpacked"
        )
    raise ValueError(
        f"dataset.path={path}{which} is an archive, not shards with <key>.jpg and <key>.cls: unpack it, and give the "
        "folder that it makes (dataset.path=FOLDER); where each archive is of one class, unpack it into a folder of "
        "the class's name"
    )


def _members(path: str) -> list[tuple[str, str]]:
    """(name without its ending, ending) of a tar's first files; none where it cannot be read so far."""
    found: list[tuple[str, str]] = []
    with contextlib.suppress(OSError, tarfile.TarError, EOFError), tarfile.open(path, mode="r|*") as tar:
        for number, member in enumerate(tar):
            if member.isfile():
                stem, _, ending = member.name.rpartition(".")
                found.append((stem, ending.lower()))
            if number >= _LOOKED_AT or (found[-1:] and found[-1][1] == "cls"):
                break
    return found


def _beside_images(members: Sequence[tuple[str, str]]) -> set[str]:
    """Endings of what has an image's name and is none: of captions and facts, as downloaders of pairs write them."""
    images = {stem for stem, ending in members if ending in IMAGE_EXTENSIONS}
    return {ending for stem, ending in members if stem in images and ending in ("json", "txt", "caption")}
