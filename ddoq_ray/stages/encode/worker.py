"""An encoder actor: a chunk of pixels becomes a file of latents. Also the tasks beside it: joining a shard's chunks
into few files, and finding the micro-batch.

A chunk that is a whole shard is published as the shard's file at once. Others wait as parts in ``parts/`` until all of
their shard are there; `join_chunks` then makes its files of them. Each file is a function of the shard alone, so a part
or a file that is written twice has the same bytes, whoever wrote it and when.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.workers import device, pin_threads
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_log import FILE_BYTES
from ddoq_ray.storage.layout import PARTS, shard_name
from ddoq_ray.storage.parquet import table_bytes
from ddoq_ray.storage.quarantine import Refusal, publish_refusals
from ddoq_ray.storage.records import ChunkRecord, ClassCounts, binary_rows, fixed_binary, latent_schema

if TYPE_CHECKING:  # torch: only in the actor
    from ddoq_ray.models.autoencoder import Autoencoder
    from ddoq_ray.models.encoding import Encoding

NON_FINITE = "non-finite latent: the autoencoder gave infinity or not a number"
GAIN = 1.03  # a larger micro-batch must be this much faster to be worth its memory


@dataclass(frozen=True)
class EncoderSettings:
    """What an encoder must know: small values only, so that an actor can be made anywhere at any time.

    Attributes:
        path: Folder or hub id of the autoencoder, or of a prior that holds it.
        latent_shape: (C, h, w) of one latent.
        image_size: Side of the images, in pixels.
        gpu_share: The part of a GPU that this encoder may fill.
    """

    path: str
    prior_id: str
    latent_shape: tuple[int, ...]
    image_size: int
    batch: int
    threads: int
    seed: int
    posterior: Literal["mode", "sample"]
    dtype: str
    channels_last: bool
    compile: bool
    gpu_share: float

    @staticmethod
    def of(config: RunConfig, networks: Networks, batch: int) -> EncoderSettings:
        own = config.encoder
        return EncoderSettings(
            path=own.path or config.prior.given,
            prior_id=networks.latents_id,
            latent_shape=tuple(networks.latent_shape),
            image_size=networks.image_size,
            batch=batch,
            threads=config.cluster.threads,
            seed=config.seed,
            posterior=own.posterior,
            dtype=own.dtype,
            channels_last=own.channels_last,
            compile=own.compile,
            gpu_share=min(1.0, config.cluster.encoder.num_gpus),
        )

    @property
    def encoding(self) -> Encoding:
        from ddoq_ray.models.encoding import Encoding  # torch: only in the actor

        return Encoding(self.latent_shape, self.batch, self.posterior, self.seed, one_shape=self.compile)


class Encoder:
    """Ray Data actor: a chunk of pixels becomes one file of latents; only its record goes back.

    Two chunks may be in hand at once: while one is computed the other is read, copied or published.
    """

    def __init__(self, settings: EncoderSettings, latents: Folder, quarantine: Folder | None = None) -> None:
        from ddoq_ray.models.encoding import LatentEncoder  # torch: only in the actor

        self.settings = settings
        self.folder = latents
        self.quarantine = quarantine or latents / layout.QUARANTINE
        self.encoder = LatentEncoder(place_autoencoder(settings), settings.encoding)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        shard, chunk, last = int(batch["shard"][0]), int(batch["chunk"][0]), bool(batch["last"][0])
        whole = last and chunk == 0
        place = shard_name(shard) if whole else f"{PARTS}/{shard_name(shard)}"
        record, refused = self.publish(batch, f"{place}/{layout.chunk_file(chunk)}")
        name = f"{shard_name(shard)}.latents-{chunk:05d}.jsonl"
        publish_refusals(self.quarantine, name, (Refusal(key, NON_FINITE) for key in refused), "key")
        return {
            "shard": [shard],
            "chunk": [chunk],
            "last": [last],
            "refused": [int(batch["refused"][0]) + len(refused)],
            "record": [json.dumps(record.to_json())],
        }

    def publish(self, row: dict[str, Any], name: str) -> tuple[ChunkRecord, list[str]]:
        """Encode a row of `read_chunks` into the file `name` of the log; its record, and the keys that are not in it.

        Those are the samples whose latent is not finite.
        """
        from ddoq_ray.models.encoding import not_finite

        keys = json.loads(row["keys"][0])
        class_ids = np.frombuffer(row["class_ids"][0], np.int32)
        size = self.settings.image_size
        pixels = np.frombuffer(row["pixels"][0], np.uint8).reshape(len(keys), size, size, 3)
        latents = self.encoder.encode(pixels, keys)
        bad = not_finite(latents)
        refused = [keys[i] for i in bad]
        if refused:
            kept = np.setdiff1d(np.arange(len(keys)), bad)
            keys, class_ids, latents = [keys[i] for i in kept], class_ids[kept], latents[kept]
        schema = latent_schema(self.settings.latent_shape, self.settings.prior_id)
        return write_file(self.folder, name, keys, class_ids, latents, schema), refused


def place_autoencoder(settings: EncoderSettings) -> Autoencoder:
    """The autoencoder in this process, on the part of a device that is its own."""
    import torch  # only in the actor

    from ddoq_ray.models.autoencoder import load_autoencoder

    pin_threads(settings.threads)
    on = device()
    if on == "cuda" and settings.gpu_share < 1:
        torch.cuda.set_per_process_memory_fraction(settings.gpu_share)
    how = {"dtype": settings.dtype, "channels_last": settings.channels_last, "compile": settings.compile}
    return load_autoencoder(settings.path, device=on, **how)


def write_file(
    folder: Folder,
    name: str,
    keys: Sequence[str],
    class_ids: npt.NDArray[np.int32],
    latents: npt.NDArray[np.float16],
    schema: pa.Schema,
) -> ChunkRecord:
    """Write a file of the log: a class's rows lie together, in the order in which they came."""
    order = np.argsort(class_ids, kind="stable")
    columns = [
        pa.array([keys[i] for i in order], pa.string()),
        pa.array(class_ids[order]),
        fixed_binary(latents[order]),
    ]
    data = table_bytes(pa.Table.from_arrays(columns, schema=schema))
    folder.publish(name, data)
    return ChunkRecord(name, len(keys), ClassCounts(Counter(class_ids.tolist())), digest_of(data))


