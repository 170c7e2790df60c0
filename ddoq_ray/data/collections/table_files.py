"""The files of a Parquet or Arrow collection: found in a folder's usual layouts, and told apart by split."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Sequence

import braceexpand
import fsspec

from ddoq_ray.data.collections.classes import shown
from ddoq_ray.data.collections.listing import absolute
from ddoq_ray.data.collections.splits import split_in_file, split_of
from ddoq_ray.data.collections.tree import walk
from ddoq_ray.data.shard_index import resolved
from ddoq_ray.storage.transport import read_file

ENDINGS = (".parquet", ".arrow")
_PART = re.compile(r"^(.*?)-\d+-of-(\d+)")
_DEPTH = 4  # folders: a repository, its configuration, its split


def is_table(name: str) -> bool:
    base = posixpath.basename(name).lower()
    return base.endswith(ENDINGS) and not base.startswith((".", "cache-", "tmp")) and base != "metadata.parquet"


def tables_below(root: str) -> list[str]:
    """Names of the table files in a folder, relative to it, sorted.

    Where there is a state.json, as save_to_disk writes it, only the files that it lists are meant, and all of them.

    Raises:
        ValueError: When some of those are not there, or it was saved with rows chosen or in another order.
    """
    found: list[str] = []
    for here, folders, files in walk(root):
        if here.count("/") + bool(here) >= _DEPTH:
            folders.clear()
        names = [posixpath.join(here, name) for name, _ in files if is_table(name)]
        if any(name == "state.json" for name, _ in files):
            meant = _listed(posixpath.join(root, here, "state.json"))
            names = [n for n in names if not meant or posixpath.basename(n) in meant]
            missing = sorted(meant - {name for name, _ in files})
            if missing:
                raise ValueError(
                    f"{posixpath.join(root, here)}: its state.json names {len(missing)} files that are not there "
                    f"({shown(missing, 3)}): bring them back"
                )
        found += names
    return sorted(found)


def _listed(state: str) -> set[str]:
    """Names of the files that a state.json lists; none where it is something else.

    Raises:
        ValueError: When it chooses among their rows, which is not read.
    """
    data = read_file(state)
    try:
        facts = json.loads(data)
        meant = {str(entry["filename"]) for entry in facts.get("_data_files", [])}
        chosen = bool(facts.get("_indices_files") or facts.get("_indices_data_files"))
    except (ValueError, TypeError, KeyError, AttributeError):
        return set()
    if chosen:
        raise ValueError(
            f"{state}: a choice or an order of rows was saved beside the rows (_indices_files), and is not read: all "
            "rows would be taken. Write it anew: load_from_disk(...).flatten_indices().save_to_disk(...)"
        )
    return meant


def part_notes(files: Sequence[str]) -> list[str]:
    """A line where files number themselves (``train-00000-of-00002``) and some of them are not there."""
    there: dict[tuple[str, int], int] = {}
    for file in files:
        if found := _PART.search(posixpath.basename(file)):
            key = (posixpath.join(posixpath.dirname(file), found[1]), int(found[2]))
            there[key] = there.get(key, 0) + 1
    return [
        f"{n} of {count} files {name}-*-of-* are there: the others' rows are not used"
        for (name, count), n in there.items()
        if n < count
    ]


def list_tables(path: str, key: str) -> tuple[list[str], list[str]]:
    """(the files of a folder, a file, a glob or a brace pattern; the part of each name that says its split).

    Raises:
        ValueError: When there are none, or they are of several configurations.
    """
    found: list[tuple[str, str]] = []
    plain = absolute(path)
    fs, root = fsspec.core.url_to_fs(plain)
    for pattern in [plain] if fs.exists(root) else braceexpand.braceexpand(path):
        where = pattern if any(ch in pattern for ch in "*?[") else absolute(pattern)
        fs, root = fsspec.core.url_to_fs(where)
        if fs.isdir(root):
            root = root.rstrip("/")
            inside = tables_below(where)
            _one_configuration(where, inside, key)
            names = [(f"{root}/{n}", n) for n in inside]
        elif fs.exists(root):
            names = [(root, posixpath.basename(root))]
        else:
            there = fs.glob(root) if any(ch in root for ch in "*?[") else []
            names = [(n, posixpath.basename(n)) for n in sorted(there) if not fs.isdir(n)]
        if not names:
            raise ValueError(f"{key}={path}: {where} holds no parquet file; expected *.parquet or *.arrow")
        found += [(str(fs.unstrip_protocol(n)) if "://" in where else str(n), below) for n, below in names]
    once = {resolved(file): (file, below) for file, below in reversed(found)}  # patterns may meet, links lead to one
    files = sorted(once.values(), key=found.index)
    return [file for file, _ in files], [below for _, below in files]


def _one_configuration(root: str, names: Sequence[str], key: str) -> None:
    groups: dict[str, str] = {}
    for name in names:
        folders = [f for f in name.split("/")[:-1] if f != "data" and split_of(f) is None]
        groups.setdefault("/".join(folders), name)
    columns = {group.rpartition("/")[2].partition("=")[0] for group in groups}
    if len(groups) > 1 and len(columns) == 1 and all("=" in group for group in groups):
        raise ValueError(
            f"{key}={root}: its tables are apart by {columns.pop()} ({shown(sorted(groups), 3)}), and what folders' "
            "names say is not read: write the tables with that as a column of its own, in one folder"
        )
    if len(groups) > 1:
        folder, ending = posixpath.split(groups.get("", ""))[0], posixpath.splitext(groups.get("", ""))[1]
        places = [posixpath.join(root, g) if g else posixpath.join(root, folder, f"*{ending}") for g in sorted(groups)]
        raise ValueError(
            f"{key}={root} holds {len(groups)} configurations of a data set, a folder each ("
            f"{shown([g or 'itself' for g in sorted(groups)])}); which one? Give {key}={f' or {key}='.join(places[:4])}"
        )


def by_split(files: list[str], below: list[str], path: str) -> tuple[list[str], list[str], list[str]]:
    """(training files, validation files, notes) by the words in their names, or their folders', as on the hub.

    Raises:
        ValueError: When which files are for training or validation is ambiguous.
    """
    words: dict[str, list[str]] = {}
    for file, name in zip(files, below, strict=True):
        words.setdefault(split_in_file(name) or "", []).append(file)
    held = [w for w in ("val", "test") if w in words]
    if "train" not in words:
        if held:
            raise ValueError(
                f"dataset.path={path}: {shown(below)}: no file of it is named train-*; give the training files by a "
                "pattern"
            )
        return files, [], []
    if "" in words or len(held) > 1:
        names = {"train": "train", "val": "validation", "test": "test", "": "others"}
        candidates = [f"{names[w]} ({len(words[w])})" for w in ("train", "val", "test", "") if w in words]
        either = f" or dataset.val_path={_place(words, held[1])}" if len(held) > 1 else ""
        raise ValueError(
            f"dataset.path={path}: which files are for training, which for validation? There are {shown(candidates)}; "
            f"give each: dataset.path={_place(words, 'train')} dataset.val_path="
            f"{_place(words, held[0]) if held else '...'}{either}"
        )
    notes = ["the test split serves as validation, as there is no other beside train"] if held == ["test"] else []
    return words["train"], words[held[0]] if held else [], notes


def _place(words: dict[str, list[str]], split: str) -> str:
    """The files of one split as one path: the file, their folder, else a pattern."""
    files = words[split]
    folders = {posixpath.dirname(f) for f in files}
    others = {posixpath.dirname(f) for word, there in words.items() if word != split for f in there}
    if len(folders) == 1 and not folders & others:
        return folders.pop()
    if len(files) == 1:
        return files[0]
    return f"{posixpath.commonprefix(files)}*"
