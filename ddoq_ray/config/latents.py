"""Where latents are, and how images become latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ddoq_ray.config.schema import option, require

Resize = Literal["squash", "center-crop", "pad"]  # `data.pictures.to_square` says what each does


@dataclass(frozen=True)
class LatentsConfig:
    path: str | None = option(None, "the latents/ folder of another run to quantize instead of encoding again")
    keep: bool = option(True, "keep the latents after the run, so that another IPC or quantizer need not encode")


@dataclass(frozen=True)
class EncoderConfig:
    workers: int = option(1, "encoder actors, at least")
    max_workers: int = option(0, "encoder actors, at most: the pool grows while chunks wait; 0 = always `workers`")
    path: str | None = option(
        None, "another autoencoder of the prior's latent space, a folder or hub id; by default the prior's own"
    )
    resize: Resize = option(
        "squash",
        "how a picture becomes the prior's square; squash: both edges (as D4M); center-crop: the shorter edge, then "
        "the middle (as DiT); pad: the longer edge, on black",
    )
    posterior: Literal["mode", "sample"] = option(
        "mode", "mode: the posterior's mean; sample: drawn from it, with noise keyed by seed and sample"
    )
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "the encoder's arithmetic")
    channels_last: bool = option(False, "channels innermost, which convolutions in half precision want")
    compile: bool = option(False, "run the encoder through torch.compile")
    batch: int = option(
        64, "images in one forward pass, part of what makes the latents the same bytes; 0 = found once a run by trying"
    )
    chunk_samples: int = option(0, "samples in a chunk; 0 = as many as fit 48 MB of pixels")

    def __post_init__(self) -> None:
        require(self.workers >= 1, f"encoder.workers={self.workers}: expected 1 or more")
        require(
            self.max_workers == 0 or self.max_workers >= self.workers,
            f"encoder.max_workers={self.max_workers}: expected 0, or encoder.workers={self.workers} or more",
        )
        require(self.batch >= 0, f"encoder.batch={self.batch}: expected 1 or more, or 0 to have it found")
        require(self.chunk_samples >= 0, f"encoder.chunk_samples={self.chunk_samples}: expected 0 or more")

    @property
    def pool(self) -> tuple[int, int]:
        """Bounds of the number of encoder actors."""
        return self.workers, max(self.workers, self.max_workers)
