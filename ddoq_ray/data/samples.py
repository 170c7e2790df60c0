"""Labelled samples in WebDataset shards, decoded one by one.

No Ray here: the encode stage, the training commands and the evaluation all read through this file.
A sample that cannot be used is never dropped silently: it is handed to `on_bad` with its key, its byte
offset and the reason. What a sample is: `tar_samples`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
from PIL import Image

from ddoq_ray.data.pictures import RefusedPicture, Resize, decode_rgb, encode_png, to_square
from ddoq_ray.data.tar_samples import OnBad, labelled, open_samples
from ddoq_ray.storage.digested import Digested
from ddoq_ray.storage.quarantine import Refusal
from ddoq_ray.storage.records import ClassInfo
from ddoq_ray.storage.transport import list_shards, open_shard, read_file

__all__ = [
    "Sample", "decode_rgb", "encode_png", "list_shards", "load_arrays", "read_classes", "read_samples", "to_square",
]  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A decoded sample: key, class_id, RGB picture, byte offset of its first member."""

    key: str
    class_id: int
    image: Image.Image
    offset: int


def read_classes(path: str) -> list[ClassInfo]:
    """Read ``classes.json``: a list of names, or of objects with the fields of `ClassInfo`.

    Dictionaries that number all names from 0 (class_to_idx, id2label, ImageNet's class index) are such lists too, and
    so is a ``.txt`` with a name in each line.

    Raises:
        ValueError: When the file is missing, is not such a list, or does not number its classes 0 to C - 1.
    """
    rows = _rows(path)
    classes = []
    for i, row in enumerate(rows):
        if isinstance(row, str):
            name = unicodedata.normalize("NFC", row)  # Macs write names in another form than others
            classes.append(ClassInfo(i, name, name))
        elif isinstance(row, dict) and "name" in row:
            unknown = set(row) - {"class_id", "name", "prompt", "teacher_index", "prior_label"}
            if unknown:
                raise ValueError(
                    f"{path}: class {i} has unknown fields {sorted(unknown)}; expected some of class_id, name, prompt, "
                    "teacher_index, prior_label"
                )
            for field in ("class_id", "teacher_index", "prior_label"):
                value = row.get(field)
                if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                    raise ValueError(f"{path}: class {i} has {field}={value!r}; expected a whole number")
            for field in ("name", "prompt"):
                value = row.get(field)
                if not isinstance(value, str) and (field == "name" or value is not None):
                    raise ValueError(f"{path}: class {i} has {field}={value!r}; expected a text")
            name = unicodedata.normalize("NFC", row["name"])
            classes.append(
                ClassInfo(
                    i if row.get("class_id") is None else row["class_id"],
                    name,
                    name if row.get("prompt") is None else row["prompt"],
                    row.get("teacher_index"),
                    row.get("prior_label"),
                )
            )
        else:
            raise ValueError(f"{path}: class {i} is {row!r}; expected a name, or an object with a name")
    ids = [c.class_id for c in classes]
    if ids != list(range(len(ids))):
        shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
        raise ValueError(f"{path}: expected class_id 0 to {len(ids) - 1} in order, got {shown}; mend the list")
    return classes


def _rows(path: str) -> list[Any]:
    """The JSON list in a file.

    Raises:
        ValueError: When the file cannot be read, or holds something else.
    """
    try:
        text = read_file(path)
        rows = _lines(text.decode("utf-8-sig")) if path.lower().endswith(".txt") else json.loads(text)
    except FileNotFoundError:
        raise ValueError(
            f"no class list at {path}: expected a classes.json, a JSON list of class names in label order "
            '(or of objects with "class_id", "name", "prompt", "teacher_index", "prior_label"); '
            "set dataset.classes to yours"
        ) from None
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"cannot read the class list {path}: {why}; set dataset.classes to a file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}; expected a JSON list of class names in label order") from None
    except (ValueError, ImportError) as error:  # a protocol that nobody knows, a library to install, a store
        raise ValueError(f"cannot read the class list {path}: {error}; set dataset.classes to a file") from None
    if isinstance(rows, dict):
        rows = _listed(rows) or rows
    if not isinstance(rows, list) or not rows:
        came = "an empty list" if rows == [] else f"a JSON {type(rows).__name__}"
        came += " that does not number all its names from 0" if isinstance(rows, dict) else ""
        raise ValueError(f"{path}: expected a non-empty JSON list of classes, got {came}")
    return rows


