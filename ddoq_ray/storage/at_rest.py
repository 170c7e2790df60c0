"""A run directory at rest: every file that a record speaks of, against the digest in that record.

Records are JSON objects with a digest of themselves (`artifact.with_check`); they hold the digests of the files that
they speak of. So a flipped byte, a cut file and a missing one are each told by the file's name.
"""

from __future__ import annotations

import json
import posixpath
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import FILES, NotAsWritten, checked, digest_of, with_check
from ddoq_ray.storage.codebook import PartRecord
from ddoq_ray.storage.fitting_facts import Facts, OtherVersion, misfit, misfit_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.label_grid import LabelFile, LabelGrid
from ddoq_ray.storage.label_log import LabelRecord, OpenLabels
from ddoq_ray.storage.records import ShardDone, read_shards

YEAR_3000 = 32_503_680_000  # in seconds since 1970: what no clock says
AT_ONCE = 8  # files that are read side by side
_PARTS: dict[str, type] = {"quantize": PartRecord, "label": LabelRecord}  # whose records are one dataclass
COMMANDS = {"heldout": "report"}  # stages whose command is another word


@dataclass(frozen=True)
class Stored:
    """A file that a record speaks of.

    Attributes:
        name: Relative to the artifact's folder.
        sha256: What its content must have; empty for one that is looked at by `check`.
        bytes: What it must have; None where the record does not say.
        with_it: Files that must be set aside with it, so that its stage makes it anew.
        check: Says what is wrong with its content; empty when nothing is.
    """

    name: str
    sha256: str = ""
    bytes: int | None = None
    with_it: tuple[str, ...] = (layout.MANIFEST,)
    check: Callable[[], str] | None = None


@dataclass(frozen=True)
class Damage:
    """A file of a run directory that is not what was written.

    Attributes:
        file: Its name, relative to the run directory.
        why: What was expected and what is there.
        command: The command whose stage makes it anew.
        aside: Files, relative to the run directory, that are set aside for that; the damaged one among them.
    """

    file: str
    why: str
    command: str
    aside: tuple[str, ...]


@dataclass
class Seen:
    """What was looked at, for the line at the end."""

    files: int = 0
    bytes: int = 0


def damaged(run: Folder, promised: Mapping[str, str], seen: Seen | None = None) -> Iterator[Damage]:
    """Every damaged or missing file of a run directory; nothing is written.

    Args:
        run: The run directory. An artifact that is begun and not finished is looked at as far as it has records.
        promised: Place -> stage of the artifacts that a finished run must have left.
        seen: Counts what is read.
    """
    seen = seen if seen is not None else Seen()
    begun: dict[str, str] = dict(promised)
    for stage, patterns in layout.ARTIFACTS.items():
        for record in (f"{p}/{name}" for p in patterns for name in (layout.STARTED, layout.MANIFEST)):
            begun |= {posixpath.dirname(name): stage for name in run.names(record)}
    walk = _Walk(run, seen)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for place, stage in sorted(begun.items(), key=lambda item: (list(layout.ARTIFACTS).index(item[1]), item[0])):
            found = walk.artifact(place, stage, place in promised)
            while some := list(islice(found, 64 * AT_ONCE)):  # of labels there may be millions
                yield from (f for f in some if isinstance(f, Damage))
                files = [f for f in some if isinstance(f, Stored)]
                yield from filter(None, threads.map(partial(walk.file, place, stage), files))


Found = Generator["Stored | Damage", None, Any]


