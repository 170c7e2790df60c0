"""What a step is: a stage's work on one artifact. A run is a list of steps, which all that looks ahead walks over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ddoq_ray.config import RunConfig
from ddoq_ray.config.cluster import TrainerResources, WorkerResources
from ddoq_ray.config.methods import MethodSpec
from ddoq_ray.execution.run import Run
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import Place


@dataclass(frozen=True)
class Ask:
    """`count` workers of one kind, each with its resources on one node.

    Attributes:
        what: The workers, in words.
        key: The configuration's group whose num_cpus and num_gpus each of them asks for; empty where it is fixed.
        pool: The key that says how many there are; empty where that is fixed.
        least: How many the stage can do with.
    """

    what: str
    count: int
    cpus: float
    gpus: float = 0.0
    memory: float = 0.0
    key: str = ""
    pool: str = ""
    least: int = 1

    @staticmethod
    def of(config: RunConfig, worker: str, what: str, count: int = 1, pool: str = "", least: int = 1) -> Ask:
        """Workers that ask for what ``cluster.<worker>`` says."""
        resources: WorkerResources | TrainerResources = getattr(config.cluster, worker)
        asked = (resources.num_cpus, resources.num_gpus)
        return Ask(what, count, *asked, key=f"cluster.{worker}", pool=pool, least=least)

    @property
    def room(self) -> dict[str, float]:
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}


class Step(ABC):
    """A stage's work on one artifact of the run directory.

    Attributes:
        stage: The word in `stages` (and the command) that does it.
        name: What manifests, events and costs call it; the stage's word, or one of its own.
        at_once: Whether steps of this kind hold their workers at the same time, or take turns on one pool.
    """

    stage: ClassVar[str]
    name: ClassVar[str]
    at_once: ClassVar[bool] = False

    @property
    @abstractmethod
    def place(self) -> str:
        """The artifact's folder, relative to the run directory."""

    @abstractmethod
    def settings(self, config: RunConfig) -> dict[str, Any]:
        """What its bytes follow from, as far as the configuration alone says it: known before Ray starts.

        Raises:
            ValueError: For a configuration that cannot be carried out.
        """

    def inputs(self, run: Run) -> dict[str, Any]:
        """The rest of what its bytes follow from: digests of the networks, and of what it is made from.

        Raises:
            ValueError: When something that it is made from is not finished.
        """
        del run
        return {}

    def identity(self, run: Run) -> dict[str, Any]:
        """What its bytes follow from, whole; recorded in the manifest and compared before anything is reused."""
        return merged(self.settings(run.config), self.inputs(run))

    def asks(self, config: RunConfig) -> list[Ask]:
        """The workers that it holds at the same time, at least; none where it is work of the driver's."""
        del config
        return []

    def checked(self, config: RunConfig) -> bool:
        """Whether what is there must be this configuration's before anything starts, wanted or not: others read it."""
        del config
        return True

    def artifact(self, run_dir: Folder) -> Artifact:
        return Artifact(run_dir / self.place, self.name, command=self.stage)

    def wanted(self, config: RunConfig) -> bool:
        """Whether this run is asked to do it."""
        return self.stage in config.stages


class ImageSetStep(Step):
    """A step that makes an image set.

    Attributes:
        method: Whose it is; of several that share it, the first.
        at: Where the set is, and what belongs to it.
    """

    method: MethodSpec
    at: Place

    @property
    def place(self) -> str:
        return self.at.images


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both, with nested mappings joined.

    >>> merged({"encoder": {"dtype": "float32"}}, {"encoder": {"path": "ab"}, "prior": "cd"})
    {'encoder': {'dtype': 'float32', 'path': 'ab'}, 'prior': 'cd'}
    """
    joined = dict(one)
    for key, value in other.items():
        there = joined.get(key)
        joined[key] = merged(there, value) if isinstance(there, Mapping) and isinstance(value, Mapping) else value
    return joined
