"""What of a prior's folder is taken, and how its networks run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ddoq_ray.models.autoencoder import DTYPES, Autoencoder, cast
from ddoq_ray.models.compiling import check_compiler


@dataclass(frozen=True)
class Loading:
    """See the module. What a kind of prior cannot follow, it refuses.

    Attributes:
        device: where the networks run.
        dtype: "float32", "float16" or "bfloat16": their arithmetic. Latents stay float32.
        channels_last: keep images and weights with channels innermost, which convolutions in half precision want.
        compile: run the denoiser through torch.compile; then every call should have the same shape.
        decode_batch: latents that are decoded at once; None: the whole batch. Less memory, and other last bits.
        autoencoder_only: leave a pipeline's denoiser aside.
        scheduler: a name of `schedulers.SCHEDULERS`, or "folder" for the folder's own.
        image_size: H = W of the images; None is what the folder says.
        negative_prompt: the null condition of a prior that takes text.
    """

    device: str | torch.device = "cpu"
    dtype: str = "float32"
    channels_last: bool = False
    compile: bool = False
    decode_batch: int | None = None
    autoencoder_only: bool = False
    scheduler: str = "folder"
    image_size: int | None = None
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        """Refuse what no kind can follow."""
        if self.dtype not in DTYPES:
            raise ValueError(f"prior: expected a dtype of {sorted(DTYPES)}, got {self.dtype!r}")
        if self.decode_batch is not None and self.decode_batch < 1:
            raise ValueError(f"prior: expected to decode 1 latent or more at once, got {self.decode_batch}")

    def autoencoder(self, network: Any, id: str = "") -> Autoencoder:
        """The autoencoder on its device."""
        return Autoencoder(
            network,
            device=self.device,
            dtype=self.dtype,
            channels_last=self.channels_last,
            decode_batch=self.decode_batch,
            id=id,
        )

    def denoiser(self, network: Any) -> Any:
        """The denoiser itself, moved, cast, and compiled where that is asked for."""
        network = cast(network, torch.device(self.device), DTYPES[self.dtype]).eval().requires_grad_(False)
        if self.channels_last:
            torch.nn.Module.to(network, memory_format=torch.channels_last)
        if self.compile:
            check_compiler("synthesizer.compile")
            network.compile(dynamic=False)
        return network


PLAIN = Loading()  # the folder as it is, in float32 on the CPU
