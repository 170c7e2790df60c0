"""The pretrained networks: the prior (encoder, latent diffusion, decoder) and the teacher."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from ddoq_ray.config.schema import option, require


@dataclass(frozen=True)
class PriorConfig:
    path: str | None = option(
        "shipped:digits-prior", "folder or hub id in diffusers' format; shipped:NAME is in the package; null: none"
    )

    autoencoder_only: bool = option(
        False, "take the folder's autoencoder alone: centroids are decoded as they are, and nothing is denoised"
    )
    image_size: int | None = option(
        None,
        "side of the images that the prior reads and makes, in pixels, where the folder does not fix it; null: what it "
        "says (stored ones may be smaller: synthesizer.image_size)",
    )

    scheduler: Literal["folder", "ddim", "pndm", "dpm++2m"] = option(
        "folder", "the solver of the diffusion; folder: the prior's own; the others run over the same noise levels"
    )
    negative_prompt: str = option("", "what a prior that takes text is guided away from; empty: from no text")

    def __post_init__(self) -> None:
        require(
            self.image_size is None or self.image_size >= 1,
            f"prior.image_size={self.image_size}: expected 1 or more, or null",
        )

    @property
    def loading(self) -> dict[str, Any]:
        """What `load_prior` is told beside the path."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "path"}

    @property
    def sampling(self) -> dict[str, Any]:
        """What images follow from and latents do not; for the rest the prior's digest stands."""
        return {"scheduler": self.scheduler, "negative_prompt": self.negative_prompt}

    @property
    def given(self) -> str:
        """The path, where a stage that needs a prior runs: none begins without one."""
        assert self.path is not None, "a stage that needs a prior has begun without one"
        return self.path


@dataclass(frozen=True)
class TeacherConfig:
    path: str | tuple[str, ...] | None = option(
        "shipped:digits-teacher",
        "folder with config.json and model.safetensors; shipped:NAME; torchvision:NAME; [A,B]: the mean of their "
        "probabilities",
    )
    min_top1: float | None = option(
        None, "stop before labelling when its top-1 on real validation images is below, in %; null = 3 times chance"
    )
    min_kept: float = option(
        0.8, "warn when less than this share of its top-1 is left on reconstructions of real images by the autoencoder"
    )
    batch: int = option(250, "views in one forward pass; part of what makes the labels the same bytes")

    def __post_init__(self) -> None:
        require(
            self.min_top1 is None or 0 <= self.min_top1 <= 100,
            f"teacher.min_top1={self.min_top1}: expected a percentage, 0 to 100",
        )
        require(self.path != (), "teacher.path=[]: expected a path, or several")
        require(0 <= self.min_kept <= 1, f"teacher.min_kept={self.min_kept}: expected 0 to 1")
        require(self.batch >= 1, f"teacher.batch={self.batch}: expected 1 or more")

    @property
    def paths(self) -> tuple[str, ...]:
        """Of its members: one, where it is no ensemble; none without a teacher."""
        if self.path is None:
            return ()
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def title(self) -> str:
        """A word for it in tables and in folders' names: the last part of its path, or of each."""
        return "+".join(re.split(r"[/:]", path.rstrip("/"))[-1] for path in self.paths or ("none",))

    def threshold(self, num_classes: int) -> float:
        """The least top-1 in % that is accepted; without a figure, what no wrong class mapping reaches."""
        return self.min_top1 if self.min_top1 is not None else min(50.0, 300.0 / num_classes)
