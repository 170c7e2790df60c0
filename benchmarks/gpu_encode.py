"""The encoder of Stable Diffusion 1.5 and DiT on a GPU: images a second, and the part of the matrix peak that it is.

The two autoencoders (`sd-1.5`, and `sd-vae-ft` of DiT) are built with random weights, on which speed does not depend;
they are the same network, so a size is measured once and the row names both. Each form is measured through
`ddoq_ray.models.encoding.LatentEncoder`, which is what an encoder actor calls with a chunk: pixels go up as bytes, are
encoded in micro-batches, and the latents come back once.
`d4m-loop` is what D4M's released code does: batches of 10, float16, eager, `.cpu().numpy()` for each. `peak_tflops` is
a large matrix product in the same arithmetic, measured in the same run; `of_peak` is the encoder's own operations
(convolutions and products, counted by torch) over it. Needs no Ray. Without a GPU every row says so; `--cpu` runs
everything on the processor, with small sizes, to show that it works.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.provenance import finish, parser
from ddoq_ray.models.autoencoder import DTYPES, Autoencoder
from ddoq_ray.models.encoding import Encoding, LatentEncoder

NAMES = "sd-1.5 = sd-vae-ft"
D4M_BATCH = 10
FORMS: dict[str, dict[str, bool]] = {
    "eager": {},
    "channels_last": {"channels_last": True},
    "compiled": {"channels_last": True, "compile": True},
}
MEASURED = ["batch", "images_per_s", "tflops", "peak_tflops", "of_peak", "ratio_to_d4m", "peak_gib"]
ARITHMETIC = ("bfloat16", "float16")
COLUMNS = ["model", "size", "form", "dtype", *MEASURED]

Report = Callable[[int, str, str, "dict[str, Any] | str"], None]


def build(sample_size: int, widths: list[int]) -> AutoencoderKL:
    """The autoencoder of both models: their configs differ in sample_size alone."""
    levels = len(widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(widths),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=min(32, widths[0]),
        sample_size=sample_size,
        scaling_factor=0.18215,
    )


def same_network(widths: list[int]) -> None:
    """Make sure that one measurement speaks for both models."""
    with torch.device("meta"):
        shapes = [{k: v.shape for k, v in build(size, widths).state_dict().items()} for size in (512, 256)]
    assert shapes[0] == shapes[1]


def operations(size: int, widths: list[int]) -> int:
    """Floating-point operations of the convolutions and products of encoding one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(size, widths).encode(torch.empty(1, 3, size, size))
    return counter.get_total_flops()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: str, least: float) -> float:
    """Median seconds of a call, after two that are not counted; calls for `least` seconds, three at least."""
    for _ in range(2):
        work()
    synchronize(device)
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < least:
        start = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]


def matrix_peak(dtype: torch.dtype, device: str, n: int, least: float) -> float:
    """Tflop/s of an n x n x n product, the better of two layouts."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    taken = min(seconds_of(lambda: a @ b, device, least), seconds_of(lambda: a @ b.T, device, least))
    return 2 * n**3 / taken / 1e12


def d4m_loop(network: AutoencoderKL, images: torch.Tensor, device: str) -> Callable[[], Any]:
    """D4M's loop over float images [n, 3, H, W] in host memory."""

    @torch.no_grad()
    def encode() -> Any:
        found = []
        for inner in images.split(D4M_BATCH):
            latents = network.encode(inner.to(device).to(network.dtype)).latent_dist.mode()
            found.append((latents * network.config["scaling_factor"]).cpu().numpy())
        return found

    return encode


