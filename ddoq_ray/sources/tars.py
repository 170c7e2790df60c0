"""WebDataset shards that the person asked to have written anew, sorted by class."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ddoq_ray.pictures import IMAGE_EXTENSIONS
from ddoq_ray.samples import BadSample, labelled, read_classes
from ddoq_ray.sources.containers import Containers, row_names
from ddoq_ray.sources.listing import Listing, Refused, Survey
from ddoq_ray.tar_headers import open_tar
from ddoq_ray.transport import list_shards, open_shard


class Tars(Containers):
    """Given shards; a row is a sample with one label and one picture."""

    def __init__(self, path: str, val_path: str | None, classes: str | None) -> None:
        self.train = list_shards(path)
        self.val = [] if val_path is None else list_shards(val_path, key="dataset.val_path")
        self.path = path
        self.classes = classes or posixpath.join(posixpath.dirname(self.train[0]), "classes.json")

    def containers(self) -> list[str]:
        return [*self.train, *self.val]

    def survey(self) -> Survey:
        classes = read_classes(self.classes)
        train = self._listing(self.train, 0, len(classes))
        if not train.names:
            raise ValueError(
                f"dataset.path={self.path}: no sample with an image and a label in {len(self.train)} shards"
            )
        return Survey(classes, train, self._listing(self.val, len(self.train), len(classes)) if self.val else None)

    def _listing(self, shards: Sequence[str], offset: int, num_classes: int) -> Listing:
        names: list[str] = []
        class_ids: list[int] = []
        sizes: list[int] = []
        refused: list[Refused] = []
        for container, shard in enumerate(shards, offset):
            where = posixpath.basename(shard)
            bad: list[BadSample] = []
            labels = []
            for key, label, data, _ in _pictures(shard, bad.append):
                if not 0 <= label < num_classes:
                    raise ValueError(
                        f"{shard}: sample {key}: label {label} is outside the class list (0 to {num_classes - 1}); "
                        "check that dataset.classes belongs to dataset.path (one entry for each label)"
                    )
                labels.append(label)
                sizes.append(len(data))
            names += row_names(container, range(len(labels)))
            class_ids += labels
            refused += [Refused(f"{where}:{b.key}", b.reason) for b in bad]
        return Listing(names, np.asarray(class_ids, np.int32), np.asarray(sizes, np.int64), refused)

    def images(self, container: int) -> Iterator[tuple[bytes, str]]:
        for _, _, data, extension in _pictures(self.containers()[container], lambda bad: None):
            yield data, extension


def _pictures(shard: str, on_bad: Callable[[BadSample], None]) -> Iterator[tuple[str, int, bytes, str]]:
    """(key, label, image bytes, extension) of each usable sample of a shard, in its order."""
    with open_shard(shard) as f:
        try:
            tar = open_tar(f)
        except tarfile.ReadError:
            on_bad(BadSample("", 0, "not a tar"))
            return
        for group, label in labelled(tar, on_bad, ("cls", *IMAGE_EXTENSIONS)):
            data = group.members[group.images[0]]
            assert data is not None
            yield group.key, label, data, group.images[0]
