"""How many bytes each step of a run writes, told from the index of the data and the configuration alone.

What has a fixed width (latents, centroids, labels) is exact but for its keys: the file formats' own writers are asked
for small files, and what they say is scaled. Pictures are estimated by bytes a pixel of photographs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import cached_property

import numpy as np
import pyarrow as pa

from ddoq_ray.config import RunConfig
from ddoq_ray.core.labels import codec_sizes
from ddoq_ray.execution.networks import Networks
from ddoq_ray.stages.encode.stream import file_rows
from ddoq_ray.stages.label.step import codec_name
from ddoq_ray.stages.step import Step
from ddoq_ray.storage.codebook import part_classes
from ddoq_ray.storage.label_grid import LabelGrid
from ddoq_ray.storage.parquet import row_group_writer, table_bytes
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.records import codebook_schema, fixed_binary, label_schema, latent_schema

KEY = "n01440764_10026"  # a key of usual length
# Bytes a pixel of two photographs at 256 to 512 px, and how much of them is left for each point of quality below 95.
PIXEL_BYTES = {"png": (1.7, 0.0), "jpeg": (0.6, 0.044), "webp": (0.35, 0.05)}
PICTURE_BYTES = 100  # headers of a small picture
TAR_BLOCK, TAR_RECORD = 512, 10240
LABEL_RECORD, HASH = 400, 70  # of a file of labels, and of each digest in it
PART_RECORD, CLASS_RECORD = 420, 90  # of a part of a codebook, and of each class in it


def up_to(size: float, block: int) -> int:
    """The next multiple of a block."""
    return math.ceil(size / block) * block


class Sizes:
    """The sizes of what a run's steps make.

    Attributes:
        centroids: Of a codebook, by the classes' images, `ipc` and `small_class`.
    """

    def __init__(self, config: RunConfig, data: Data, networks: Networks) -> None:
        self.config, self.data, self.networks = config, data, networks
        self.dim = int(np.prod(networks.latent_shape))
        images = np.fromiter(data.counts.values(), np.int64, len(data.counts))
        kept = images[images >= config.ipc] if config.small_class == "drop" else images
        self.classes = int((kept > 0).sum())
        self.centroids = int(np.minimum(kept, config.ipc).sum())

    def of(self, step: Step) -> int:
        """Bytes of a step's artifact; 0 of what is small, or not known."""
        made: dict[str, Callable[[], float]] = {
            "prepare": lambda: sum(s.bytes for s in self.data.train),
            "encode": lambda: self.latents([s.samples for s in self.data.train]),
            "heldout": lambda: self.latents([self.heldout]),
            "quantize": self.codebook,
            "synthesize": lambda: self.images(self._side, self.config.synthesizer.format),
            "select": lambda: self.images(self.networks.image_size, "png"),
            "train": lambda: self.networks.student_bytes,
            "given": lambda: self.images(self.networks.image_size, "png"),
            "recover": lambda: self.images(self.networks.scorer_side, "png"),
            "label": lambda: self.labels(self.codec_bytes[self.codec]) if self.config.labels.stored else 0,
        }
        return round(made[step.name]()) if step.name in made else 0

    @property
    def pixels(self) -> int:
        """Of a set at the student's resolution, uint8, as teachers are given it."""
        return self.centroids * 3 * self.config.protocol.stored_side(self.config.student.image_size) ** 2

    @property
    def checkpoints(self) -> int:
        """Of the students that are at work: weights, the optimizer's two moments, an average; the new beside the old.

        They go when their students are finished.
        """
        return 2 * 4 * self.config.cluster.trainer.groups * self.networks.student_bytes

    @property
    def _side(self) -> int:
        return self.config.synthesizer.image_size or self.networks.image_size

    @cached_property
    def heldout(self) -> int:
        """Validation images that the report encodes."""
        seen = np.zeros(len(self.data.classes), np.int64)
        for shard in self.data.val:
            seen[shard.images.class_ids] += shard.images.counts
        return int(np.minimum(seen, self.config.report.heldout_images).sum())

    @property
    def codec(self) -> str:
        """The label codec of this run; Raises as `codec_name`."""
        return codec_name(self.config, self.networks, self.centroids)

    @property
    def codec_bytes(self) -> dict[str, int]:
        """Codec -> bytes of one label; none without a teacher."""
        known = self.networks
        return codec_sizes(known.teacher_outputs, known.feature_dim or None) if known.teacher_outputs else {}

    @property
    def epochs(self) -> int:
        """Epochs that are labelled of a distilled set."""
        return self.config.protocol.epochs_for(self.centroids) if self.centroids else 0

    def latents(self, samples: list[int]) -> float:
        """A log of shards with so many samples each, in files of at most `file_rows`."""
        schema = latent_schema(self.networks.latent_shape, self.networks.prior_id)

        def file(rows: int) -> int:
            columns = [
                pa.array([KEY] * rows),
                pa.array(np.zeros(rows, np.int32)),
                fixed_binary(np.zeros((rows, self.dim), np.float16)),
            ]
            return len(table_bytes(pa.Table.from_arrays(columns, schema=schema)))

        base, row = _line(file)
        most = file_rows(self.config, self.networks)
        return sum(math.ceil(n / most) * base + n * row for n in samples if n)

    def codebook(self) -> float:
        """Its parts, a row group a class, with their records."""
        schema = codebook_schema(self.networks.latent_shape, self.networks.prior_id)

        def part(classes: int, rows: int) -> int:
            ones = np.ones(rows, np.int64)
            table = [
                pa.array(ones.astype(np.int32)),
                pa.array(ones.astype(np.int32)),
                fixed_binary(np.zeros((rows, self.dim), np.float32)),
                *(pa.array(c) for c in (ones, ones.astype(float), ones.astype(float), ones)),
            ]
            with tempfile.NamedTemporaryFile() as f:
                with row_group_writer(f.name, schema) as writer:
                    for _ in range(classes):
                        writer.write_table(pa.Table.from_arrays(table, schema=schema))
                return f.seek(0, 2)

        one = part(1, 1)
        a_class, a_row = part(2, 1) - one, part(1, 2) - one
        parts = len(part_classes(len(self.data.classes), self.config.ipc, self.dim))
        records = parts * PART_RECORD + self.classes * CLASS_RECORD
        return parts * (one - a_class) + self.classes * (a_class - a_row) + self.centroids * a_row + records

    def images(self, side: int, form: str) -> float:
        """An image set: of each image a picture, a .cls and a .json in a tar."""
        pixel, less = PIXEL_BYTES[form]
        picture = PICTURE_BYTES + side * side * pixel * math.exp(-less * (95 - self.config.synthesizer.quality))
        a_sample = up_to(picture, TAR_BLOCK) + 5 * TAR_BLOCK
        shard = self.config.synthesizer.shard_images
        full, rest = divmod(self.centroids, shard)
        return full * up_to(shard * a_sample + 1024, TAR_RECORD) + (
            up_to(rest * a_sample + 1024, TAR_RECORD) if rest else 0
        )

    def labels(self, nbytes: int) -> float:
        """Soft labels of a distilled set, of so many bytes each, with their records."""
        if not self.centroids:
            return 0
        own = self.config.labels
        grid = LabelGrid.of(
            (self.centroids, self.epochs),
            nbytes,
            batch=self.config.teacher.batch,
            file_bytes=own.file_mb << 20,
            file_labels=own.file_labels,
        )
        schema = label_schema("logits", 1)

        def file(groups: int) -> int:
            ones = [
                pa.array(np.zeros(1, np.int64)),
                pa.array(np.zeros(1, np.int32)),
                fixed_binary(np.zeros((1, 1), "u1")),
            ]
            with tempfile.NamedTemporaryFile() as f:
                with row_group_writer(f.name, schema, ("image_id", "epoch")) as writer:
                    for _ in range(groups):
                        writer.write_table(pa.Table.from_arrays(ones, schema=schema))
                return f.seek(0, 2)

        base, group = _line(file, 2)
        first = grid.file(0)
        groups = grid.files * (first.end_epoch - first.first_epoch) * len(grid.groups(first))
        hashes = grid.files * (first.end_epoch - first.first_epoch) + groups
        return grid.bytes + grid.files * (base + LABEL_RECORD) + groups * group + hashes * HASH


def _line(file: Callable[[int], int], rows: int = 64) -> tuple[float, float]:
    """(bytes of a file, bytes of a row) by what a file of one row and one of several have."""
    one, more = file(1), file(rows)
    row = (more - one) / (rows - 1)
    return one - row, row
