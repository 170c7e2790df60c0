"""The one list of words by which names of shards, files and folders say which split they hold."""

from __future__ import annotations

import re

SPLIT_WORDS = {
    word: split
    for split, words in {
        "train": "train training trn trainval",
        "val": "val valid validation validate dev development holdout heldout",
        "test": "test testing tst eval evaluation",
    }.items()
    for word in words.split()
}
# What may stand beside such a word without making another thing of it; a "test tube" is no test.
FILLERS = frozenset((
    "set", "sets", "image", "images", "img", "imgs", "data", "dataset", "split", "splits", "photo", "photos", "picture",
    "pictures", "pics", "sample", "samples", "folder", "part", "subset", "full", "small", "raw", "original", "public",
    "private", "partial", "jpg", "jpeg", "png", "files", "the",
))  # fmt: skip
_TOKEN = re.compile(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])|[A-Z]")


def tokens(name: str) -> list[str]:
    """The words of a name in lower case, numbers left out.

    >>> tokens("TrainImages_2017"), tokens("VAL"), tokens("testset-1")
    (['train', 'images'], ['val'], ['test', 'set'])
    """
    out = []
    for token in map(str.lower, _TOKEN.findall(name)):
        inner = next((f for f in FILLERS if token.endswith(f) and token[: -len(f)].rstrip("s") in SPLIT_WORDS), None)
        out += [token] if inner is None or token in SPLIT_WORDS else [token[: -len(inner)], inner]
    return out


def is_split(name: str) -> bool:
    """Whether a folder's name says no more than which split it holds.

    >>> is_split("train"), is_split("val_images"), is_split("trains"), is_split("photos")
    (True, True, False, False)
    """
    words = tokens(name)
    return bool(SPLIT_WORDS.keys() & set(words)) and set(words) <= SPLIT_WORDS.keys() | FILLERS
