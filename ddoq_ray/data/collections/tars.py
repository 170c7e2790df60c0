"""WebDataset shards that the user asked to have written anew, sorted by class."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ddoq_ray.data.collections.classes import check_class_lists, check_first_label
from ddoq_ray.data.collections.containers import Containers, row_names
from ddoq_ray.data.collections.listing import Listing, Survey
from ddoq_ray.data.samples import read_classes
from ddoq_ray.data.shard_index import train_and_val, with_losses
from ddoq_ray.data.tar_samples import DAMAGE, labelled, open_samples
from ddoq_ray.storage.quarantine import Refusal
from ddoq_ray.storage.records import ClassCounts, ShardInfo
from ddoq_ray.storage.transport import open_shard


class Tars(Containers):
    """Given shards; a row is a sample with one label and one picture."""

    def __init__(self, path: str, val_path: str | None, classes: str | None) -> None:
        self.path = path
        self.notes: list[str] = []
        self.train, self.val = train_and_val(path, val_path, self.notes)
        self.given = classes is not None
        self.classes = classes or posixpath.join(posixpath.dirname(self.train[0]), "classes.json")

    def containers(self) -> list[str]:
        return [*self.train, *self.val]

    def survey(self) -> Survey:
        classes = read_classes(self.classes)
        if not self.given:
            check_class_lists(self.containers(), classes)
        train = self._listing(self.train, 0, len(classes))
        if not train.names:
            raise ValueError(
                f"dataset.path={self.path}: no sample with an image and a label in {len(self.train)} shards"
            )
        val = self._listing(self.val, len(self.train), len(classes)) if self.val else None
        return Survey(classes, train, val, list(self.notes))

    def _listing(self, shards: Sequence[str], offset: int, num_classes: int) -> Listing:
        names: list[str] = []
        class_ids: list[int] = []
        sizes: list[int] = []
        refused: list[Refusal] = []
        infos = []
        labels: set[int] = set()
        for container, shard in enumerate(shards, offset):
            where = posixpath.basename(shard)
            bad: list[Refusal] = []
            rows, size = [], 0
            for row, (key, label, data, _) in enumerate(_pictures(shard, bad.append)):
                size += len(data)
                labels.add(label)
                if 0 <= label < num_classes:
                    rows.append(row)
                    class_ids.append(label)
                    sizes.append(len(data))
                else:
                    reason = f"label is outside the class list (0 to {num_classes - 1}): {label}"
                    bad.append(Refusal(key, reason, offset=0))
            names += row_names(container, rows)
            damage = [b.reason for b in bad if b.reason.startswith(DAMAGE)]
            infos.append(ShardInfo(where, len(rows), size, ClassCounts({}), "", damage="; ".join(damage)))
            refused += [Refusal(f"{where}:{b.name}", b.reason) for b in bad if not b.reason.startswith(DAMAGE)]
        check_first_label(labels, num_classes, posixpath.dirname(shards[0]))
        refused += [Refusal(s.path, s.damage, s.lost) for s in with_losses(infos) if s.damage]
        return Listing(names, np.asarray(class_ids, np.int32), np.asarray(sizes, np.int64), refused)

    def images(self, container: int) -> Iterator[tuple[bytes, str]]:
        for _, _, data, extension in _pictures(self.containers()[container], lambda bad: None):
            yield data, extension


def _pictures(shard: str, on_bad: Callable[[Refusal], None]) -> Iterator[tuple[str, int, bytes, str]]:
    """(key, label, image bytes, extension) of each usable sample of a shard, in its order."""
    with open_shard(shard) as f:
        tar = open_samples(f, on_bad)
        for group, label in labelled(tar, on_bad) if tar is not None else ():
            data = group.members[group.images[0]]
            assert data is not None
            yield group.key, label, data, group.images[0]
