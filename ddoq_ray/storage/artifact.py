"""A stage's output: one manifest, and the rule for resuming.

A stage's life: `Artifact.begin(identity)` says whether its output is `done` (a manifest with the same identity),
`open` (begun with the same identity and cut off) or new; the stage publishes its files; `Artifact.finish` writes
``manifest.json`` last. Another identity in the same place is an error that names the differing keys; with
`overwrite` the output that differs is removed and made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ddoq_ray.storage import layout
from ddoq_ray.storage.fitting_facts import Facts, misfit, other_version
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.json_rows import Rows, canonical, digest_of_record

Status = Literal["new", "open", "done"]
CHECK = "check"  # in a record: sha256 of the rest of it
FILES = "files"  # in a record: name -> bytes and sha256 of files beside it that have no record of their own


def digest_of(value: Any) -> str:
    """sha256 (hex) of bytes, or of the canonical JSON of anything else."""
    data = value if isinstance(value, bytes) else canonical(value).encode()
    return hashlib.sha256(data).hexdigest()


def with_check(row: Mapping[str, Any]) -> dict[str, Any]:
    """A record with a digest of itself, of what JSON gives back of it."""
    rest = {key: value for key, value in row.items() if key != CHECK}
    if not _as_read(rest):  # else not taken apart: a manifest may hold 20,000 rows
        kept = {key: value for key, value in rest.items() if isinstance(value, Rows)}
        rest = json.loads(canonical({key: value for key, value in rest.items() if key not in kept})) | kept
    return rest | {CHECK: digest_of_record(rest)}


def _as_read(value: Any) -> bool:
    """Whether JSON gives a value back as it is."""
    if isinstance(value, dict):
        return all(type(key) is str and _as_read(each) for key, each in value.items())
    if type(value) is list:
        return all(map(_as_read, value))
    return type(value) in (str, int, float, bool, type(None), Rows)


class NotAsWritten(Exception):
    """A record that is no JSON object, or whose digest is not that of the rest of it."""


def checked(data: bytes, *, strict: bool = False) -> dict[str, Any]:
    """A record's row, without its digest.

    Args:
        strict: Refuse a record without a digest, which older versions wrote.

    Raises:
        NotAsWritten: It is not what was written.
    """
    try:
        row = json.loads(data)
    except (ValueError, RecursionError):  # the latter of brackets without end
        raise NotAsWritten("it is no JSON") from None
    if not isinstance(row, dict):
        raise NotAsWritten("it is no record")
    check = row.pop(CHECK, None)
    if check is None and strict:
        raise NotAsWritten("it has no digest of itself")
    if check is not None and check != digest_of(row):
        raise NotAsWritten("it is not as it was written")
    return row


def file_facts(folder: Folder, patterns: Iterable[str]) -> dict[str, dict[str, Any]]:
    """name -> bytes and sha256 of the files of a folder that match."""
    found = {}
    for name in (name for pattern in patterns for name in folder.names(pattern)):
        digest, size = folder.digest(name)
        found[name] = {"bytes": size, "sha256": digest}
    return found


def as_recorded(folder: Folder, name: str, facts: Mapping[str, Any] | None, command: str) -> bytes:
    """A file, as `file_facts` in a record of `command` knows it; None: the record is of an older version.

    Raises:
        ValueError: It is missing, or is not the one that was written.
    """
    path = folder.path(name)
    try:
        data = folder.read(name)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing although it was written; {repair(command)}") from None
    if facts is not None and digest_of(data) != facts["sha256"]:
        raise ValueError(
            f"{path} is damaged: {facts['bytes']:,} bytes of another content were written; {repair(command)}"
        )
    return data


def repair(command: str) -> str:
    """What to do about a damaged file of the stage of a command."""
    return f"`ddoq-ray verify RUN repair=true` has {command} make it anew"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for each leaf in which two nested mappings differ."""
    lines: list[str] = []
    for key in sorted(set(old) | set(new)):
        name = f"{prefix}{key}"
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{name}.")
        elif canonical(a) != canonical(b):
            lines.append(f"{name}: {canonical(a)} there, {canonical(b)} now")
    return lines


