"""Image sets and stored labels are checked whole before students train: what a disk changed is refused by its name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from ddoq_ray.data.soft_labels import check_views, decoder
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import in_background
from ddoq_ray.stages.label.images import check_shard
from ddoq_ray.stages.label.step import Label
from ddoq_ray.stages.step import Step
from ddoq_ray.storage.label_log import LabelStore, check_file


def check_stored(run: Run, sources: Collection[Step], labels: Collection[Label]) -> None:
    """Read every byte of image sets and of their labels, on the cluster.

    Raises:
        ValueError: A file is gone, cut or has other bytes than were written; labels are of another image set than the
            one there is; or views are no longer drawn as they were labelled.
    """
    jobs: list[Callable[[], None]] = []
    for source in sources:
        folder = run.dir / source.place
        jobs += [partial(check_shard, folder, shard) for shard in run.finished(source.artifact(run.dir))["shards"]]
    for step in labels:
        store = LabelStore(run.dir / step.place)
        store.check_images(step.images(run)["digest"])
        decoder(store.folder, store.manifest)
        jobs.append(partial(check_views, store))
        making = (store.grid, store.manifest["identity_digest"])
        jobs += [partial(check_file, store.folder, file, making) for file in store.grid.all()]
    in_background(jobs)
