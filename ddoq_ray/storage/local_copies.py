"""Copies of a store's files on this machine's disk, for those who read them again and again."""

from __future__ import annotations

import os
import posixpath
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.folder import TEMPORARY, Folder
from ddoq_ray.storage.transport import open_shard

AT_ONCE = 8
PIECE = 1 << 20


class CopiesFolder:
    """A folder that goes with this object, or with the process; only in the process that made it."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="ddoq_ray-")
        weakref.finalize(self, _remove, self.path, os.getpid())


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker drops its object too
        shutil.rmtree(path, ignore_errors=True)


def local_copies(urls: Sequence[str], cache: str | None) -> tuple[list[str], CopiesFolder | None]:
    """Paths on this machine of files anywhere: those that are here already as they are, copies of the others.

    Args:
        urls: The files.
        cache: A folder for copies; those of the right size that are there are taken. None: one of their own.

    Returns:
        The paths, and what must be kept as long as they are read (None where there is nothing to remove).

    Raises:
        ValueError: A file cannot be read.
    """
    if all("://" not in url for url in urls):
        return list(urls), None
    own = CopiesFolder() if cache is None else None
    place = own.path if own is not None else os.path.abspath(str(cache))
    os.makedirs(place, exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(partial(_copied, place), urls)), own


def _copied(place: str, url: str) -> str:
    if "://" not in url:
        return url
    folder, name = posixpath.split(url)
    path = os.path.join(place, f"{digest_of(url)[:16]}-{name}")
    if os.path.exists(path) and os.path.getsize(path) == Folder(folder).size(name):
        return path
    temporary = f"{path}.{uuid.uuid4().hex[:8]}{TEMPORARY}"
    try:
        with open_shard(url) as source, open(temporary, "wb") as copy:
            shutil.copyfileobj(source, copy, PIECE)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return path
