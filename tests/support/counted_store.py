"""A store in memory that tells what was asked of it: `counted://`."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Counted(MemoryFileSystem):
    """(file, bytes) of every answer in `reads`, and the number of listings; `memory://` has the same files."""

    protocol = "counted"
    cachable = False
    reads: list[tuple[str, int]] = []  # noqa: RUF012 (of the class on purpose: instances come and go)
    listings = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        data = super().cat_file(path, start=start, end=end, **kwargs)
        self.reads.append((path.rsplit("/", 1)[-1], len(data)))
        return data

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        type(self).listings += 1
        return super().find(path, *args, **kwargs)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("counted://", "memory://"))

    @classmethod
    def read_of(cls, ending: str) -> list[int]:
        """The sizes of the answers about files of this ending."""
        return [size for name, size in cls.reads if name.endswith(ending)]


def counted_store() -> str:
    """The URL of an empty store whose counts begin at nothing."""
    fsspec.register_implementation("counted", Counted, clobber=True)
    store = MemoryFileSystem()
    if store.exists("/store"):
        store.rm("/store", recursive=True)
    Counted.reads.clear()
    Counted.listings = 0
    return "counted://store"
