"""Where latents are, and how images become latents."""

from __future__ import annotations

from dataclasses import dataclass

from ddoq_ray.config.schema import option, require


@dataclass(frozen=True)
class LatentsConfig:
    path: str | None = option(None, "the latents/ folder of another run to quantize instead of encoding again")
    keep: bool = option(True, "keep the latents after the run, so that another IPC or quantizer need not encode")

    def __post_init__(self) -> None:
        require(
            self.path is None or self.keep,
            "latents.keep=false has no effect with latents.path: a run never removes another run's latents",
        )


@dataclass(frozen=True)
class EncoderConfig:
    workers: int = option(1, "encoder actors")
    batch: int = option(64, "images in one forward pass; part of what makes the latents the same bytes")
    chunk_samples: int = option(0, "samples in a chunk; 0 = as many as fit 32 MB of pixels")

    def __post_init__(self) -> None:
        require(self.workers >= 1, f"encoder.workers={self.workers}: expected 1 or more")
        require(self.batch >= 1, f"encoder.batch={self.batch}: expected 1 or more")
        require(self.chunk_samples >= 0, f"encoder.chunk_samples={self.chunk_samples}: expected 0 or more")
