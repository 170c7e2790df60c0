"""A run of Ray Train to its end, through the deaths of workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray.train

from ddoq_ray.config.cluster import TrainerResources
from ddoq_ray.execution.workers import DEATHS, MAX_DEATHS
from ddoq_ray.stages.train.failures import own_words, worth_retrying

if TYPE_CHECKING:  # torch: not in a driver that trains nothing
    from ray.train.torch import TorchTrainer

# A death by itself is that of Ray Train's controller.
FAILED: tuple[type[BaseException], ...] = (ray.train.TrainingFailedError, *DEATHS)
RAY_TRAIN = "train"  # Ray Train's own folder in its storage, where nothing else is said


def fit(
    loop: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    resources: TrainerResources,
    storage: str,
    lost: Callable[[str, int], None],
    *,
    name: str = RAY_TRAIN,
) -> None:
    """Run a loop on every worker; after a death once more. Ray Train itself would try any exception again.

    Args:
        loop: what a worker does with the settings; it takes up what it left.
        settings: small and picklable.
        resources: of the workers.
        storage: the folder in which Ray Train has its own.
        lost: told the reason of each death, and how many there were.
        name: of Ray Train's folder there.

    Raises:
        ValueError: A worker's, in its own words.
    """
    for deaths in range(MAX_DEATHS + 1):
        try:
            _trainer(loop, settings, resources, storage, name).fit()
            return
        except FAILED as error:
            told = own_words(error)
            if told is not None:
                raise ValueError(told) from None
            if deaths == MAX_DEATHS or not worth_retrying(error, resources.max_workers or resources.workers):
                raise
            lost(type(error).__name__, deaths + 1)


def _trainer(
    loop: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    resources: TrainerResources,
    storage: str,
    name: str,
) -> TorchTrainer:
    from ray.train.torch import TorchTrainer  # torch: not in a driver that trains nothing

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
