"""Every file and folder name of a run directory, coined here and nowhere else.

Names are relative to the run directory. What a run makes itself lies at the root (``codebook/``, ``images/``), since
that is what users came for; what other methods make, for comparison, has the same folders under
``compare/<method>-ipc<K>/``. Code asks a `Place` and never joins names by itself.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass

CONFIG = "config.yaml"
EVENTS = "events.jsonl"
LEASE = "lease.json"
DATA = "data"
LATENTS = "latents"
HELDOUT = "heldout"
QUARANTINE = "quarantine"
REPORT = "report"
STUDENTS = "students"
COMPARE = "compare"

# Of every artifact.
MANIFEST = "manifest.json"
STARTED = "started.json"

# data/
SOURCE_CLASSES = "source-classes.json"
CLASSES = "classes.json"
SHARDS = "shards.json"
VAL_SHARDS = "val-shards.json"

# report/
ROWS = "rows.json"
EVALUATE = "evaluate.json"
RESULTS = "results.json"
PAGE = "index.html"
TABLE = "table.md"  # of a comparison
TABLE_CSV = "table.csv"
TENSORBOARD = "tensorboard"  # a folder: what tracking=tensorboard wrote

# A student's folder.
METRICS = "metrics.jsonl"
WEIGHTS = "model.safetensors"
NETWORK = "config.json"

# The latent logs: a folder a shard, with its files and, last, its done record.
DONE = "done.json"
DONE_RECORDS = f"shard-*/{DONE}"
CHUNKS = "shard-*/chunk-*.parquet"
PARTS = "parts"  # chunks that wait to be joined
BATCH = "batch.json"  # the micro-batch that was found

# A codebook: parts, each with its record.
CODEBOOK_PARTS = "part-*.parquet"
CODEBOOK_RECORDS = "part-*.json"
SNAPSHOTS = "snapshots"

# Labels: files of them, each with its record.
LABEL_FILES = "labels-*.parquet"
LABEL_RECORDS = "labels-*.json"
HEAD = "head.safetensors"  # beside feature labels
CARD = "README.md"  # of a finished image set
IMAGE_SHARDS = "images-*.tar"
IMAGE_RECORDS = ".records"  # a file an image shard; hidden, since other libraries take a folder's files for data
EXCERPTS = ".excerpts"  # while real images are copied: a file a data shard, with its record; removed at the end
SCORES = ".scores"  # while a teacher looks at real images: a file a data shard; removed at the end

# Stage -> its small files that have no record of their own: its manifest holds their digests.
IN_MANIFEST = {
    "prepare": (SOURCE_CLASSES, CLASSES, SHARDS, VAL_SHARDS, f"*/{CLASSES}", "selection/*.tar"),
    "encode": (BATCH,),
    "synthesize": (CARD,),
    "label": (HEAD,),
    "train": (WEIGHTS, NETWORK, METRICS),
}

# The artifacts of a run directory: what makes them -> where they may lie.
ARTIFACTS = {
    "prepare": (DATA,),
    "encode": (LATENTS,),
    "heldout": (HELDOUT,),
    "quantize": ("codebook", f"{COMPARE}/*/codebook"),
    "synthesize": ("images", f"{COMPARE}/*/images", f"{COMPARE}/*/draw-*/images"),
    "label": ("labels/*", f"{COMPARE}/*/labels/*", f"{COMPARE}/*/draw-*/labels/*"),
    "train": (f"{STUDENTS}/*", f"{COMPARE}/*/{STUDENTS}/*"),
}
PACK_RECORDS = "records"  # in data/: a file a shard that was packed
SET_ASIDE = "set-aside"  # damaged files, under the names that they had


def image_shard(index: int) -> str:
    """An image shard's name, without its ending."""
    return f"images-{index:06d}"


def image_tar(name: str) -> str:
    """The file of an image shard."""
    return f"{name}.tar"


def image_record(name: str) -> str:
    """What is published of an image shard after it."""
    return f"{IMAGE_RECORDS}/{name}.json"


def excerpt(shard: int) -> str:
    """The pictures that were chosen of a data shard."""
    return f"{shard_name(shard)}.bin"


def excerpt_record(shard: int) -> str:
    """Where each of them is in there."""
    return f"{shard_name(shard)}.json"


def scores(shard: int) -> str:
    """What a teacher says of a data shard's images."""
    return f"{shard_name(shard)}.json"


def shard_name(index: int) -> str:
    """What belongs to a shard of the data: its folder in a latent log, its files in quarantine."""
    return f"shard-{index:06d}"


def shard_index(name: str) -> int:
    """Inverse of `shard_name`, for anything in a shard's folder."""
    return int(name.split("/")[0].removeprefix("shard-"))


def chunk_file(index: int) -> str:
    return f"chunk-{index:05d}.parquet"


def codebook_part(part: int) -> str:
    return f"part-{part:05d}.parquet"


def codebook_record(part: int) -> str:
    return f"part-{part:05d}.json"


def record_part(name: str) -> int:
    """Inverse of `codebook_record`."""
    return int(name.removeprefix("part-").removesuffix(".json"))


def label_file(index: int) -> str:
    """A range of epochs of a range of images, in the order of `LabelGrid`."""
    return f"labels-{index:06d}.parquet"


def label_record(index: int) -> str:
    """What is published of a label file after it."""
    return f"labels-{index:06d}.json"


def word(text: str) -> str:
    """A part of a folder's name: letters, digits, dots and dashes.

    >>> word("my teacher (v2)")
    'my-teacher-v2'
    """
    return re.sub(r"[^\w.]+", "-", text).strip("-") or "none"


@dataclass(frozen=True)
class LabelKey:
    """What soft labels of an image set are known by: students of another size, teacher or protocol have others."""

    teacher: str
    protocol: str
    size: int

    @property
    def name(self) -> str:
        return f"{word(self.teacher)}-{word(self.protocol)}-{self.size}px"


@dataclass(frozen=True)
class Place:
    """A folder of the run directory that holds a method's parts; by default the run's own.

    Attributes:
        root: Relative to the run directory.
    """

    root: str = ""

    @staticmethod
    def of_method(name: str, ipc: int) -> Place:
        return Place(posixpath.join(COMPARE, f"{name}-ipc{ipc}"))

    @property
    def method(self) -> str:
        """The method whose parts it holds; empty for the run's own."""
        return posixpath.basename(self.root).rpartition("-ipc")[0]

    def draw(self, index: int) -> Place:
        """The image set of one of a method's draws."""
        return Place(posixpath.join(self.root, f"draw-{index}"))

    @property
    def codebook(self) -> str:
        return posixpath.join(self.root, "codebook")

    @property
    def images(self) -> str:
        return posixpath.join(self.root, "images")

    def labels(self, key: LabelKey) -> str:
        return posixpath.join(self.root, "labels", key.name)

    def student(self, name: str) -> str:
        return posixpath.join(self.root, STUDENTS, name)