@dataclass(frozen=True)
class Bench:
    """What is measured, and how long.

    Attributes:
        widths: Channels of the network's levels.
        seconds: How long a row is measured, at least.
        peaks: Tflop/s of a matrix product, by arithmetic.
    """

    device: str
    widths: list[int]
    seconds: float
    peaks: dict[str, float]

    def row(self, size: int, dtype: str, batch: int, per_image: float) -> dict[str, Any]:
        """The figures of a form that takes `per_image` seconds for an image."""
        tflops = operations(size, self.widths) / per_image / 1e12
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else "not measured"
        return {
            "batch": batch,
            "images_per_s": 1 / per_image,
            "tflops": tflops,
            "peak_tflops": self.peaks[dtype],
            "of_peak": tflops / self.peaks[dtype],
            "peak_gib": memory,
        }

    def d4m(self, size: int, pixels: npt.NDArray[np.uint8]) -> dict[str, Any]:
        """D4M's loop over float images of these pixels uint8 [n, size, size, 3]."""
        images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
        network = torch.nn.Module.to(build(size, self.widths), self.device, torch.float16).eval().requires_grad_(False)
        taken = seconds_of(d4m_loop(network, images, self.device), self.device, self.seconds)
        return self.row(size, "float16", D4M_BATCH, taken / len(images))

    def ours(
        self, pixels: npt.NDArray[np.uint8], form: str, dtype: str, batches: Sequence[int]
    ) -> dict[str, Any] | None:
        """The fastest of the batches over a chunk uint8 [n, size, size, 3]; None where the smallest does not fit."""
        size, how, best = pixels.shape[1], FORMS[form], None
        torch.compiler.reset()
        autoencoder = Autoencoder(build(size, self.widths), device=self.device, dtype=dtype, **how)  # type: ignore[arg-type]  # bools by name
        shape = (autoencoder.latent_channels, size // autoencoder.factor, size // autoencoder.factor)
        for batch in batches:
            if self.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            encoder = LatentEncoder(autoencoder, Encoding(shape, batch, one_shape="compile" in how))
            fits = pixels[: len(pixels) - len(pixels) % batch]  # no time for what is only filled up
            keys = [""] * len(fits)
            try:
                taken = seconds_of(partial(encoder.encode, fits, keys), self.device, self.seconds)
            except torch.OutOfMemoryError:
                break
            row = self.row(size, dtype, batch, taken / len(fits))
            if best is None or row["images_per_s"] > best["images_per_s"]:
                best = row
        return best


def measure(bench: Bench, size: int, images: int, batches: Sequence[int], report: Report) -> None:
    """All forms at one size, over a chunk of `images`."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), dtype=np.uint8)
    d4m = bench.d4m(size, pixels[: 10 * D4M_BATCH])
    report(size, "d4m-loop", "float16", d4m | {"ratio_to_d4m": 1.0})
    for dtype in ARITHMETIC:
        for form in FORMS:
            best = bench.ours(pixels, form, dtype, batches)
            if best is not None:
                best["ratio_to_d4m"] = best["images_per_s"] / d4m["images_per_s"]
            report(size, form, dtype, best or "out of memory")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--size", type=int, nargs="+", default=[256, 512])
    arguments.add_argument(
        "--images-512", type=int, default=128, help="images of a chunk at 512 px; at 256 px four times"
    )
    arguments.add_argument("--batch-512", type=int, nargs="+", default=[8, 16, 32], help="at 256 px four times these")
    arguments.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 512], help="channels of the levels")
    arguments.add_argument("--matrix", type=int, default=8192, help="side of the matrices whose product is the peak")
    arguments.add_argument("--seconds", type=float, default=3.0, help="how long a row is measured, at least")
    arguments.add_argument("--cpu", action="store_true", help="run on the processor all the same")
    asked = arguments.parse_args()
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    about = {"model": NAMES, "gpu": torch.cuda.get_device_name() if gpu else "none", "torch": torch.__version__}
    rows: list[dict[str, Any]] = []

    def report(size: int, form: str, dtype: str, measured: dict[str, Any] | str) -> None:
        told = dict.fromkeys(MEASURED, measured) if isinstance(measured, str) else measured
        rows.append(about | {"size": size, "form": form, "dtype": dtype} | told)
        print(*(f"{c}={rows[-1].get(c)}" for c in COLUMNS), flush=True)

    if gpu or asked.cpu:
        torch.backends.cudnn.benchmark = False  # as in an actor
        same_network(asked.widths)
        peaks = {d: matrix_peak(DTYPES[d], device, asked.matrix, asked.seconds) for d in ARITHMETIC}
        bench = Bench(device, asked.widths, asked.seconds, peaks)
        for size in asked.size:
            more = max(1, (512 // size) ** 2)
            batches = [b * more for b in asked.batch_512 if b <= asked.images_512]
            measure(bench, size, asked.images_512 * more, batches, report)
    else:
        for size in asked.size:
            report(size, "d4m-loop", "float16", "not measured")
            for dtype in ARITHMETIC:
                for form in FORMS:
                    report(size, form, dtype, "not measured")
    finish(rows, COLUMNS, asked.json)


if __name__ == "__main__":
    main()
