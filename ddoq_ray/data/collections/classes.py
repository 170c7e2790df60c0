"""From the names that a collection has for its classes to a class list, exactly or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import fsspec

from ddoq_ray.data.samples import read_classes
from ddoq_ray.storage.records import ClassInfo
from ddoq_ray.storage.transport import read_file

REMEDY = (
    'give dataset.classes=classes.json, a JSON list of {"name": ..., "prompt": ...} in label order, '
    "with the names that the source has"
)
SUBTRACT = "They begin at 1: subtract one, or begin the class list (dataset.classes) with a class that is not used"
_WORD_LISTS = ("words.txt", "LOC_synset_mapping.txt", "synset_words.txt", "Labels.json", "imagenet_class_index.json")
_WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")
# Positions of some WordNet ids among ImageNet's 1,000 in sorted order, beside the ten that torchvision's Imagenette
# names: those of ImageWoof, and the last.
_POSITIONS = {
    "n02086240": 155, "n02087394": 159, "n02088364": 162, "n02089973": 167, "n02093754": 182, "n02096294": 193,
    "n02099601": 207, "n02105641": 229, "n02111889": 258, "n02115641": 273, "n15075141": 999,
}  # fmt: skip


def shown(names: Sequence[object], limit: int = 8) -> str:
    return ", ".join(escaped(str(n)) for n in names[:limit]) + (", ..." if len(names) > limit else "")


def escaped(name: str) -> str:
    """A name that can be printed: bytes that are no UTF-8 as ``\\xe9``."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character, as JSON can have it
        return name.encode("utf-8", "backslashreplace").decode()


def text_of(name: str) -> str:
    """The name of a class as text: one form for what looks the same, escaped where it is no text.

    >>> text_of("Mu\\u0308ller") == "M\\u00fcller", text_of("caf\\udce9")
    (True, 'caf\\\\xe9')
    """
    return unicodedata.normalize("NFC", escaped(name))


def given_classes(path: str | None, beside: str | None) -> list[ClassInfo] | None:
    """The class list that the user gave (`dataset.classes`), else the one beside the data, else None."""
    if path is not None:
        return read_classes(path)
    if beside is not None:
        fs, root = fsspec.core.url_to_fs(beside)
        if fs.exists(root):
            return read_classes(beside)
    return None


def check_class_lists(files: Iterable[str], classes: Sequence[ClassInfo]) -> None:
    """Refuse files of several folders whose class lists number their classes otherwise.

    Args:
        files: Whose labels are numbers; the list of the first one's folder is `classes`.

    Raises:
        ValueError: Shows both lists.
    """
    folders = list(dict.fromkeys(posixpath.dirname(file) for file in files))
    names = [c.name for c in classes]
    lists = [posixpath.join(folder, "classes.json") for folder in folders]
    with ThreadPoolExecutor(32) as threads:  # each is a request to a store
        found = list(threads.map(partial(given_classes, None), lists))
    for path, other in zip(lists, found, strict=True):
        if other is not None and [c.name for c in other] != names:
            raise ValueError(
                f"{path} says {shown([c.name for c in other])}, and {lists[0]} {shown(names)}: the same label would be "
                "two classes. Write the labels of both by one list, or say which list holds for all by dataset.classes"
            )


def class_list(
    names: Sequence[str], given: list[ClassInfo] | None, where: str, words_in: Sequence[str] = ()
) -> list[ClassInfo]:
    """Classes in the order of their sorted names (numbers as numbers), or as given.

    Args:
        names: The source's own names, each once.
        given: A class list that must name exactly these.
        where: Words for the source in an error.
        words_in: Folders where a list of what WordNet ids mean may lie.

    Raises:
        ValueError: When which class is which would have to be guessed; shows the candidates and the remedy.
    """
    _refuse_alike(names, where)
    if given is not None:
        return _fitting(names, given, where)
    if names and all(_NUMBER.fullmatch(name) for name in names):
        if len({float(n) for n in names}) < len(names):
            raise ValueError(
                f"{where}: the classes are numbers, and some are the same number, which is ambiguous: "
                f"{shown(sorted(names), 5)}; {REMEDY}"
            )
        return [_plain(i, name) for i, name in enumerate(sorted(names, key=float))]
    if names and all(_WNID.fullmatch(name) for name in names):
        return wordnet_classes(sorted(names), where, words_in)
    return [_plain(i, name) for i, name in enumerate(sorted(names))]


def numbered_classes(
    labels: set[int], names: Sequence[str] | None, given: list[ClassInfo] | None, where: str
) -> list[ClassInfo]:
    """Classes of a source whose labels are numbers: by the names that it has for them, else as given, else numbers.

    Raises:
        ValueError: When labels and names do not fit, or labels without names do not run from 0 without a gap.
    """
    if given is not None:
        if names is not None and [c.name for c in given] != list(names):
            raise ValueError(
                f"{where}: the class list given ({shown([c.name for c in given])}) is not the source's own "
                f"({shown(names)}); mend its names, or leave dataset.classes out"
            )
        classes = given
    elif names is not None:
        _refuse_alike(names, where)
        classes = [_plain(i, name) for i, name in enumerate(names)]
        if all(_WNID.fullmatch(name) for name in names):
            known = {c.name: c for c in wordnet_classes(sorted(names), where)}
            classes = [dataclasses.replace(known[name], class_id=i) for i, name in enumerate(names)]
    else:
        if labels != set(range(len(labels))):
            raise ValueError(
                f"{where}: labels {shown(sorted(labels))} without names; expected 0 to C - 1 without a gap"
                + (f". {SUBTRACT}" if begin_at_one(labels, len(labels)) else f"; {REMEDY}")
            )
        classes = [_plain(i, str(i)) for i in range(len(labels))]
    outside = sorted(label for label in labels if not 0 <= label < len(classes))
    if outside:
        raise ValueError(
            f"{where}: labels {shown(outside)} are outside the class list (0 to {len(classes) - 1})"
            + (f". {SUBTRACT}" if begin_at_one(labels, len(classes)) else f"; {REMEDY}")
        )
    return classes


