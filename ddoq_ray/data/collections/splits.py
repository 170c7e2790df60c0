"""The words by which folders and files say whose images they hold: for training, for validation, for a test."""

from __future__ import annotations

from collections.abc import Iterable

from ddoq_ray.config.split_words import FILLERS, tokens
from ddoq_ray.config.split_words import SPLIT_WORDS as _WORDS


def _reading(name: str) -> tuple[str | None, tuple[str, ...]]:
    """(the split that a name has a word of, its words that say something else)."""
    words = tokens(name)
    found = {_WORDS[t] for t in words if t in _WORDS}
    if found == {"train", "val"}:  # train_val: all that is not for the test
        found = {"train"}
    rest = tuple(t for t in words if t not in _WORDS and t not in FILLERS)
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
