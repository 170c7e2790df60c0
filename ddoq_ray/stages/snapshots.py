"""Snapshots of quantizer actors: named arrays of each open class, in one Arrow stream, written class by class."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa

from ddoq_ray.artifacts import Folder

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
    with folder.writing(name) as f, pa.OSFile(f.name, "wb") as file, pa.ipc.new_stream(file, schema) as out:
        for class_id, arrays in classes:
            rows = [(class_id, k, v.dtype.str, json.dumps(v.shape), v.tobytes()) for k, v in arrays.items()]
            columns = [pa.array(column, g.type) for column, g in zip(zip(*rows, strict=True), schema, strict=True)]
            out.write_batch(pa.record_batch(columns, schema=schema))


def read_snapshots(folder: Folder, identity: str) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(class_id, its arrays) of every snapshot in ``snapshots/``; a class may come from several.

    Raises:
        ValueError: When a snapshot belongs to another configuration.
    """
    for name in folder.names("snapshots/*.arrow"):
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