def _part(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Of a recorded identity what `asked` has keys for, nested mappings too."""
    part = {}
    for key, value in asked.items():
        there = recorded.get(key)
        part[key] = _part(there, value) if isinstance(there, Mapping) and isinstance(value, Mapping) else there
    return part


class Artifact:
    """A stage's output folder with its `started.json` and `manifest.json`."""

    def __init__(self, folder: Folder, stage: str, *, command: str | None = None) -> None:
        """`stage` is the word in its manifest; `command` the stage's command, where that is another word."""
        self.folder = folder
        self.stage = stage
        self.command = command or stage

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a finished output; None when there is none.

        Raises:
            ValueError: It is damaged, or of another version of this package.
        """
        try:
            return self._record(layout.MANIFEST, self.stage)
        except FileNotFoundError:
            return None

    def _record(self, name: str, stage: str | None = None) -> dict[str, Any]:
        try:
            row = checked(self.folder.read(name))
        except NotAsWritten as error:
            raise ValueError(
                f"{self.folder.path(name)} is damaged: {error}; remove it and run the {self.command} stage again "
                f"(ddoq-ray {self.command} ...), which keeps what is whole"
            ) from None
        if told := misfit(row, stage):
            raise other_version(self.folder.path(name), told)
        return Facts(row, self.folder.path(name))

    def _recorded(self) -> tuple[dict[str, Any] | None, Status]:
        manifest = self.manifest()
        if manifest is not None:
            return manifest["identity"], "done"
        try:
            return self._record(layout.STARTED)["identity"], "open"
        except FileNotFoundError:
            return None, "new"

    def check(self, identity: Mapping[str, Any], *, partial: bool = False) -> Status:
        """Compare what is there with what is wanted, as far as `identity`'s keys go; write nothing.

        Args:
            partial: The identity is what is known so far: nested mappings, too, are compared as far as its keys go.

        Raises:
            ValueError: When the folder holds the output of another configuration or of other inputs.
        """
        recorded, status = self._recorded()
        if recorded is None:
            return "new"
        there = _part(recorded, identity) if partial else {k: recorded.get(k) for k in identity}
        lines = differences(there, identity)
        if lines:
            raise ValueError(
                f"{self.folder.uri} holds the {self.stage} stage of another configuration:\n  "
                + "\n  ".join(lines[:12])
                + "\nTo go on with what is there, give the keys that it was made with, a single stage's too (the run "
                "directory's config.yaml holds them: `path: x` below `dataset:` is dataset.path=x). Else use another "
                "run_dir, or overwrite=true to make this stage and all after "
                "it anew."
            )
        return status

    def begin(self, identity: Mapping[str, Any], *, overwrite: bool = False) -> Status:
        """`check`, then record that this identity has begun. With `overwrite`, an output that differs goes first."""
        try:
            status = self.check(identity)
        except ValueError:
            if not overwrite:
                raise
            self.folder.remove()
            status = "new"
        if status == "new":
            self.folder.publish_json(layout.STARTED, with_check({"stage": self.stage, "identity": identity}))
        return status

    def finish(self, identity: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """Publish the manifest: the identity, its digest, and facts such as seconds, items, bytes, digest and `Rows`.

        The output is complete then, so what killed or late writers left behind is removed first.
        """
        self.folder.sweep()
        manifest = {"stage": self.stage, "identity": identity, "identity_digest": digest_of(identity), **facts}
        if files := file_facts(self.folder, layout.IN_MANIFEST.get(self.stage, ())):
            manifest[FILES] = files
        self.folder.publish_json(layout.MANIFEST, with_check(manifest))
        return manifest

    def amend(self, *files: str, **facts: Any) -> None:
        """Change facts of a finished output's manifest, and the digests of `files` that were written anew."""
        manifest = self.manifest()
        if manifest is None:
            return
        amended = manifest | facts
        if files:
            amended[FILES] = manifest.get(FILES, {}) | file_facts(self.folder, files)
        if amended != manifest:
            self.folder.publish_json(layout.MANIFEST, with_check(amended))

    def done(self, identity: Mapping[str, Any]) -> bool:
        """Whether the output of exactly this identity is finished; write nothing, raise nothing."""
        recorded, status = self._recorded()
        return status == "done" and recorded is not None and not differences(recorded, identity)

    def read(self, name: str) -> bytes:
        """A file of a finished output, as its manifest knows it.

        Raises:
            ValueError: It is missing, or is not the one that was written.
        """
        return as_recorded(self.folder, name, self.require().get(FILES, {}).get(name), self.command)

    def require(self) -> dict[str, Any]:
        """The manifest, or a clear error that says which stage to run first."""
        manifest = self.manifest()
        if manifest is None:
            raise ValueError(
                f"{self.folder.uri} is not finished: run the {self.command} stage first (ddoq-ray {self.command} ...)"
            )
        return manifest
