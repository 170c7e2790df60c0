"""Quarantine: what cannot be used, with the reason, one JSON line each, in ``quarantine/*.jsonl``.

A line names a sample of a shard (``key`` and the byte offset of its first member), a file or row of a collection
(``name``) or a whole shard (``shard``). `samples` is there where one line stands for several, and always of a shard.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ddoq_ray.storage.folder import Folder

What = Literal["key", "name", "shard"]  # the field of a line that says what is refused


@dataclass(frozen=True)
class Refusal:
    """A sample, file, row or shard that is not used, and why.

    Attributes:
        name: A sample's key, a file's name in the source's own words, a shard's path.
        reason: ``kind`` or ``kind: detail``.
        samples: More than 1 where damage took more, as far as can be told.
        offset: Byte offset of a sample's first member in its tar; None of what is in none, or is not known.
    """

    name: str
    reason: str
    samples: int = 1
    offset: int | None = None

    @property
    def kind(self) -> str:
        """The reason without the details that make it unique."""
        return self.reason.partition(":")[0]


def refusal_lines(refusals: Iterable[Refusal], what: What) -> bytes:
    """The lines of a quarantine file. Names that are no UTF-8 keep the bytes that they have on the disk."""
    lines = []
    for r in refusals:
        row: dict[str, Any] = {what: r.name}
        if what == "key":
            row["offset"] = r.offset
        row["reason"] = r.reason
        if r.samples > 1 or what == "shard":
            row["samples"] = r.samples
        lines.append(json.dumps(row, ensure_ascii=what != "name") + "\n")
    return "".join(lines).encode("utf-8", "surrogateescape")


def publish_refusals(folder: Folder, file: str, refusals: Iterable[Refusal], what: What) -> None:
    """Publish the refusals in a file of a quarantine folder; no file where there are none."""
    if lines := refusal_lines(refusals, what):
        folder.publish(file, lines)


def read_refusals(folder: Folder, pattern: str) -> Iterator[tuple[str, Refusal]]:
    """(file, refusal) of every line of the files of a quarantine folder that match a glob."""
    for file in folder.names(pattern):
        for line in folder.read(file).splitlines():
            row = json.loads(line)
            name = next(row[what] for what in ("key", "name", "shard") if what in row)
            yield file, Refusal(name, row["reason"], row.get("samples", 1), row.get("offset"))


def refused_kinds(refusals: Iterable[Refusal]) -> Counter[str]:
    """Samples by the kind of reason that they are refused for, in the order in which the kinds come."""
    kinds: Counter[str] = Counter()
    for r in refusals:
        kinds[r.kind] += r.samples
    return kinds
