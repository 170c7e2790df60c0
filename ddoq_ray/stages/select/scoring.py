"""A teacher looks at real images: an elastic pool of actors, a data shard a unit.

What it is asked of a shard is the method's own; the answer is a short list, published as a file, so that a killed run
asks of no shard twice. The driver holds what is left of the answers: a few figures for each image that may be chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.data.picked_samples import PassedOver
from ddoq_ray.execution.pool import Elastic, run_elastic
from ddoq_ray.execution.workers import Progress, device, pin_threads
from ddoq_ray.stages.select.choice import Choice
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import NotAsWritten, checked, digest_of, with_check
from ddoq_ray.storage.folder import Folder

if TYPE_CHECKING:  # torch: only in the actor
    from ddoq_ray.models.classifiers import Classifier

Rows = list[list[Any]]  # of plain numbers
MOST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Shard:
    """A data shard to look at.

    Attributes:
        passed_over: Its samples that have no latent.
        asked: What the method wants to know of it.
        scores: The folder of answers.
        made_from: Digest of what the answer follows from.
        sha256: Of its bytes, where it is known.
    """

    index: int
    url: str
    passed_over: PassedOver
    asked: Any
    scores: Folder
    made_from: str
    sha256: str = ""


@dataclass(frozen=True)
class Looking:
    """A teacher, and how it sees pictures.

    Attributes:
        judge: In eval mode.
        batch: Pictures in one forward pass.
        indices: int64 [C], its output for each class.
    """

    judge: Classifier
    batch: int
    indices: npt.NDArray[np.int64]

    @property
    def side(self) -> int:
        return self.judge.image_size

    def losses(self, pictures: Sequence[npt.NDArray[np.uint8]], classes: Sequence[int], *, pad: bool = False) -> Any:
        """float32 [n], cross-entropies of pictures uint8 [H, W, 3] of one size; see `class_losses`.

        One that is no number, which no file of answers can hold, is the largest that there is.
        """
        from ddoq_ray.models.confidence import class_losses

        found = [np.empty(0, np.float32)]
        for first in range(0, len(pictures), self.batch):
            part = slice(first, first + self.batch)
            found.append(class_losses(self.judge, np.stack(pictures[part]), self.indices[classes[part]], pad=pad))
        return np.nan_to_num(np.concatenate(found), nan=MOST, posinf=MOST)


Ask = Callable[[Looking, Shard], Rows]


class Scorer:
    """Holds the first teacher."""

    def __init__(self, config: RunConfig, indices: Sequence[int], ask: Ask) -> None:
        from ddoq_ray.models.classifiers import load_classifier

        pin_threads(config.cluster.threads)
        judge = load_classifier(config.teacher.paths[0], device())
        self.looking = Looking(judge, config.teacher.batch, np.asarray(indices, np.int64))
        self.ask = ask

    def run(self, shard: Shard) -> Rows:
        """Look at one shard, and publish what was seen."""
        rows = self.ask(self.looking, shard)
        record = with_check({"made_from": shard.made_from, "rows": rows})
        shard.scores.publish_json(layout.scores(shard.index), record)
        rows = record["rows"]
        return rows


_actor = ray.remote(Scorer)


def shards_of(choice: Choice, asked: dict[int, Any], passed_over: dict[int, PassedOver]) -> list[Shard]:
    """The units: data shard -> what is asked of it."""
    run, scores = choice.run, choice.run.dir / choice.at.images / layout.SCORES
    return [
        Shard(
            index,
            run.data.url(run.data.train[index]),
            passed_over.get(index, PassedOver()),
            asked[index],
            scores,
            digest_of([choice.identity, index]),
            run.data.train[index].sha256,
        )
        for index in sorted(asked)
    ]


def scored(choice: Choice, shards: Sequence[Shard], ask: Ask) -> Iterator[tuple[int, Rows]]:
    """(data shard, what is known of it) of every shard, in any order; those that were looked at before come first."""
    run, config = choice.run, choice.run.config
    indices = [c.teacher_index for c in run.data.classes]
    left = []
    for shard in shards:
        rows = _known(shard)
        if rows is None:
            left.append(shard)
        else:
            yield shard.index, rows

    def spawn() -> Any:
        resources = config.cluster.teacher
        return _actor.options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus).remote(config, indices, ask)

    with Progress(choice.method, len(shards), "shards") as progress:
        progress.already(len(shards) - len(left))
        for shard, rows in run_elastic(
            spawn,
            left,
            Elastic.of(config.cluster, "select", "teacher", max_workers=config.labels.workers),
            name=lambda shard: f"{choice.method}: {layout.shard_name(shard.index)}",
            on_event=lambda event, **facts: run.events.add(event, stage="select", **facts),
            progress=progress,
        ):
            progress.advance()
            yield shard.index, rows


def _known(shard: Shard) -> Rows | None:
    with contextlib.suppress(NotAsWritten, FileNotFoundError):
        row = checked(shard.scores.read(layout.scores(shard.index)))
        if row.get("made_from") == shard.made_from:
            rows: Rows = row["rows"]
            return rows
    return None
