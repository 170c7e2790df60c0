"""A file that is read as ever, and whose content is compared with what was written at the end.

A shard is read once, from the network too; so its digest is taken from the bytes that pass.
"""

from __future__ import annotations

import hashlib
from typing import IO, Any

BLOCK_BYTES = 1 << 20


class Digested:
    """Each byte of a file is digested once, in its order, wherever the reader seeks."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._at = 0  # bytes before this one are digested

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()
        if start > self._at:
            self._pass_over(start)
        data = self._file.read(size)
        end = start + len(data)
        if end > self._at:
            self._sha256.update(memoryview(data)[self._at - start :])
            self._at = end
        return data

    def hexdigest(self) -> str:
        """sha256 of the whole file; what nobody has read is read for it."""
        self._pass_over()
        return self._sha256.hexdigest()

    def _pass_over(self, end: int | None = None) -> None:
        """Digest what was skipped, up to `end`, and be there."""
        self._file.seek(self._at)
        while data := self._file.read(BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - self._at)):
            self._sha256.update(data)
            self._at += len(data)
        if end is not None:
            self._file.seek(end)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
