"""Collections whose images lie many to a file, in an order that is not the shards': parquet, and tars to be re-sorted.

Each file is read once, front to back, and its images laid one after another in a scratch file; any of them is then a
range of bytes. Picking single rows out of the files themselves would read nearly all of them for every shard.
"""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from ddoq_ray.data.collections.listing import Picture, Source
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.quarantine import Refusal
from ddoq_ray.storage.transport import read_range


def row_names(container: int, rows: Sequence[int]) -> list[str]:
    return [f"{container:06d}#{row:09d}" for row in rows]


class Containers(Source):
    """A source that is unpacked before it is read."""

    @abstractmethod
    def images(self, container: int) -> Iterator[tuple[bytes, str]]:
        """(bytes, extension or "") of each row of a file, in its order; empty bytes where there are none."""

    def unpack(self, container: int, scratch: Folder) -> None:
        index = f"{container:06d}.npz"
        if scratch.exists(index):
            return
        ends, extensions, end = [0], [], 0
        with scratch.writing(f"{container:06d}.bin") as f:
            for data, extension in self.images(container):
                f.write(data)
                end += len(data)
                ends.append(end)
                extensions.append(extension)
        out = io.BytesIO()
        np.savez(out, ends=np.asarray(ends, np.int64), extensions=np.asarray(extensions, dtype="U8"))
        scratch.publish(index, out.getvalue())  # after the bytes: where it is, they are

    def read(self, split: str, names: Sequence[str], scratch: Folder) -> Iterator[Picture | Refusal]:
        indices: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in names:
            container, _, row = name.partition("#")
            if container not in indices:
                with np.load(io.BytesIO(scratch.read(f"{container}.npz"))) as stored:
                    indices[container] = (stored["ends"], stored["extensions"])
            ends, extensions = indices[container]
            start, end = (int(e) for e in ends[int(row) : int(row) + 2])
            data = read_range(scratch.path(f"{container}.bin"), start, end) if end > start else b""
            yield Picture(data, str(extensions[int(row)]) or None) if data else Refusal(name, "no image bytes")
