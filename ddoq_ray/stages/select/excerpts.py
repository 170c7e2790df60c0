"""The chosen pictures of a data shard, one behind another in a file, until image shards are made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import NotAsWritten, checked, digest_of, with_check
from ddoq_ray.storage.folder import Folder


class Pick(NamedTuple):
    """A chosen image: its place among the usable ones of its class in its shard, and its rank in the class's picks."""

    class_id: int
    position: int
    rank: int


def write_excerpt(folder: Folder, shard: int, made_from: str, pictures: Iterable[tuple[Pick, bytes]]) -> int:
    """Publish the pictures, one at a time in memory, and then the record of where each is; how many there are."""
    rows: list[list[Any]] = []
    end = 0
    with folder.writing(layout.excerpt(shard)) as f:
        for pick, data in pictures:
            f.write(data)
            rows.append([pick.class_id, pick.rank, end, end + len(data), digest_of(data)])
            end += len(data)
    folder.publish_json(layout.excerpt_record(shard), with_check({"made_from": made_from, "pieces": rows}))
    return len(rows)


def finished_excerpts(folder: Folder, made_from: Mapping[int, str]) -> set[int]:
    """Which of these shards have an excerpt, left by a run that was cut off; what is damaged is made anew."""
    found = set()
    for shard, digest in made_from.items() if folder.exists("") else ():
        with contextlib.suppress(NotAsWritten, FileNotFoundError):
            row = checked(folder.read(layout.excerpt_record(shard)))
            if row.get("made_from") == digest and folder.exists(layout.excerpt(shard)):
                found.add(shard)
    return found


class Excerpts:
    """Pictures out of excerpts; the record of each shard is read once."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._pieces: dict[int, dict[tuple[int, int], tuple[int, int, str]]] = {}

    def picture(self, shard: int, class_id: int, rank: int) -> bytes:
        """The bytes of a picture.

        Raises:
            ValueError: They are not those that were written.
        """
        if shard not in self._pieces:
            row = checked(self.folder.read(layout.excerpt_record(shard)))
            self._pieces[shard] = {(c, r): (start, end, digest) for c, r, start, end, digest in row["pieces"]}
        start, end, digest = self._pieces[shard][class_id, rank]
        name = layout.excerpt(shard)
        data = self.folder.read_range(name, start, end)
        if digest_of(data) != digest:
            raise ValueError(
                f"{self.folder.path(name)} is damaged: bytes {start} to {end} are not what was written; remove the "
                f"folder {self.folder.uri} and run again"
            )
        return data
