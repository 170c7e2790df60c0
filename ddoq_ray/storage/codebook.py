"""A codebook on disk: parts of fixed class ranges, each an Arrow table with a record of what it holds beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact, NotAsWritten, checked, digest_of, with_check
from ddoq_ray.storage.fitting_facts import misfit_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.parquet import row_group_writer
from ddoq_ray.storage.records import Codebook, codebook_schema, fixed_binary
from ddoq_ray.storage.row_groups import DamagedGroup, file_digests, metadata_of, read_groups, span_of

PART_BYTES = 64 << 20  # of centroids in one file: 21,841 classes must not mean 21,841 files
AT_ONCE = 8  # parts that are opened
MEND = (
    "bring it back, or remove this part's two files and the manifest.json beside them and run the quantize stage "
    "again: that writes it anew from the latents and keeps the other parts"
)


@dataclass(frozen=True)
class PartRecord:
    """``part-*.json``, published after its part: without it the part is not finished.

    Attributes:
        digest: sha256 (hex) of the part's file.
        bytes: Size of the part's file.
        latents: Latents that its counts stand for.
        centroids: Its rows.
        dropped: Classes of its range that have no centroid.
        algorithms: How many classes each algorithm quantized.
        warnings: Words for what is not as asked, a class each.
        row_groups: [class_id, rows, sha256 of the row group's bytes] of each class, in the file's order.
        footer: [first byte, sha256] of what follows the row groups. Both are empty in records of older runs.
        distortion: Mean over its latents, in 12 digits as text, of which any change is another text (a number may be
            written in several ways); None in records of older runs.
    """

    digest: str
    bytes: int
    latents: int
    centroids: int
    dropped: list[int]
    algorithms: dict[str, int]
    warnings: list[str]
    row_groups: list[Any] = field(default_factory=list)
    footer: list[Any] = field(default_factory=list)
    distortion: str | None = None


def part_classes(num_classes: int, ipc: int, dim: int) -> list[list[int]]:
    """Class ids of each codebook part: at least 16 parts where there are classes for them, none above 64 MB."""
    size = max(1, min(-(-num_classes // 16), PART_BYTES // max(1, 4 * ipc * dim)))
    return [list(range(first, min(first + size, num_classes))) for first in range(0, num_classes, size)]


@dataclass(frozen=True)
class Account:
    """What became of the classes of a part.

    Attributes:
        dropped: Class ids without a codebook.
        algorithms: Name of an algorithm -> classes that it quantized.
        warnings: One a class, for the user.
    """

    dropped: list[int]
    algorithms: dict[str, int]
    warnings: list[str]


def write_part(
    codebook: Folder,
    part: int,
    books: Sequence[Codebook],
    account: Account,
    *,
    latent_shape: tuple[int, ...],
    prior_id: str,
) -> None:
    """Publish a part, a row group a class (so that one class can be read alone), then its record with the account."""
    schema = codebook_schema(latent_shape, prior_id)
    with codebook.writing(layout.codebook_part(part)) as f, row_group_writer(f.name, schema) as writer:
        for b in books:
            columns = [
                pa.array(np.full(b.k, b.class_id, np.int32)),
                pa.array(np.arange(b.k, dtype=np.int32)),
                fixed_binary(b.centroids.astype("<f4", copy=False)),
                pa.array(b.counts),
                pa.array(b.weights),
                pa.array(np.full(b.k, b.distortion)),
                pa.array(b.stream_counts),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        writer.close()
        groups, end = file_digests(f.name)
    digest, size = codebook.digest(layout.codebook_part(part))
    latents, centroids = sum(int(b.counts.sum()) for b in books), sum(b.k for b in books)
    row_groups = [[b.class_id, b.k, group] for b, group in zip(books, groups, strict=True)]
    distortion = sum(b.distortion * int(b.counts.sum()) for b in books) / max(1, latents)
    facts = {"row_groups": row_groups, "footer": end, "distortion": f"{distortion:.12g}", **asdict(account)}
    row = asdict(PartRecord(digest, size, latents, centroids, **facts))
    codebook.publish_json(layout.codebook_record(part), with_check(row))


def read_record(codebook: Folder, part: int) -> PartRecord:
    """The record of a finished part.

    Raises:
        ValueError: When it is gone or damaged.
    """
    try:
        data = codebook.read(layout.codebook_record(part))
    except FileNotFoundError:
        raise ValueError(f"{codebook.path(layout.codebook_record(part))} is missing; {MEND}") from None
    try:
        row = checked(data)
        if told := misfit_of(PartRecord, row):
            raise NotAsWritten(told)
        return PartRecord(**row)
    except (NotAsWritten, TypeError):
        raise ValueError(
            f"{codebook.path(layout.codebook_record(part))} is damaged: it is not a part's record; {MEND}"
        ) from None


def open_parts(codebook: Folder) -> Iterator[Part]:
    """The parts of a finished codebook, in the order of their classes; none of their centroids is read.

    Raises:
        ValueError: When one is gone or cut: what it held would be left out of everything that follows, without a word.
    """
    stems = {
        name.split(".")[0]
        for name in (*codebook.names(layout.CODEBOOK_PARTS), *codebook.names(layout.CODEBOOK_RECORDS))
    }
    held = 0
    with ThreadPoolExecutor(AT_ONCE) as threads:  # a store takes a while for each of the three requests of a part
        for part in threads.map(partial(Part, codebook), map(layout.codebook_part, range(len(stems)))):
            held += part.record.centroids
            yield part
    made = (Artifact(codebook, "quantize").manifest() or {}).get("centroids")
    if made is not None and held != made:
        raise ValueError(
            f"{codebook.uri} had {made:,} centroids when it was finished, and its {len(stems)} parts hold {held:,}; "
            f"{MEND}"
        )


def read_part(codebook: Folder, part: str) -> pa.Table:
    """A part of a codebook, by its file's name, as an Arrow table (schema `records.codebook_schema`).

    Raises:
        ValueError: When the file or its record is gone, or the file is not the one that was written.
    """
    record = read_record(codebook, _number(part))
    try:
        data = codebook.read(part)
    except FileNotFoundError:
        raise _missing(codebook, part) from None
    if digest_of(data) != record.digest:
        raise _damaged(
            codebook, part, f"it has {len(data):,} bytes of the {record.bytes:,} that were written, or others"
        )
    return pq.read_table(pa.BufferReader(data))


class Part:
    """A part of a codebook whose classes are read alone: of the file, its footer and the row groups that are asked for.

    Attributes:
        class_ids: int32 [C'], ascending.
        rows: int64 [C'], centroids of each; their centroid_id are 0 to rows - 1.
    """

    def __init__(self, codebook: Folder, name: str) -> None:
        """Open it: its record, the file's size and its footer.

        Raises:
            ValueError: When the file or its record is gone, or either is not as it was written.
        """
        self.codebook, self.name = codebook, name
        self.record = read_record(codebook, _number(name))
        try:
            size = codebook.size(name)
        except FileNotFoundError:
            raise _missing(codebook, name) from None
        if size != self.record.bytes:
            raise self._damaged(f"it has {size:,} bytes of the {self.record.bytes:,} that were written")
        if not self.record.footer:  # of an older run
            self._footer = b""
            class_ids, rows = np.unique(read_layout(codebook, name)["class_id"].to_numpy(), return_counts=True)
        else:
            start, digest = self.record.footer
            self._footer = codebook.read_range(name, start, size)
            if digest_of(self._footer) != digest:
                raise self._damaged("its end has other bytes than were written")
            class_ids, rows = (np.array([group[i] for group in self.record.row_groups], np.int64) for i in (0, 1))
        self.class_ids: npt.NDArray[np.int32] = class_ids.astype(np.int32)
        self.rows: npt.NDArray[np.int64] = rows

    @cached_property
    def _metadata(self) -> pq.FileMetaData:
        return metadata_of(self._footer)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        if self._footer:
            schema = self._metadata.schema.to_arrow_schema()
        else:
            schema = read_layout(self.codebook, self.name).schema
        return tuple(json.loads(schema.metadata[b"latent_shape"]))

    def read(self, class_ids: Iterable[int]) -> pa.Table:
        """All columns of some of its classes, in ascending order; neighbours come by one request.

        Raises:
            ValueError: When bytes of theirs are not those that were written. Those of other classes do not matter.
        """
        wanted = np.array(sorted(set(class_ids)), np.int32)
        places = np.searchsorted(self.class_ids, wanted)
        assert len(wanted) and (self.class_ids[places] == wanted).all(), f"{self.name} does not hold all of {wanted}"
        if not self._footer:
            table = read_part(self.codebook, self.name)
            return table.filter(np.isin(table["class_id"].to_numpy(), wanted))
        tables = [self._run(run.tolist()) for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)]
        return pa.concat_tables(tables).combine_chunks()

    def _run(self, groups: list[int]) -> pa.Table:
        """The rows of neighbouring row groups."""
        data = self.codebook.read_range(self.name, *span_of(self._metadata, groups))
        try:
            return read_groups(self._metadata, groups, data, [self.record.row_groups[group][2] for group in groups])
        except DamagedGroup as error:
            how = f"class {self.class_ids[error.group]} has other bytes there than were written"
            raise self._damaged(how) from None

    def _damaged(self, how: str) -> ValueError:
        return _damaged(self.codebook, self.name, how)


class ClassRows:
    """The rows of single classes, asked for in the order of their parts: one part's in memory at a time."""

    def __init__(self, codebook: Folder, parts: Mapping[str, Iterable[int]]) -> None:
        """`parts`: a part's file name -> its classes."""
        self.codebook = codebook
        self._classes = {part: list(classes) for part, classes in parts.items()}
        self._part_of = {c: part for part, classes in self._classes.items() for c in classes}
        self._part, self._table, self._class_ids = "", pa.table({}), np.empty(0, np.int32)

    def of(self, class_id: int) -> pa.Table:
        """All columns of a class.

        Raises:
            ValueError: As `Part`.
        """
        part = self._part_of[class_id]
        if part != self._part:
            self._table = pa.table({})  # one part in memory, not two
            self._table = Part(self.codebook, part).read(self._classes[part])
            self._part, self._class_ids = part, self._table["class_id"].to_numpy()
        start, end = np.searchsorted(self._class_ids, [class_id, class_id + 1]).tolist()
        return self._table.slice(start, end - start)


class LastRows:
    """Rows of single classes for one that is asked for a few neighbours again and again: it keeps the last answer.

    Of a class that spreads over several askings, and of a part's footer, nothing is read twice in a row.
    """

    def __init__(self, codebook: Folder) -> None:
        self.codebook = codebook
        self._part: Part | None = None
        self._rows: dict[int, pa.Table] = {}

    def of(self, class_ids: Iterable[int], parts: Iterable[str]) -> dict[int, pa.Table]:
        """class_id -> all its columns.

        Args:
            class_ids: Which.
            parts: File names of the parts that hold them, ascending.

        Raises:
            ValueError: As `Part`.
        """
        wanted = set(class_ids)
        self._rows = {c: rows for c, rows in self._rows.items() if c in wanted}
        for name in parts:
            left = wanted - self._rows.keys()
            if not left:
                break
            if self._part is None or self._part.name != name:
                self._part = Part(self.codebook, name)
            mine = left.intersection(self._part.class_ids.tolist())
            if not mine:
                continue
            table = self._part.read(mine)
            found, starts, rows = np.unique(table["class_id"].to_numpy(), return_index=True, return_counts=True)
            for c, start, count in zip(found.tolist(), starts.tolist(), rows.tolist(), strict=True):
                self._rows[c] = table.slice(start, count)
        return dict(self._rows)


def read_layout(codebook: Folder, part: str) -> pa.Table:
    """class_id and centroid_id of a part's rows, without its centroids.

    Raises:
        ValueError: When the file is gone or cannot be read. Whoever reads its centroids checks its digest.
    """
    try:
        with codebook.reading(part) as f:
            return pq.read_table(f, columns=["class_id", "centroid_id"])
    except FileNotFoundError:
        raise _missing(codebook, part) from None
    except (pa.ArrowInvalid, OSError):
        raise _damaged(codebook, part, "it is not Parquet") from None


def parts_with_classes(codebook: Folder) -> tuple[list[str], list[list[int]], int]:
    """The files of a finished codebook, the classes of each in order, and the flattened dimension of a centroid.

    Raises:
        ValueError: As `open_parts`.
    """
    names: list[str] = []
    classes: list[list[int]] = []
    dim = 1
    for part in open_parts(codebook):
        dim = int(np.prod(part.latent_shape)) if not names else dim
        names.append(part.name)
        classes.append(part.class_ids.tolist())
    return names, classes, dim


def _number(part: str) -> int:
    return int(part.removeprefix("part-").removesuffix(".parquet"))


def _missing(codebook: Folder, part: str) -> ValueError:
    return ValueError(f"codebook part {codebook.path(part)} is missing although it was written; {MEND}")


def _damaged(codebook: Folder, part: str, how: str) -> ValueError:
    return ValueError(f"codebook part {codebook.path(part)} is damaged: {how}; {MEND}")