def _lines(text: str) -> list[str]:
    """The names of a text with one in each line, behind its number where all lines have theirs.

    >>> _lines("cat\\nhot dog\\n"), _lines("1 cat\\n2 hot dog"), _lines("1 cat\\n7 dog")
    (['cat', 'hot dog'], ['cat', 'hot dog'], ['1 cat', '7 dog'])
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    numbered = [re.fullmatch(r"([0-9]+)[\s,:]+(.+)", line) for line in lines]
    numbers = [int(n[1]) for n in numbered if n is not None]
    if numbers and numbers in (list(range(len(lines))), list(range(1, len(lines) + 1))):
        return [n[2] for n in numbered if n is not None]
    return lines


def _listed(rows: dict[str, Any]) -> list[Any] | None:
    """The list that a dictionary stands for; None where it numbers no classes from 0.

    >>> _listed({"dog": 1, "cat": 0}), _listed({"1": ["n02", "dog"], "0": ["n01", "cat"]})
    (['cat', 'dog'], [{'name': 'n01', 'prompt': 'cat'}, {'name': 'n02', 'prompt': 'dog'}])
    >>> _listed({"id2label": {"0": "cat"}}), _listed({"n01": "cat"})
    (['cat'], None)
    """
    if isinstance(rows.get("id2label"), dict):
        return _listed(rows["id2label"])
    by_number: dict[int, Any] = {}
    for key, value in rows.items():
        if isinstance(value, int) and not isinstance(value, bool):  # class_to_idx
            by_number[value] = key
        elif key.isdecimal() and isinstance(value, list) and len(value) == 2:  # ImageNet's: an id and a word
            by_number[int(key)] = {"name": value[0], "prompt": value[1]}
        elif key.isdecimal() and isinstance(value, str):  # id2label
            by_number[int(key)] = value
    if len(by_number) != len(rows) or sorted(by_number) != list(range(len(rows))):
        return None
    return [by_number[i] for i in range(len(rows))]


def read_samples(shard: str, num_classes: int, on_bad: OnBad, sha256: str = "") -> Iterator[Sample]:
    """Read and decode one shard sample by sample, in the tar's order.

    Args:
        shard: Path or URL of a tar.
        num_classes: Labels must be 0 to num_classes - 1.
        on_bad: Called for each refused sample; reading goes on with the next one. Not always in the tar's order: what
            a key lacks is known only at the end.
        sha256: Of the tar, where it is known; a reader that stops before the last sample does not compare it.

    Raises:
        ValueError: When the shard cannot be read at all, now or from some byte on: that says nothing about its samples.
            At its end, when it is not the one that was written: a label of other digits is a label too.
    """
    with open_shard(shard) as file:
        digested = Digested(file)
        tar = open_samples(cast(IO[bytes], digested) if sha256 else file, on_bad)
        for group, class_id in labelled(tar, on_bad) if tar is not None else ():
            if not 0 <= class_id < num_classes:
                reason = f"label is outside the class list (0 to {num_classes - 1}): {class_id}"
                on_bad(Refusal(group.key, reason, offset=group.offset))
                continue
            data = group.members[group.images[0]]
            assert data is not None
            try:
                image = decode_rgb(data)
            except RefusedPicture as error:
                on_bad(Refusal(group.key, str(error), offset=group.offset))
            else:
                yield Sample(group.key, class_id, image, group.offset)
        if sha256 and digested.hexdigest() != sha256:
            raise ValueError(
                f"{shard} is damaged: it has other bytes than prepare packed; `ddoq-ray verify RUN repair=true`, RUN "
                "the run directory that it lies in, has prepare pack it anew"
            )


def load_arrays(
    shards: Iterable[str], size: int, num_classes: int, on_bad: OnBad | None = None, resize: Resize = "squash"
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Decode whole shards into memory: 3 x size^2 bytes an image.

    Args:
        on_bad: Called for each refused sample; without it the first one is an error, so that none is lost unseen.

    Returns:
        images uint8 [N, 3, size, size], class_ids int64 [N], keys (N strings), in shard order.

    Raises:
        ValueError: When a shard cannot be read, or a sample is refused and `on_bad` was not given.
    """
    images: list[np.ndarray | None] = []
    class_ids, keys = [], []
    for shard in shards:
        for sample in read_samples(shard, num_classes, on_bad or _refuse(shard)):
            images.append(to_square(sample.image, size, resize))
            class_ids.append(sample.class_id)
            keys.append(sample.key)
    stacked = np.empty((len(images), 3, size, size), np.uint8)
    for i, image in enumerate(images):
        assert image is not None
        stacked[i] = image.transpose(2, 0, 1)
        images[i] = None  # else they are in memory twice
    return stacked, np.asarray(class_ids, np.int64), keys


def _refuse(shard: str) -> OnBad:
    def on_bad(bad: Refusal) -> None:
        raise ValueError(f"{shard}: sample {bad.name or f'at byte {bad.offset}'} cannot be used: {bad.reason}")

    return on_bad
