"""A run, as every stage is given it: what was asked, where it goes, what it works on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ddoq_ray.config import RunConfig
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.workers import Events
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.prepared import Data


@dataclass(frozen=True)
class Run:
    """One run of the pipeline, in the driver.

    Attributes:
        config: The configuration, with pools that fit the cluster.
        dir: The run directory.
        data: The prepared data, its classes with their places in the networks.
        networks: Facts of the prior and the teacher.
        events: The run's event log.
    """

    config: RunConfig
    dir: Folder
    data: Data
    networks: Networks
    events: Events
    _finished: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def latents(self) -> Folder:
        """The latent log: the run's own, or another run's that it was told to use."""
        given = self.config.latents.path
        return Folder(given) if given else self.dir / layout.LATENTS

    def finished(self, artifact: Artifact) -> Any:
        """The manifest of what an earlier stage made; read once, for a set of many shards has a long one.

        Raises:
            ValueError: It is not finished, naming the command to run first.
        """
        place = artifact.folder.uri
        if place not in self._finished:
            self._finished[place] = artifact.require()
        return self._finished[place]