class _Walk:
    def __init__(self, run: Folder, seen: Seen) -> None:
        self.run, self.seen = run, seen

    def artifact(self, place: str, stage: str, promised: bool) -> Found:
        """The files of an artifact that its records speak of, and the damage of the records themselves."""
        manifest = yield from self.record(place, stage, layout.MANIFEST, missing=promised)
        started = yield from self.record(place, stage, layout.STARTED, missing=manifest is not None)
        try:
            if manifest is not None and started is not None and started["identity"] != manifest["identity"]:
                yield self.damage(place, stage, layout.STARTED, "it has another identity than the manifest")
            facts = manifest or {}
            for name, row in facts.get(FILES, {}).items():
                yield Stored(name, row["sha256"], row["bytes"])
            yield from _KINDS[stage](self, place, facts)
        except OtherVersion as error:
            yield self.damage(place, stage, layout.MANIFEST, str(error))

    def record(self, place: str, stage: str, name: str, *, missing: bool, with_it: tuple[str, ...] = ()) -> Any:
        """A record's row, as the value of the generator; yields the damage of one that is missing or damaged."""
        path = posixpath.join(place, name)
        try:
            data = self.run.read(path)
        except FileNotFoundError:
            if missing:
                yield self.damage(place, stage, name, "it is missing, and was written", with_it)
            return None
        self.seen.files, self.seen.bytes = self.seen.files + 1, self.seen.bytes + len(data)
        try:
            row = checked(data, strict=True)
        except NotAsWritten as error:
            yield self.damage(place, stage, name, str(error), with_it)
            return None
        told = ""
        if name in (layout.STARTED, layout.MANIFEST):
            told = misfit(row, row.get("stage", stage) if name == layout.MANIFEST else None)
        elif stage in _PARTS:
            told = misfit_of(_PARTS[stage], row)
        if told:
            yield self.damage(place, stage, name, f"it was not written by this version of ddoq-ray: {told}", with_it)
            return None
        return Facts(row, self.run.path(path))

    def file(self, place: str, stage: str, stored: Stored) -> Damage | None:
        """Read a file; what is wrong with it."""
        path = posixpath.join(place, stored.name)
        digest = ""
        try:
            if stored.check is None:
                digest, size = self.run.digest(path)
            else:
                size = self.run.size(path)
        except FileNotFoundError:
            sized = f" of {stored.bytes:,} bytes" if stored.bytes is not None else ""
            return self.damage(place, stage, stored.name, f"it is missing; a file{sized} was written", stored.with_it)
        self.seen.files, self.seen.bytes = self.seen.files + 1, self.seen.bytes + size
        if stored.bytes is not None and size != stored.bytes:
            why = f"it has {size:,} bytes, {stored.bytes:,} were written"
        elif stored.check is not None:
            why = stored.check()
        elif digest != stored.sha256:
            why = f"its content has sha256 {digest[:12]}..., {stored.sha256[:12]}... was written"
        else:
            why = ""
        return self.damage(place, stage, stored.name, why, stored.with_it) if why else None

    def damage(self, place: str, stage: str, name: str, why: str, with_it: tuple[str, ...] = ()) -> Damage:
        aside = (name, *with_it, *(() if name == layout.STARTED else (layout.MANIFEST,)))
        names = tuple(dict.fromkeys(posixpath.join(place, n) for n in aside))
        return Damage(names[0], why, COMMANDS.get(stage, stage), names)


def _data(walk: _Walk, place: str, manifest: dict[str, Any]) -> Found:
    """The shards that prepare packed, and their records; given ones lie elsewhere and belong to the user."""
    records = set(walk.run.names(f"{place}/{layout.PACK_RECORDS}/*.json"))
    for index in (layout.SHARDS, layout.VAL_SHARDS) if manifest else ():
        try:
            text = walk.run.read(posixpath.join(place, index))
        except FileNotFoundError:
            continue
        if digest_of(text) != manifest.get(FILES, {}).get(index, {}).get("sha256"):
            continue  # which is told of the index itself
        for shard in read_shards(text):
            if not shard.sha256:
                continue
            name = posixpath.relpath(shard.path, place)
            record = f"{layout.PACK_RECORDS}/{posixpath.basename(name).removesuffix('.tar')}.json"
            yield Stored(name, shard.sha256, shard.bytes, (record,))
            yield from _checked(walk, place, "prepare", record, missing=bool(records), with_it=(name,))


def _checked(walk: _Walk, place: str, stage: str, name: str, *, missing: bool, with_it: tuple[str, ...] = ()) -> Found:
    """The damage of a record whose row is not looked at."""
    yield from walk.record(place, stage, name, missing=missing, with_it=with_it)


def _log(stage: str) -> Callable[[_Walk, str, dict[str, Any]], Found]:
    def walk_log(walk: _Walk, place: str, manifest: dict[str, Any]) -> Found:
        """A latent log: a done record a shard, which knows the shard's files."""
        shards = {layout.shard_index(posixpath.relpath(n, place)) for n in walk.run.names(f"{place}/shard-*")}
        shards |= set(range(manifest.get("shards", 0)))
        digests = []
        for shard in sorted(shards):
            name = f"{layout.shard_name(shard)}/{layout.DONE}"
            row = yield from walk.record(place, stage, name, missing=bool(manifest))
            if row is None:
                continue
            done = ShardDone.of(row)
            digests.append([chunk.sha256 for chunk in done.chunks])
            for chunk in done.chunks if manifest.get("kept", True) else ():
                yield Stored(chunk.file, chunk.sha256, None, (name,))
        if manifest and len(digests) == len(shards) and digest_of(digests) != manifest["digest"]:
            yield walk.damage(place, stage, layout.MANIFEST, "its digest is not that of the done records")

    return walk_log


def _codebook(walk: _Walk, place: str, manifest: dict[str, Any]) -> Found:
    """Parts of fixed class ranges, each with its record."""
    there = len(walk.run.names(f"{place}/{layout.CODEBOOK_PARTS}"))
    digests: list[str] = []
    for part in range(max(there, manifest.get("parts", 0))):
        file, record = layout.codebook_part(part), layout.codebook_record(part)
        row = yield from walk.record(place, "quantize", record, missing=bool(manifest), with_it=(file,))
        if row is not None:
            digests.append(row["digest"])
            yield Stored(file, row["digest"], row["bytes"], (record,))
    if manifest and len(digests) == manifest.get("parts") and digest_of(digests) != manifest["digest"]:
        yield walk.damage(place, "quantize", layout.MANIFEST, "its digest is not that of the parts")


