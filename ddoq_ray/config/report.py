"""What the report measures beside the students."""

from __future__ import annotations

from dataclasses import dataclass

from ddoq_ray.config.schema import option, require


@dataclass(frozen=True)
class ReportConfig:
    heldout_images: int = option(
        50, "validation images of each class that are encoded to measure the codebooks on unseen ones; 0 = none"
    )

    def __post_init__(self) -> None:
        require(self.heldout_images >= 0, f"report.heldout_images={self.heldout_images}: expected 0 or more")
