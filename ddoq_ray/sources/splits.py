"""The words by which folders and files say whose images they hold: for training, for validation, for a test."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ddoq_ray.split_words import SPLIT_WORDS as _WORDS

# What may stand beside such a word without making another thing of it; a "test tube" is no test.
_FILLERS = frozenset((
    "set", "sets", "image", "images", "img", "imgs", "data", "dataset", "split", "splits", "photo", "photos", "picture",
    "pictures", "pics", "sample", "samples", "folder", "part", "subset", "full", "small", "raw", "original", "public",
    "private", "jpg", "jpeg", "png", "files", "the",
))  # fmt: skip
_TOKEN = re.compile(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])|[A-Z]")


def _tokens(name: str) -> list[str]:
    """The words of a name in lower case, numbers left out.

    >>> _tokens("TrainImages_2017"), _tokens("VAL"), _tokens("testset-1")
    (['train', 'images'], ['val'], ['test', 'set'])
    """
    out = []
    for token in map(str.lower, _TOKEN.findall(name)):
        inner = next((f for f in _FILLERS if token.endswith(f) and token[: -len(f)].rstrip("s") in _WORDS), None)
        out += [token] if inner is None or token in _WORDS else [token[: -len(inner)], inner]
    return out


def _reading(name: str) -> tuple[str | None, tuple[str, ...]]:
    """(the split that a name has a word of, its words that say something else)."""
    tokens = _tokens(name)
    found = {_WORDS[t] for t in tokens if t in _WORDS}
    if found == {"train", "val"}:  # train_val: all that is not for the test
        found = {"train"}
    rest = tuple(t for t in tokens if t not in _WORDS and t not in _FILLERS)
    return (found.pop() if len(found) == 1 else None), rest


def split_of(name: str) -> str | None:
    """train, val or test where a name means that and nothing else, in any of the usual forms; else None.

    >>> [split_of(n) for n in ("Train", "Testing", "VAL", "test_set", "train2017", "test tube", "cat")]
    ['train', 'test', 'val', 'test', 'train', None, None]
    """
    split, rest = _reading(name)
    return None if rest else split


def splits_of(names: Iterable[str]) -> dict[str, str]:
    """name -> split of those among sibling folders that are splits.

    Names with another word (``seg_train``, ``seg_test``) count where a training one and a held-out one share it.
    """
    readings = {name: _reading(name) for name in names}
    kinds: dict[tuple[str, ...], set[str]] = {}
    for split, rest in readings.values():
        if split is not None:
            kinds.setdefault(rest, set()).add(split)
    pairs = {rest for rest, there in kinds.items() if "train" in there and len(there) > 1}
    return {n: split for n, (split, rest) in readings.items() if split is not None and (not rest or rest in pairs)}


def split_in_file(path: str) -> str | None:
    """The split that a file of many images is of: by its name, else by the nearest folder that says so.

    >>> split_in_file("data/train-00000-of-00001.parquet"), split_in_file("default/validation/0000.parquet")
    ('train', 'val')
    """
    *folders, file = path.split("/")
    split, _ = _reading(file.partition(".")[0])
    return split or next((s for f in reversed(folders) if (s := split_of(f)) is not None), None)
