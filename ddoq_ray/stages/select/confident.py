"""`confident`: of each Voronoi cell of the run's own codebook the real image that the teacher is surest of.

Where `medoids` takes what lies in the middle of a cell, this takes what a classifier finds clearest in it: as many
images of each part of the class as the quantizer wants, and typical ones. An image weighs what its cell does. A cell
without an image (its centroid is a copy of another's) takes the surest of those that no cell took; it weighs nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.confidence import surest, surest_of_cells
from ddoq_ray.core.distortion import assign
from ddoq_ray.data.pictures import Resize
from ddoq_ray.data.samples import read_samples, to_square
from ddoq_ray.stages.cells import own_set
from ddoq_ray.stages.select.choice import Choice, Selection
from ddoq_ray.stages.select.images import not_encoded
from ddoq_ray.stages.select.scoring import Looking, Rows, Shard, scored, shards_of
from ddoq_ray.storage.codebook import ClassRows, parts_with_classes
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_log import LatentLog, noise_of
from ddoq_ray.storage.records import binary_rows


def choose(choice: Choice) -> Selection:
    run = choice.run
    codebook = run.dir / own_set(run.config).codebook
    names, classes, _ = parts_with_classes(codebook)
    part_of = {c: name for name, own in zip(names, classes, strict=True) for c in own}
    asked: dict[int, Any] = {}
    for shard in choice.index.holding(list(part_of)).tolist():
        mine: dict[str, list[int]] = {}
        for c in run.data.train[shard].images.class_ids.tolist():
            if c in part_of:
                mine.setdefault(part_of[c], []).append(c)
        asked[shard] = mine
    ask = partial(_look, run.latents, codebook, len(run.data.classes), run.config.encoder.resize)
    found: dict[int, _Best] = {}
    for shard, rows in scored(choice, shards_of(choice, asked, not_encoded(run.latents)), ask):
        for c, weights, cells, spare in rows:
            shards, held = choice.index.pairs(c)
            at = int(np.searchsorted(shards, shard))
            before = int(held[:at].sum())
            best = found.setdefault(c, _Best.of(np.asarray(weights)))
            best.take(cells, before)
            best.keep(spare, before)
    chosen = {c: best.positions() for c, best in sorted(found.items())}
    return Selection(chosen, {c: best.weights for c, best in found.items()})


@dataclass
class _Best:
    """The surest image of each cell of a class, so far: its loss and its position among the class's images.

    `spare`: (loss, position) of the surest of all, for empty cells.
    """

    weights: npt.NDArray[np.float64]
    losses: npt.NDArray[np.float64]
    places: npt.NDArray[np.int64]
    spare: list[tuple[float, int]]

    @staticmethod
    def of(weights: npt.NDArray[np.float64]) -> _Best:
        return _Best(weights, np.full(len(weights), np.inf), np.full(len(weights), -1), [])

    def take(self, cells: Rows, before: int) -> None:
        """Compare with (cell, loss, position) of a shard, before whose images so many others of the class come."""
        for cell, loss, position in cells:
            if (loss, before + position) < (self.losses[cell], self.places[cell]) or self.places[cell] < 0:
                self.losses[cell], self.places[cell] = loss, before + position

    def keep(self, spare: Rows, before: int) -> None:
        """Take (loss, position) of a shard's surest images, whatever their cells; as `take`."""
        self.spare += [(loss, before + position) for loss, position in spare]
        enough = 2 * len(self.weights)  # of the surest, cells that are not empty take at most half
        if len(self.spare) > 8 * enough:
            self.spare = heapq.nsmallest(enough, self.spare)

    def positions(self) -> npt.NDArray[np.int64]:
        """Of each cell; an empty one has the next of the spare ones."""
        taken = set(self.places.tolist())
        left = iter(sorted(pair for pair in self.spare if pair[1] not in taken))
        return np.asarray([place if place >= 0 else next(left)[1] for place in self.places.tolist()], np.int64)


def _look(latents: Folder, codebook: Folder, num_classes: int, resize: Resize, looking: Looking, shard: Shard) -> Rows:
    """[class_id, weights of its cells, [cell, loss, position] of the surest, [loss, position] of spare ones] each."""
    parts: dict[str, list[int]] = shard.asked
    classes = [c for own in parts.values() for c in own]
    losses = _losses(shard, num_classes, resize, looking, set(classes))
    x = _latents(LatentLog(latents, noise=noise_of(codebook)), shard.index, classes)
    books = ClassRows(codebook, parts)
    rows: Rows = []
    for c in classes:
        if c not in x:
            continue
        if len(x[c]) != len(losses[c]):
            raise ValueError(
                f"{shard.url} has {len(losses[c])} usable images of class {c}, and {len(x[c])} were encoded; the shard "
                "was changed or damaged since. Bring it back, or use another run_dir"
            )
        table = books.of(c)
        centroids, weights = binary_rows(table["centroid"], "<f4"), table["weight"].to_numpy()
        cells = surest_of_cells(assign(x[c], centroids)[0], losses[c], len(centroids))
        full = np.flatnonzero(cells >= 0)
        best = surest(losses[c], 2 * len(centroids))  # however many cells are empty, and whatever the others take
        rows.append(
            [
                c,
                weights.tolist(),
                [[k, float(losses[c][cells[k]]), int(cells[k])] for k in full.tolist()],
                [[float(losses[c][i]), i] for i in best.tolist()],
            ]
        )
    return rows


def _losses(
    shard: Shard, num_classes: int, resize: Resize, looking: Looking, classes: set[int]
) -> dict[int, npt.NDArray[np.float32]]:
    """class_id -> losses of its usable images, in the shard's order."""
    found: dict[int, list[float]] = {c: [] for c in classes}

    def batches() -> Iterator[tuple[list[npt.NDArray[np.uint8]], list[int]]]:
        pictures, ids = [], []
        named = read_samples(shard.url, num_classes, lambda bad: None, shard.sha256)  # bad ones were, by encode
        for sample in named:
            if (sample.key, sample.offset) in shard.passed_over or sample.class_id not in classes:
                continue
            pictures.append(to_square(sample.image, looking.side, resize))
            ids.append(sample.class_id)
            if len(ids) == looking.batch:
                yield pictures, ids
                pictures, ids = [], []
        if ids:
            yield pictures, ids

    for pictures, ids in batches():
        for c, loss in zip(ids, looking.losses(pictures, ids).tolist(), strict=True):
            found[c].append(loss)
    return {c: np.asarray(losses, np.float32) for c, losses in found.items()}


def _latents(log: LatentLog, shard: int, classes: list[int]) -> dict[int, npt.NDArray[np.float32]]:
    """class_id -> its latents in a shard of the log, in order."""
    pieces: dict[int, list[npt.NDArray[np.float16]]] = {}
    for chunk in log.done(shard).chunks:
        for c, x in log.read(chunk, classes):
            pieces.setdefault(c, []).append(x.copy())
    return {c: np.concatenate(mine).astype(np.float32) for c, mine in pieces.items()}