def begin_at_one(labels: Collection[int], num_classes: int) -> bool:
    """Whether labels count the classes from 1: each would be taken for its neighbour, and only the last is outside.

    >>> begin_at_one({1, 2, 3}, 3), begin_at_one({0, 1, 3}, 3), begin_at_one({1, 2}, 3)
    (True, False, False)
    """
    return bool(labels) and min(labels) >= 1 and max(labels) == num_classes


def check_first_label(labels: Collection[int], num_classes: int, where: str) -> None:
    """Refuse labels that count the classes from 1, however few of them are outside the class list.

    Raises:
        ValueError: With what to do.
    """
    if begin_at_one(labels, num_classes):
        raise ValueError(
            f"{where}: the labels go from {min(labels)} to {num_classes}, and the class list from 0 to "
            f"{num_classes - 1}. {SUBTRACT}"
        )


def wordnet_classes(wnids: Sequence[str], where: str, words_in: Sequence[str] = ()) -> list[ClassInfo]:
    """Classes named by WordNet ids, with readable prompts where the id's word is known for certain.

    Args:
        words_in: Folders where a list of what the ids mean may lie.

    ImageNet's 1,000 ids in sorted order are the outputs of its classifiers and priors, so these places are filled in.
    For fewer classes they are not: which network is used decides, and it finds the prompt.

    Raises:
        ValueError: For ids whose words are not known.
    """
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    known = _positions()
    whole = len(wnids) == len(_IMAGENET_CATEGORIES) and all(wnids[i] == wnid for wnid, i in known.items())
    if whole:
        return [ClassInfo(i, w, _IMAGENET_CATEGORIES[i], i, i) for i, w in enumerate(wnids)]
    unknown = [w for w in wnids if w not in known]
    words = wordnet_words(words_in) if unknown else {}
    unknown = [w for w in unknown if w not in words]
    if unknown:
        raise ValueError(
            f"{where}: {len(wnids)} classes named by WordNet ids that are not ImageNet's 1,000, and the words of "
            f"{len(unknown)} of them are not known here ({shown(unknown)}); "
            + ("put a words.txt there, with an id and its words in each line, or " if words_in else "")
            + REMEDY
        )
    return [ClassInfo(i, w, _IMAGENET_CATEGORIES[known[w]] if w in known else words[w]) for i, w in enumerate(wnids)]


def wordnet_words(folders: Iterable[str]) -> dict[str, str]:
    """WordNet id -> its first word, by the lists that ImageNet's kinds come with, in any of some folders."""
    found: dict[str, str] = {}
    for folder in folders:
        for name in _WORD_LISTS:
            with contextlib.suppress(OSError):
                text = read_file(posixpath.join(folder, name)).decode("utf-8", "replace")
                for wnid, words in re.findall(r'(n\d{8})[\s":,]+([^",\r\n]+)', text):
                    found.setdefault(wnid, words.strip())
    return found


def _positions() -> dict[str, int]:
    from torchvision.datasets import Imagenette
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    there = {wnid: _IMAGENET_CATEGORIES.index(words[0]) for wnid, words in Imagenette._WNID_TO_CLASS.items()}
    return there | _POSITIONS


def _refuse_alike(names: Sequence[str], where: str) -> None:
    by_fold: dict[str, list[str]] = {}
    for name in sorted(names):
        by_fold.setdefault(name.strip().casefold(), []).append(name)
    alike = [" and ".join(group) for group in by_fold.values() if len(group) > 1]
    if alike:
        raise ValueError(
            f"{where}: class names that differ only in case or spaces: {shown(alike, 4)}; one class or two? Join or "
            "rename them"
        )


def _plain(class_id: int, name: str) -> ClassInfo:
    return ClassInfo(class_id, name, name.replace("_", " ").strip())


def _fitting(names: Sequence[str], given: list[ClassInfo], where: str) -> list[ClassInfo]:
    listed = [c.name for c in given]
    twice = sorted(n for n, times in Counter(listed).items() if times > 1)
    missing, extra = sorted(set(names) - set(listed)), sorted(set(listed) - set(names))
    if twice or missing or extra:
        parts = [
            f"{words}: {shown(which)}"
            for words, which in (
                ("listed twice", twice),
                ("in the source but not in the list", missing),
                ("in the list but not in the source", extra),
            )
            if which
        ]
        raise ValueError(f"{where}: the class list given does not fit; {'; '.join(parts)}; {REMEDY}")
    return given
