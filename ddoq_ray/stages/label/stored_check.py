"""Image sets and stored labels are checked whole before students train: what a disk changed is refused by its name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import ray

from ddoq_ray.core.views.params import ViewSpec, view_params
from ddoq_ray.data.soft_labels import decoder
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import in_tasks
from ddoq_ray.stages.label.images import check_shard
from ddoq_ray.stages.label.step import Label
from ddoq_ray.stages.select.step import Select
from ddoq_ray.stages.synthesize.step import Synthesize
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.label_log import LabelStore, check_file

AT_ONCE = 64  # files with Ray at a time


def check_stored(run: Run, sources: Collection[Synthesize | Select], labels: Collection[Label]) -> None:
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
        check_images(store, step.images(run)["digest"])
        decoder(store.folder, store.manifest)
        jobs.append(partial(check_views, store.folder))
        making = (store.grid, store.manifest["identity_digest"])
        jobs += [partial(check_file, store.folder, file, making) for file in store.grid.all()]
    # No CPU: it is reading, and held-out images may be encoded beside it.
    task = ray.remote(num_cpus=0)(_called)
    for _ in in_tasks([partial(task.remote, job) for job in jobs], AT_ONCE):
        pass


def _called(job: Callable[[], None]) -> None:
    job()


def check_images(store: LabelStore, images: str) -> None:
    """Refuse labels of another image set.

    Args:
        images: Digest of the one there is.

    Raises:
        ValueError: With both digests.
    """
    labelled = store.manifest["identity"]["images"]
    if labelled != images:
        raise ValueError(
            f"{store.folder.uri} holds labels of another image set ({labelled[:16]}) than the one beside it "
            f"({images[:16]}): bring that set back, or label this one (stages=[label], with overwrite=true)"
        )


def check_views(labels: Folder) -> None:
    """Draw the views of an epoch again, and refuse labels of others.

    Raises:
        ValueError: They are not those that were labelled, as with another version of this project or of SciPy.
    """
    store = LabelStore(labels)
    told: dict[str, Any] = dict(store.manifest["views"])
    seed, stored = told.pop("seed"), tuple(told.pop("stored"))
    opened = store.open(store.grid.file(0))
    index = np.arange(opened.file.first_image, opened.file.end_image)
    spec = ViewSpec(**told | {"ratio": tuple(told["ratio"])})
    now = digest_of(view_params(spec, seed, opened.file.first_epoch, index, stored).packed())
    if now != opened.record.views[0]:
        raise ValueError(
            f"{store.folder.uri} holds labels of other views than are drawn now: they were made by another version "
            "(core/views/params.py, or SciPy with CutMix). Use that one, or label anew (stages=[label], "
            "overwrite=true)"
        )
