"""A run of Ray Train to its end, through the deaths of workers."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray.train

from ddoq_ray.config.cluster import TrainerResources
from ddoq_ray.execution.workers import DEATHS, MAX_DEATHS
from ddoq_ray.stages.train.failures import own_words, worth_retrying
from ddoq_ray.storage.folder import Folder

if TYPE_CHECKING:  # torch: not in a driver that trains nothing
    from ray.train.torch import TorchTrainer

# A death by itself is that of Ray Train's controller.
FAILED: tuple[type[BaseException], ...] = (ray.train.TrainingFailedError, *DEATHS)
RECORD = "checkpoint_manager_snapshot.json"  # Ray Train's, in its own folder
RAY_TRAIN = "train"  # Ray Train's own folder, where nothing else is said


def fit(
    loop: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    resources: TrainerResources,
    folder: Folder,
    lost: Callable[[str, int], None],
    *,
    reached: Callable[[], object] = lambda: None,
) -> None:
    """Run a loop on every worker; after a death once more. Ray Train itself would try any exception again.

    Only deaths between which nothing was reached count together: a training of days on nodes that may vanish has many.

    Args:
        loop: what a worker does with the settings; it takes up what it left.
        settings: small and picklable.
        resources: of the workers.
        folder: Ray Train's own.
        lost: told the reason of each death, and how many there were since something was reached.
        reached: another value when more of the work is safe than before; Ray Train's own checkpoints are seen here.

    Raises:
        ValueError: A worker's, in its own words.
    """
    deaths, before = 0, None
    while True:
        try:
            _trainer(loop, settings, resources, folder).fit()
            return
        except FAILED as error:
            told = own_words(error)
            if told is not None:
                raise ValueError(told) from None
            now = (reached(), _recorded(folder))
            deaths = deaths + 1 if now == before else 1
            before = now
            if deaths > MAX_DEATHS or not worth_retrying(error, resources.max_workers or resources.workers):
                raise
            lost(type(error).__name__, deaths)


def _recorded(folder: Folder) -> bytes:
    """Ray Train's record of its checkpoints: one that a death has cut off is not in it."""
    with contextlib.suppress(ValueError, OSError):  # none yet, or the store is away
        return folder.read(RECORD)
    return b""


def _trainer(
    loop: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    resources: TrainerResources,
    folder: Folder,
) -> TorchTrainer:
    from ray.train.torch import TorchTrainer  # torch: not in a driver that trains nothing

    storage, name = posixpath.split(folder.uri)
    bounds = (resources.min_workers, resources.max_workers)

    return TorchTrainer(
        loop,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            # Within bounds Ray Train starts with what is there, and anew from the last checkpoint when nodes come or go
            num_workers=resources.workers if bounds == (None, None) else bounds,  # type: ignore[arg-type]
            use_gpu=resources.num_gpus > 0,
            resources_per_worker={"CPU": resources.num_cpus}
            | ({"GPU": resources.num_gpus} if resources.num_gpus else {}),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=0),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
