"""Snapshots of quantizer actors: named arrays of each open class, in one Arrow stream, written class by class.

The file ends with a digest of all that is before it. A snapshot only saves work: one that is damaged is left out, and
its classes are read from the log anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import IO

import numpy as np
import pyarrow as pa

from ddoq_ray.storage.folder import Folder

SCHEMA = pa.schema(
    [
        ("class_id", pa.int32()),
        ("field", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.string()),
        ("data", pa.large_binary()),
    ]
)

Arrays = Mapping[str, np.ndarray]


def write_snapshot(folder: Folder, name: str, identity: str, classes: Iterable[tuple[int, Arrays]]) -> None:
    """Publish the arrays of each class. One class at a time is copied: a snapshot must not double an actor's memory."""
    schema = SCHEMA.with_metadata({"identity": identity})
    with folder.writing(name) as f:
        with pa.OSFile(f.name, "wb") as file, pa.ipc.new_stream(file, schema) as out:
            for class_id, arrays in classes:
                rows = [(class_id, k, v.dtype.str, json.dumps(v.shape), v.tobytes()) for k, v in arrays.items()]
                columns = [pa.array(column, g.type) for column, g in zip(zip(*rows, strict=True), schema, strict=True)]
                out.write_batch(pa.record_batch(columns, schema=schema))
        with open(f.name, "rb") as written:
            digest = _digests(written)[0]
        with open(f.name, "ab") as file:
            file.write(digest)  # behind the end of the stream, where its reader stops


def read_snapshots(
    folder: Folder, identity: str, damaged: list[str] | None = None
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(class_id, its arrays) of every snapshot in ``snapshots/``; a class may come from several.

    Args:
        damaged: Takes the paths of the snapshots that are left out because they are not what was written.

    Raises:
        ValueError: When a snapshot belongs to another configuration.
    """
    for name in folder.names("snapshots/*.arrow"):
        with folder.reading(name) as f:
            _, before, last = _digests(f)
        if before != last:
            if damaged is not None:
                damaged.append(folder.path(name))
            continue
        with folder.reading(name) as f, pa.ipc.open_stream(f) as snapshot:
            if snapshot.schema.metadata[b"identity"].decode() != identity:
                raise ValueError(
                    f"snapshot {folder.path(name)} belongs to another configuration; use another run_dir, or "
                    "overwrite=true"
                )
            for batch in snapshot:
                arrays = {
                    row["field"]: np.frombuffer(row["data"], row["dtype"]).reshape(json.loads(row["shape"]))
                    for row in batch.to_pylist()
                }
                yield batch["class_id"][0].as_py(), arrays


def _digests(f: IO[bytes]) -> tuple[bytes, bytes, bytes]:
    """Of a file: the digest of all of it, that of all but its last 32 bytes, and these; read piece by piece."""
    sha, size = hashlib.sha256(), hashlib.sha256().digest_size
    last = b""
    while piece := f.read(1 << 20):
        last += piece
        sha.update(last[:-size])
        last = last[-size:]
    before = sha.digest()
    sha.update(last)
    return sha.digest(), before, last
