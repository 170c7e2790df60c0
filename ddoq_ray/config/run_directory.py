"""The keys of the commands that look at the folder of a run."""

from __future__ import annotations

from dataclasses import dataclass

from ddoq_ray.config.schema import option, require


@dataclass(frozen=True)
class StatusConfig:
    run_dir: str | None = option(None, "the run directory; as the first word it needs no run_dir=")

    @property
    def folder(self) -> str:
        """The run directory.

        Raises:
            ValueError: None was given.
        """
        require(self.run_dir is not None, "run_dir is not given: the folder of the run to look at")
        return str(self.run_dir)


@dataclass(frozen=True)
class VerifyConfig(StatusConfig):
    repair: bool = option(False, "set damaged files aside and run the stages that make them anew")