def join_chunks(
    latents: Folder, shard: int, parts: Sequence[ChunkRecord], file_bytes: int = FILE_BYTES
) -> list[ChunkRecord]:
    """The files of a shard from its parts, in their order: as many parts in a file as `file_bytes` of latents hold.

    The parts stay: this may run again.
    """
    files = []
    for number, group in enumerate(_groups(latents, parts, file_bytes)):
        tables = []
        for part in group:
            data = latents.read(part.file)
            assert digest_of(data) == part.sha256, f"{latents.path(part.file)} changed after it was encoded"
            tables.append(pq.read_table(pa.BufferReader(data)))
        table = pa.concat_tables(tables)
        class_ids = table["class_id"].to_numpy().astype(np.int32)
        rows = binary_rows(table["latent"], "<f2")
        name = f"{shard_name(shard)}/{layout.chunk_file(number)}"
        files.append(write_file(latents, name, table["key"].to_pylist(), class_ids, rows, tables[0].schema))
    return files


def _groups(latents: Folder, parts: Sequence[ChunkRecord], file_bytes: int) -> Iterator[list[ChunkRecord]]:
    """Runs of parts whose latents fit one file; one alone may be larger."""
    schema = pq.read_schema(io.BytesIO(latents.read(parts[0].file)))
    width = schema.field("latent").type.byte_width
    group: list[ChunkRecord] = []
    for part in parts:
        if group and width * (sum(p.rows for p in group) + part.rows) > file_bytes:
            yield group
            group = []
        group.append(part)
    yield group


@ray.remote
def search_batch(settings: EncoderSettings, largest: int, seconds: float) -> dict[str, Any]:
    """The micro-batch for this device: the smallest power of two after which doubling gains little.

    Args:
        settings: Their batch is ignored; compiled forms are judged by the eager one.
        largest: Stop there: no chunk holds more images.
        seconds: How long one size is measured; a size that takes twenty times that for one pass is the last.

    Returns:
        `batch`, and `images_per_s` for each size that was tried.
    """
    import torch

    from ddoq_ray.models.encoding import LatentEncoder

    eager = dataclasses.replace(settings, compile=False, posterior="mode")
    autoencoder = place_autoencoder(eager)
    size = settings.image_size
    rates: dict[int, float] = {}
    batch, best = 1, 1
    while batch <= max(1, largest):
        encoder = LatentEncoder(autoencoder, dataclasses.replace(eager, batch=batch).encoding)
        pixels = np.zeros((batch, size, size, 3), np.uint8)
        keys = [""] * batch
        try:
            start = time.perf_counter()
            encoder.encode(pixels, keys)  # the first of a size also chooses kernels
            once, passes, start = time.perf_counter() - start, 0, time.perf_counter()
            while passes < 2 or time.perf_counter() - start < seconds:
                encoder.encode(pixels, keys)
                passes += 1
                if once > seconds:
                    break
        except torch.OutOfMemoryError:
            break
        rates[batch] = passes * batch / (time.perf_counter() - start)
        if rates[batch] >= GAIN * rates[best]:
            best = batch
        if batch >= 4 * best or once > 20 * seconds:  # doubled twice for nothing
            break
        batch *= 2
    if not rates:
        raise ValueError(
            f"the encoder has not memory enough for one image of {size} px; give it more (cluster.encoder.num_gpus), "
            "or choose a smaller encoder.dtype"
        )
    return {"batch": best, "images_per_s": rates}