def _images(walk: _Walk, place: str, manifest: dict[str, Any]) -> Found:
    """An image set: the manifest knows every shard; of an unfinished one the records do."""
    made = {row["name"]: row for row in manifest.get("shards", ())}
    names = {posixpath.basename(n).removesuffix(".json") for n in walk.run.names(f"{place}/{layout.image_record('*')}")}
    for name in sorted(made.keys() | names):
        record = layout.image_record(name)
        row = yield from walk.record(place, "synthesize", record, missing=name in made)
        row = made.get(name, row)
        if row is not None:
            yield Stored(f"{name}.tar", row["sha256"], row["bytes"], (record,))


def _labels(walk: _Walk, place: str, manifest: dict[str, Any]) -> Found:
    """Label files, each with a record of its row groups; the manifest knows how many there are."""
    grid = LabelGrid.recorded(manifest["grid"]) if "grid" in manifest else None
    if grid is None:  # unfinished: what lies in which file is not known
        for name in walk.run.names(f"{place}/{layout.LABEL_RECORDS}"):
            yield from _checked(walk, place, "label", posixpath.basename(name), missing=False)
        return
    for file in grid.all():
        row = yield from walk.record(place, "label", file.record, missing=True, with_it=(file.name,))
        if row is not None:
            opened = partial(_whole_labels, walk.run / place, grid, file, row["made_from"])
            yield Stored(file.name, "", row["bytes"], (file.record,), opened)


def _whole_labels(labels: Folder, grid: LabelGrid, file: LabelFile, made_from: str) -> str:
    """What is wrong with a label file; empty when nothing is."""
    try:
        OpenLabels(labels, grid, file, made_from).check()
    except ValueError as error:
        return str(error).split(": ", 1)[-1].split("; ")[0]
    return ""


def _nothing(walk: _Walk, place: str, manifest: dict[str, Any]) -> Found:
    """Files that the manifest names, and no others."""
    yield from ()


_KINDS: dict[str, Callable[[_Walk, str, dict[str, Any]], Found]] = {
    "prepare": _data,
    "encode": _log("encode"),
    "heldout": _log("heldout"),
    "quantize": _codebook,
    "synthesize": _images,
    "label": _labels,
    "train": _nothing,
}


def damaged_report(run: Folder, finished: set[str], seen: Seen) -> Iterator[Damage]:
    """The results of `evaluate` and `report`, each a record with the file that it was published with."""
    walk = _Walk(run, seen)
    for stage, name in (("evaluate", layout.EVALUATE), ("report", layout.RESULTS)):
        row = yield from walk.record(layout.REPORT, stage, name, missing=stage in finished)
        for file, facts in (row or {}).get(FILES, {}).items():
            damage = walk.file(layout.REPORT, stage, Stored(file, facts["sha256"], facts["bytes"], (name,)))
            if damage is not None:
                yield damage


def finished_stages(run: Folder) -> set[str]:
    """The stages that a run of this directory has finished, and none has begun again since, by ``events.jsonl``."""
    finished: set[str] = set()
    asked: set[str] = set()
    for event in events(run):
        if event.get("event") == "run started":
            asked = set(event.get("stages", ()))
            finished -= asked
        elif event.get("event") == "run finished":
            finished |= asked
    return finished


def events(run: Folder) -> Iterator[dict[str, Any]]:
    """The lines of ``events.jsonl`` that can be read: a killed driver may have left half of one.

    Of a line of another version, `time` and `stages` are left out where they are not of the kind that they have here.
    """
    try:
        lines = run.read(layout.EVENTS).splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield {key: value for key, value in row.items() if _fits(key, value)}


def _fits(key: str, value: Any) -> bool:
    if key == "time":
        return isinstance(value, (int, float)) and 0 <= value < YEAR_3000
    return key != "stages" or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def set_aside(run: Folder, found: list[Damage]) -> str:
    """Move the damaged files, and what must go with them, to a folder of their own; the folder's name.

    Their stages then find them gone, and make them anew. What a manifest still says of how its artifact was begun is
    written at once.
    """
    place = f"{layout.SET_ASIDE}/{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
    for name in dict.fromkeys(name for damage in found for name in damage.aside):
        try:
            data = run.read(name)
        except FileNotFoundError:
            continue
        run.publish(f"{place}/{name}", data)
        run.remove(name)
    for at in (posixpath.dirname(d.file) for d in found if posixpath.basename(d.file) == layout.STARTED):
        if run.exists(posixpath.join(at, layout.MANIFEST)):
            manifest = checked(run.read(posixpath.join(at, layout.MANIFEST)))
            began = {"stage": manifest["stage"], "identity": manifest["identity"]}
            run.publish_json(posixpath.join(at, layout.STARTED), with_check(began))
    return place
