"""Reading the latent log: a class's latents in the log's order, whoever wrote them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ddoq_ray.core.noising import NoiseLevel, noised
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact, NotAsWritten, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.records import ChunkRecord, ShardDone, binary_rows

DONE_RECORDS = 8  # kept in memory: the records of a whole class-mixed log would fill gigabytes

MEND = "to encode again what is damaged: ddoq-ray verify RUN repair=true, RUN the run directory that made it"

FILE_BYTES = 32 << 20  # of latents in a file of the log: few files, and little memory for whoever reads one


def read_done(latents: Folder, shard: int) -> ShardDone:
    """The done record of a shard of a log.

    Raises:
        ValueError: When it is gone or damaged.
    """
    name = f"{layout.shard_name(shard)}/{layout.DONE}"
    try:
        return ShardDone.loads(latents.read(name))
    except FileNotFoundError:
        raise ValueError(f"{latents.path(name)} is missing although its log is finished; {MEND}") from None
    except NotAsWritten as error:
        raise ValueError(f"{latents.path(name)} is damaged: {error}; {MEND}") from None


class LatentLog:
    """A ``latents/`` folder. Latents are never kept, done records only briefly."""

    def __init__(self, folder: Folder, dim: int | None = None, noise: NoiseLevel | None = None) -> None:
        """A view of the log.

        Args:
            folder: Where it is.
            dim: Flattened latent dimension that every file must have; None takes each as it is.
            noise: The level to which latents are noised as they are read; None reads them as they are.
        """
        self.folder = folder
        self.dim = dim
        self.noise = noise
        self._done: OrderedDict[int, ShardDone] = OrderedDict()

    def done(self, shard: int) -> ShardDone:
        if shard not in self._done:
            self._done[shard] = read_done(self.folder, shard)
            if len(self._done) > DONE_RECORDS:
                self._done.popitem(last=False)
        return self._done[shard]

    def read(
        self, chunk: ChunkRecord, classes: Collection[int] | npt.NDArray[np.integer]
    ) -> Iterator[tuple[int, npt.NDArray[np.float16]]]:
        """(class_id, latents float16 [n, D]) of those `classes` that the chunk holds, ascending.

        Args:
            chunk: A file of the log.
            classes: An array must be ascending: then the cost is that of the chunk's own classes, however many these.

        Raises:
            ValueError: When the file is gone, is not the one that was encoded, has another dimension than the log's,
                or holds a latent that is not finite.
        """
        wanted = classes if isinstance(classes, np.ndarray) else np.array(sorted(classes), np.int64)
        if not len(wanted):
            return
        place = np.minimum(np.searchsorted(wanted, chunk.classes.class_ids), len(wanted) - 1)
        at = np.flatnonzero(wanted[place] == chunk.classes.class_ids)
        if not len(at):
            return
        latents, keys = self._latents(chunk)
        ends = np.cumsum(chunk.classes.counts)
        starts = ends - chunk.classes.counts
        for class_id, start, end in zip(
            chunk.classes.class_ids[at].tolist(), starts[at].tolist(), ends[at].tolist(), strict=True
        ):
            mine = latents[start:end]
            yield class_id, mine if self.noise is None else noised(mine, keys[start:end].to_pylist(), self.noise)

    def _latents(self, chunk: ChunkRecord) -> tuple[npt.NDArray[np.float16], pa.ChunkedArray]:
        """The latents of a file; their keys only if noise needs them, else nothing."""
        path = self.folder.path(chunk.file)
        try:
            data = self.folder.read(chunk.file)
        except FileNotFoundError:
            raise ValueError(
                f"latent file {path} is missing although its shard was encoded (latents.keep=false removes them after "
                f"a run); {MEND}"
            ) from None
        if digest_of(data) != chunk.sha256:
            raise ValueError(
                f"latent file {path} is not the one that was encoded: it has {len(data):,} bytes and another digest "
                f"than its record; {MEND}"
            )
        columns = ["latent"] if self.noise is None else ["latent", "key"]
        table = pq.read_table(pa.BufferReader(data), columns=columns)
        latents = binary_rows(table["latent"], "<f2")
        if self.dim is not None and latents.shape[1] != self.dim:
            raise ValueError(
                f"latent file {path} holds latents of {latents.shape[1]} values, the prior of this run makes "
                f"{self.dim}; all of a log must come from one prior: encode again in a new run_dir"
            )
        # The bits of infinity and NaN: an fp16 isfinite is 20 times slower.
        if ((latents.view(np.uint16) & 0x7C00) == 0x7C00).any():
            row = int(np.flatnonzero(~np.isfinite(latents.astype(np.float32)).all(axis=1))[0])
            class_id = int(chunk.classes.class_ids[np.searchsorted(np.cumsum(chunk.classes.counts), row, side="right")])
            raise ValueError(
                f"latent file {path} holds a latent that is not finite (row {row}, class {class_id}); check the "
                "prior's weights and encode again in a new run_dir"
            )
        return latents, table[columns[-1]]


def noise_of(codebook: Folder) -> NoiseLevel | None:
    """The level of the latents that a finished codebook was made from; None when they were clean."""
    manifest = Artifact(codebook, "quantize").manifest() or {"identity": {}}
    noise = manifest["identity"].get("noise")
    return NoiseLevel(**noise) if noise else None
