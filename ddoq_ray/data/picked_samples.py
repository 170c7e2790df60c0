"""Some samples of a shard, by their places among its usable ones: only headers, labels and these pictures are read."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import IO

from ddoq_ray.data.pictures import IMAGE_EXTENSIONS
from ddoq_ray.data.tar_samples import labelled, open_samples
from ddoq_ray.storage.transport import open_shard

Position = tuple[int, int]  # class_id, place among the usable samples of that class in the shard
HEADER_BUFFER = (
    2048  # bytes that are read at once where headers are looked for: a member's label lies behind its header
)


@dataclass(frozen=True)
class PassedOver:
    """Samples of a shard that were refused by what they contain: they have no latent, and no position.

    Attributes:
        offsets: Of the first member of samples that cannot be decoded.
        keys: Of samples that can, and whose latent is not finite.
    """

    offsets: frozenset[int] = field(default_factory=frozenset)
    keys: frozenset[str] = field(default_factory=frozenset)

    def __contains__(self, sample: tuple[str, int]) -> bool:
        key, offset = sample
        return offset in self.offsets or key in self.keys


NONE = PassedOver()


def picked_pictures(
    shard: str, num_classes: int, wanted: Collection[Position], passed_over: PassedOver = NONE
) -> Iterator[tuple[Position, bytes]]:
    """The picture files of some samples, in the shard's order; what is not wanted is neither read nor decoded.

    The tar's headers and labels are read up to the last wanted sample, then each wanted picture at its own offset. (A
    store is asked for whole blocks; a compressed tar is unpacked twice.)

    Args:
        wanted: Positions, as `read_samples` counts those that it yields, without the refused ones.
        passed_over: What was refused by content when the shard was encoded.

    Raises:
        ValueError: The shard cannot be read, or has no such sample: it was changed since it was encoded.
    """
    with open_shard(shard, HEADER_BUFFER) as f:
        tar = open_samples(f, lambda bad: None)
        if tar is None:
            raise ValueError(f"{shard} is no tar any more; bring it back, or use another run_dir")
        places = _places(tar, num_classes, set(wanted), passed_over)
        missing = set(wanted) - {position for position, _, _ in places}
        if missing:
            c, place = min(missing)
            raise ValueError(
                f"{shard}: image {place} of class {c} cannot be found, of those that were encoded; the shard was "
                "changed or damaged since. Bring it back, or use another run_dir"
            )
        file: IO[bytes] = tar.fileobj  # type: ignore[assignment]
        for position, start, size in places:
            file.seek(start)
            yield position, file.read(size)


def _places(
    tar: tarfile.TarFile, num_classes: int, left: set[Position], passed_over: PassedOver
) -> list[tuple[Position, int, int]]:
    """(position, first byte, bytes) of the pictures of the wanted samples, in the tar's order."""
    members: dict[str, tuple[int, int]] = {}  # of names that may still belong to a sample that is not complete
    found: list[tuple[Position, int, int]] = []
    seen: Counter[int] = Counter()

    def on_member(info: tarfile.TarInfo) -> None:
        stem, _, extension = info.name.rpartition(".")
        if extension.lower() in IMAGE_EXTENSIONS:
            members[f"{stem}.{extension.lower()}"] = (info.offset_data, info.size)

    def only_labels(extension: str, size: int) -> bool:
        return extension == "cls"

    for group, class_id in labelled(tar, lambda bad: None, only_labels, on_member):
        own = members.pop(f"{group.key}.{group.images[0]}")
        if not 0 <= class_id < num_classes or (group.key, group.offset) in passed_over:
            continue
        position = (class_id, seen[class_id])
        seen[class_id] += 1
        if position in left:
            left.discard(position)
            found.append((position, *own))
            if not left:
                break
    return found
