"""The one list of words by which names of shards, files and folders say which split they hold."""

from __future__ import annotations

SPLIT_WORDS = {
    word: split
    for split, words in {
        "train": "train training trn trainval",
        "val": "val valid validation validate dev development holdout heldout",
        "test": "test testing tst eval evaluation",
    }.items()
    for word in words.split()
}
