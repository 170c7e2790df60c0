"""Row groups of a Parquet file read alone, each with a digest of its bytes that was taken when the file was written.

Parquet's own checksums, of each page, leave out the pages' headers and the footer; and a file that has them is another
one than the same rows without.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ddoq_ray.storage.artifact import digest_of

MAGIC = b"PAR1"  # a Parquet file begins and ends with it


class DamagedGroup(Exception):
    """A row group that has other bytes than were written; `group` is its place in the file."""

    def __init__(self, group: int) -> None:
        """Keep the place for callers that know what it holds."""
        super().__init__(f"row group {group} has other bytes than were written")
        self.group = group


def file_digests(path: str) -> tuple[list[str], list[Any]]:
    """sha256 (hex) of each row group of a file as `row_group_writer` writes it; [first byte, sha256] of its footer."""
    metadata = pq.read_metadata(path)
    groups, end = [], len(MAGIC)
    with open(path, "rb") as f:
        for group in range(metadata.num_row_groups):
            start, end = span_of(metadata, [group])
            f.seek(start)
            groups.append(digest_of(f.read(end - start)))
        f.seek(end)
        return groups, [end, digest_of(f.read())]


def metadata_of(footer: bytes) -> pq.FileMetaData:
    """What a footer says, from its first byte to the end of the file."""
    return pq.read_metadata(pa.BufferReader(MAGIC + footer))


def span_of(metadata: pq.FileMetaData, groups: Sequence[int]) -> tuple[int, int]:
    """The bytes of neighbouring row groups: the first, and the one after the last. There are no dictionaries."""
    first, last = metadata.row_group(groups[0]), metadata.row_group(groups[-1])
    columns = [last.column(i) for i in range(metadata.num_columns)]
    return (
        min(first.column(i).data_page_offset for i in range(metadata.num_columns)),
        max(c.data_page_offset + c.total_compressed_size for c in columns),
    )


def read_groups(metadata: pq.FileMetaData, groups: Sequence[int], data: bytes, digests: Sequence[str]) -> pa.Table:
    """The rows of neighbouring row groups, from their bytes (`span_of`).

    Raises:
        DamagedGroup: The first whose bytes do not have their digest.
    """
    view, first = memoryview(data), span_of(metadata, groups)[0]
    for group, digest in zip(groups, digests, strict=True):
        start, end = span_of(metadata, [group])
        if digest_of(bytes(view[start - first : end - first])) != digest:
            raise DamagedGroup(group)
    source = pa.PythonFile(_Cut(first, view), mode="r")
    return pq.ParquetFile(source, metadata=metadata).read_row_groups(list(groups))


class _Cut(io.RawIOBase):
    """A file of which only the bytes from `first` on are at hand."""

    def __init__(self, first: int, data: memoryview) -> None:
        self._first, self._data, self._at = first, data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        end = self._first + len(self._data)
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: end}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        start = self._at - self._first
        assert 0 <= start <= len(self._data), "a reader of row groups reads nothing else"
        data = self._data[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
