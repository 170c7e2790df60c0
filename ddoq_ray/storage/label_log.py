"""Stored soft labels: a folder an epoch with a file an image shard, written and read here.

Each file holds the rows (image_id, epoch, packed label) of its shard in image order, with a checksum a page. Beside
labels of the `features` codec lies the teacher's linear head, by which they are decoded.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.parquet import table_bytes
from ddoq_ray.storage.records import binary_rows, fixed_binary, label_schema


def label_file(epoch: int, shard: str) -> str:
    return f"{layout.epoch_folder(epoch)}/{shard}.parquet"


def write_labels(
    labels: Folder, shard: str, epoch: int, image_ids: npt.NDArray[np.int64], rows: npt.NDArray[np.uint8], codec: str
) -> int:
    """Publish the labels of an image shard at an epoch; the file's size in bytes.

    Args:
        image_ids: int64 [N], positions of the images in their set.
        rows: uint8 [N, nbytes], packed by `codec`.
    """
    table = pa.Table.from_arrays(
        [pa.array(image_ids), pa.array(np.full(len(image_ids), epoch, np.int32)), fixed_binary(rows)],
        schema=label_schema(codec, rows.shape[1]),
    )
    data = table_bytes(table, checksums=True)
    labels.publish(label_file(epoch, shard), data)
    return len(data)


def published_labels(labels: Folder, shards: list[str], epochs: int) -> npt.NDArray[np.bool_]:
    """bool [image shards, epochs]: which files are there. Listed an epoch at a time: there may be millions in all."""
    place = {f"{name}.parquet": i for i, name in enumerate(shards)}
    found = np.zeros((len(shards), epochs), bool)
    for folder in labels.names("epoch-*"):
        epoch = int(folder.removeprefix("epoch-"))
        if epoch < epochs:
            there = (place.get(name.rpartition("/")[2]) for name in labels.names(f"{folder}/*.parquet"))
            found[[i for i in there if i is not None], epoch] = True
    return found


def read_labels(labels: Folder, epoch: int) -> np.ndarray:
    """uint8 [N, nbytes]: the stored labels of an epoch, in image order.

    Raises:
        ValueError: When labels of the epoch, or of an image shard in it, are missing or damaged.
    """
    parts, offset = [], 0
    for shard in Artifact(labels, "label").require()["shards"]:
        parts.append(_read_part(labels, epoch, shard["name"], offset, shard["images"]))
        offset += shard["images"]
    return np.concatenate(parts)


def _read_part(labels: Folder, epoch: int, shard: str, offset: int, images: int) -> np.ndarray:
    name = label_file(epoch, shard)
    mend = f"remove {labels.path(layout.MANIFEST)} and run the label stage again, which makes what is missing"
    try:
        table = pq.read_table(io.BytesIO(labels.read(name)), page_checksum_verification=True)
    except FileNotFoundError:
        raise ValueError(
            f"{labels.path(name)} is missing: there are no labels of epoch {epoch} for {shard}; {mend}"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{labels.path(name)} is damaged ({str(error).splitlines()[0]}); remove it, {mend}") from error
    if not np.array_equal(table["image_id"].to_numpy(), np.arange(offset, offset + images)):
        raise ValueError(
            f"{labels.path(name)} holds labels of {table.num_rows} images, and not those of images {offset} to "
            f"{offset + images - 1} in their order; remove it, {mend}"
        )
    return binary_rows(table["label"], "u1")
