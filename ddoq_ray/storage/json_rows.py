"""Rows of a record as the JSON that they are written as: a manifest may hold 20,000, and none is held as a dict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any


def canonical(value: Any) -> str:
    """JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


class Rows(Collection[dict[str, Any]]):
    """Rows in order, of which each may come at any time; 0.2 kB each where a dict of the same takes 0.6.

    >>> rows = Rows(2)
    >>> rows.put(1, {"images": 3})
    >>> rows.missing(), list(rows), len(rows)
    ([0], [{'images': 3}], 2)
    """

    def __init__(self, count: int) -> None:
        self._texts = [b""] * count

    def put(self, index: int, row: Mapping[str, Any]) -> None:
        self._texts[index] = canonical(row).encode()

    def missing(self) -> list[int]:
        """Indices of rows that have not come."""
        return [index for index, text in enumerate(self._texts) if not text]

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Those that have come, each made when it is asked for."""
        return (json.loads(text) for text in self._texts if text)

    def __contains__(self, row: object) -> bool:
        return canonical(row).encode() in self._texts


def digest_of_each(values: Iterable[Any]) -> str:
    """sha256 (hex) of the canonical JSON of a list, of which one value at a time is held.

    >>> digest_of_each("ab") == hashlib.sha256(canonical(["a", "b"]).encode()).hexdigest()
    True
    """
    return _sha256(_listed(map(canonical, values)))


def digest_of_record(row: Mapping[str, Any]) -> str:
    """sha256 (hex) of a record's canonical JSON; `Rows` in it are as a list of them."""

    def pieces() -> Iterator[str]:
        for number, key in enumerate(sorted(row)):
            yield f"{',' if number else '{'}{canonical(key)}:"
            value = row[key]
            yield from _listed(map(canonical, value)) if isinstance(value, Rows) else (canonical(value),)
        yield "}" if row else "{}"

    return _sha256(pieces())


def printed(value: Any) -> Iterator[str]:
    """JSON for people, piece by piece: a line a fact, keys sorted; `Rows` in a record are as a list of them.

    >>> print("".join(printed({"b": 1, "a": Rows(0)})))
    {
     "a": [],
     "b": 1
    }
    """
    encoder = json.JSONEncoder(indent=1, sort_keys=True, default=str, allow_nan=False)  # NaN is no JSON
    if not isinstance(value, dict) or not any(isinstance(each, Rows) for each in value.values()):
        yield from encoder.iterencode(value)  # `dumps` keeps all pieces until the last: ten times the file
        return

    def indented(part: Any, depth: int) -> str:
        return encoder.encode(part).replace("\n", "\n" + " " * depth)  # within a text a new line is written as \\n

    for number, key in enumerate(sorted(value)):
        yield f"{',' if number else '{'}\n {json.dumps(key)}: "
        part = value[key]
        if isinstance(part, Rows):
            yield from _listed((f"\n  {indented(each, 2)}" for each in part), last="\n ")
        else:
            yield indented(part, 1)
    yield "\n}"


def _listed(items: Iterable[str], last: str = "") -> Iterator[str]:
    """A JSON list of texts; `last` before its end, where it has any."""
    some = False
    yield "["
    for item in items:
        yield f",{item}" if some else item
        some = True
    yield f"{last}]" if some else "]"


def _sha256(pieces: Iterable[str]) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece.encode())
    return found.hexdigest()
