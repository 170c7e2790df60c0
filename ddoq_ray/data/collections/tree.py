"""Folders and files below a place, on a disk (symbolic links followed) or in a store."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterator

import fsspec

Entry = tuple[str, int]  # a name, a size in bytes
# What systems and programs leave beside one's files, in any case of letters; hidden names come to these.
LEFTOVERS = frozenset(
    ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "lost+found", "$recycle.bin", "recycler",
     "#recycle", "@recycle", "#snapshot", "~snapshot", "@tmp", "@sharebin", "system volume information", "found.000",
     "network trash folder", "temporary items", "__pycache__", "icon\r")
)  # fmt: skip


def leftover(name: str) -> bool:
    """Whether a path has a part that is hidden or a system's: such are never classes or images."""
    return any(part.startswith(".") or part.casefold() in LEFTOVERS for part in name.split("/"))


def walk(root: str) -> Iterator[tuple[str, list[str], list[Entry]]]:
    """(folder relative to the root, its folders, its files with their sizes) of every folder, the root as "".

    Links to folders are followed, as trees of links to a larger collection are common; one that leads back to a
    folder above it is not, and is given as a file. Hidden folders and those that systems leave are not looked into,
    nor are pipes and sockets: each is given as a file whose name ends in a slash. Names are sorted.

    Raises:
        ValueError: When a folder cannot be listed.
    """
    if "://" not in root:
        yield from _walk_disk(root, "", frozenset())
        return
    fs, place = fsspec.core.url_to_fs(root)
    place = place.rstrip("/")
    for here, folders, files in fs.walk(place, detail=True):
        # An object store lists a folder's own marker as a file without a name.
        entries = [(name, int(info.get("size") or 0)) for name, info in files.items() if name]
        for name in [name for name in folders if leftover(name)]:
            del folders[name]
            entries.append((f"{name}/", 0))
        entries.sort()
        yield here.removeprefix(place).strip("/"), sorted(folders), entries


def _walk_disk(
    root: str, below: str, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, list[str], list[Entry]]]:
    here = os.path.join(root, below) if below else root
    status = os.stat(here)
    above |= {(status.st_dev, status.st_ino)}
    folders: list[str] = []
    files: list[Entry] = []
    try:
        there = list(os.scandir(here))
    except PermissionError as error:
        raise ValueError(f"no permission to list {here}; mend its permissions, or move it out of the source") from error
    for entry in there:
        try:
            found = entry.stat()
        except PermissionError as error:
            raise ValueError(
                f"no permission to look into {here}; mend its permissions, or move it out of the source"
            ) from error
        except OSError:  # a link to nothing: reading it will say so
            files.append((entry.name, 0))
            continue
        if entry.is_dir() and leftover(entry.name):
            files.append((f"{entry.name}/", 0))
        elif entry.is_dir() and (found.st_dev, found.st_ino) not in above:
            folders.append(entry.name)
        elif stat.S_ISREG(found.st_mode) or entry.is_dir():
            files.append((entry.name, found.st_size))
        else:  # a pipe or a socket: reading it would wait for ever
            files.append((f"{entry.name}/", 0))
    yield below, sorted(folders), sorted(files)
    for folder in sorted(folders):
        yield from _walk_disk(root, posixpath.join(below, folder), above)


def top(root: str) -> tuple[list[str], list[str]]:
    """(names of the folders, names of the files) directly in a folder, but for leftovers."""
    _, folders, files = next(walk(root))
    return folders, [name for name, _ in files if not leftover(name)]
