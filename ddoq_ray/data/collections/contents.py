"""Which of the files below a place are images: by their endings, else by their first bytes."""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Sequence

from ddoq_ray.data.collections.classes import shown
from ddoq_ray.data.collections.listing import LEFTOVER, NO_IMAGE, image_extension
from ddoq_ray.data.collections.tree import Entry, leftover
from ddoq_ray.data.picture_kinds import HEAD_BYTES, READ, UNREAD, WAYS_OUT, signature, unread_words
from ddoq_ray.storage.quarantine import Refusal
from ddoq_ray.storage.transport import read_heads

# Endings of what is no picture: not looked into, as each look into a store is a request.
_OTHERS = frozenset((
    "txt", "csv", "tsv", "json", "jsonl", "xml", "html", "htm", "md", "rst", "yaml", "yml", "toml", "ini", "cfg", "log",
    "py", "ipynb", "sh", "js", "css", "zip", "tar", "gz", "tgz", "bz2", "xz", "7z", "rar", "pdf", "doc", "docx", "xls",
    "xlsx", "ppt", "pptx", "npy", "npz", "mat", "pkl", "pt", "pth", "h5", "hdf5", "parquet", "arrow", "db", "sqlite",
    "mp4", "avi", "mov", "mkv", "mp3", "wav", "lnk", "url", "bak", "tmp", "part", "crdownload",
))  # fmt: skip
# Of a name without its ending, and of a folder in a class folder.
_MASK = re.compile(r"[ _.-](?:masks?|seg|segmentation|superpixels|trimap|depth)(?:[ _-]?\d+)?$", re.IGNORECASE)
_MASK_FOLDER = re.compile(r"(?<=[^/])/(?:masks?|segmentations?|trimaps|superpixels)/(?=[^/]+$)", re.IGNORECASE)


def not_images(root: str, files: Sequence[Entry]) -> dict[str, str]:
    """name -> why it is no image that is read, of those below a root that are none."""
    why: dict[str, str] = {}
    unknown: list[str] = []
    for name, size in files:
        if leftover(name):
            why[name] = LEFTOVER
        elif image_extension(name) is None:
            ending = posixpath.basename(name).rpartition(".")[2].lower() if "." in name else ""
            if ending in UNREAD:
                why[name] = unread_words(UNREAD[ending])
            elif not size and "://" not in root and _leads_nowhere(os.path.join(root, name)):
                why[name] = "a link to nothing"
            elif ending in _OTHERS or not size:
                why[name] = NO_IMAGE
            else:
                unknown.append(name)
    for name, head in zip(unknown, _heads(root, unknown), strict=True):
        kind = signature(head)
        if kind in WAYS_OUT:
            why[name] = unread_words(str(kind))
        elif kind not in READ:
            why[name] = NO_IMAGE
    return why


def masks(images: Sequence[str]) -> list[str]:
    """Those of a collection's images that are named as masks of others: in the same folder, or in one beside it.

    >>> masks(["a/1.jpg", "a/1_mask.png", "a/1_mask_2.png", "a/2_mask.png", "b/1_depth.png"])
    ['a/1_mask.png', 'a/1_mask_2.png']
    >>> masks(["a/images/1.jpg", "a/masks/1.png", "a/masks/2.png", "masks/images/1.png"])
    ['a/masks/1.png']
    >>> masks(["a/1.jpg", "a/mask/1.png", "b/mask/1.png"])
    ['a/mask/1.png']
    """
    candidates = [n for n in images if _MASK.search(posixpath.splitext(n)[0]) or _MASK_FOLDER.search(n)]
    if not candidates:
        return []
    others = set(images) - set(candidates)
    there = {posixpath.splitext(name)[0] for name in others}
    there |= {place for stem in there for place in _beside(stem)}
    found = []
    for name in candidates:
        stem = _MASK.sub("", posixpath.splitext(name)[0])
        if _MASK_FOLDER.sub("/*/", stem) in there:
            found.append(name)
    return found


def _beside(stem: str) -> tuple[str, str]:
    """Names of what lies in a folder beside an image's own, or beside the image itself."""
    head, _, name = stem.rpartition("/")
    return f"{head.rpartition('/')[0]}/*/{name}", f"{head}/*/{name}"


def _leads_nowhere(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _heads(root: str, names: Sequence[str]) -> list[bytes]:
    """The first bytes of files; none of those that cannot be read, which reading will tell."""
    if "://" not in root:
        out = []
        for name in names:
            head = b""
            with contextlib.suppress(OSError), open(os.path.join(root, name), "rb") as f:
                head = f.read(HEAD_BYTES)
            out.append(head)
        return out
    found: list[bytes] = []
    for start in range(0, len(names), 1000):
        found += read_heads(root, names[start : start + 1000], HEAD_BYTES)
    return found


def unread_notes(refused: Sequence[Refusal]) -> list[str]:
    """A line for each kind of picture that is not read: how many, which, and what to do."""
    by_words: dict[str, list[str]] = defaultdict(list)
    for r in refused:
        if " pictures are not read: " in r.reason:
            by_words[r.reason].append(r.name)
    return [f"{len(names):,} {words} ({shown(names, 3)})" for words, names in by_words.items()]
