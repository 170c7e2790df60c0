"""The encoder of Stable Diffusion 1.5 and DiT on a GPU: images a second, and the part of the matrix peak that it is.

The two autoencoders (`sd-1.5`, and `sd-vae-ft` of DiT) are built with random weights, on which speed does not depend;
they are the same network, so a size is measured once and the row names both. Each way of encoding is what an encoder
actor does with a chunk: pixels go up as bytes, are encoded in micro-batches, and the latents come back once.
`d4m-loop` is what D4M's released code does: batches of 10, float16, eager, `.cpu().numpy()` for each. `peak_tflops` is
a large matrix product in the same arithmetic, measured in the same run; `of_peak` is the encoder's own operations
(convolutions and products, counted by torch) over it. Needs no Ray. Without a GPU every row says so; `--cpu` runs
everything on the processor, with small sizes, to show that it works.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.provenance import finish, parser
from ddoq_ray.models.autoencoder import DTYPES, Autoencoder

NAMES = "sd-1.5 = sd-vae-ft"
D4M_BATCH = 10
FORMS: dict[str, dict[str, bool]] = {
    "eager": {},
    "channels_last": {"channels_last": True},
    "compiled": {"channels_last": True, "compile": True},
}
MEASURED = ["batch", "images_per_s", "tflops", "peak_tflops", "of_peak", "ratio_to_d4m", "peak_gib"]
COLUMNS = ["model", "size", "form", "dtype", *MEASURED]


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


def chunk_encoder(ours: Autoencoder, pixels: torch.Tensor, batch: int) -> Callable[[], Any]:
    """What an encoder actor does with a chunk of pixels uint8 [n, H, W, 3] in host memory."""

    def encode() -> Any:
        on_device = pixels.to(ours.device, non_blocking=True)
        parts = []
        for inner in on_device.split(batch):
            latents = ours.encode(inner.permute(0, 3, 1, 2).float() / 127.5 - 1)
            parts.append(latents.flatten(1).to(torch.float16))
        return torch.cat(parts).cpu().numpy()

    return encode


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

    if not gpu and not asked.cpu:
        for size in asked.size:
            report(size, "d4m-loop", "float16", "not measured")
            for dtype in ("bfloat16", "float16"):
                for form in FORMS:
                    report(size, form, dtype, "not measured")
        finish(rows, COLUMNS, asked.json)
        return

    torch.backends.cudnn.benchmark = False  # as in an actor
    same_network(asked.widths)
    peaks = {d: matrix_peak(DTYPES[d], device, asked.matrix, asked.seconds) for d in ("bfloat16", "float16")}
    for size in asked.size:
        flops = operations(size, asked.widths)
        more = max(1, (512 // size) ** 2)
        count = asked.images_512 * more
        pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)
        if gpu:
            pixels = pixels.pin_memory()

        def rate(seconds: float, dtype: str, batch: int, count: int = count, flops: int = flops) -> dict[str, Any]:
            tflops = flops * count / seconds / 1e12
            row = {"batch": batch, "images_per_s": count / seconds, "tflops": tflops, "peak_tflops": peaks[dtype]}
            row["of_peak"] = tflops / peaks[dtype]
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if gpu else "not measured"
            return row

        few = (pixels[: 10 * D4M_BATCH].permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
        network = torch.nn.Module.to(build(size, asked.widths), device, torch.float16).eval().requires_grad_(False)
        taken = seconds_of(d4m_loop(network, few, device), device, asked.seconds)
        d4m = rate(taken * count / len(few), "float16", D4M_BATCH)
        report(size, "d4m-loop", "float16", d4m | {"ratio_to_d4m": 1.0})
        del network, few
        for dtype in ("bfloat16", "float16"):
            for form, how in FORMS.items():
                best: dict[str, Any] = {}
                ours = Autoencoder(build(size, asked.widths), device=device, dtype=dtype, **how)  # type: ignore[arg-type]
                for batch in [b * more for b in asked.batch_512 if b <= asked.images_512]:
                    if gpu:
                        torch.cuda.empty_cache()
                        torch.cuda.reset_peak_memory_stats()
                    fits = pixels[: count - count % batch]  # the compiled form has one shape
                    try:
                        taken = seconds_of(chunk_encoder(ours, fits, batch), device, asked.seconds)
                    except torch.OutOfMemoryError:
                        break
                    row = rate(taken * count / len(fits), dtype, batch)
                    if not best or row["images_per_s"] > best["images_per_s"]:
                        best = row
                if not best:
                    report(size, form, dtype, "out of memory")
                    continue
                report(size, form, dtype, best | {"ratio_to_d4m": best["images_per_s"] / d4m["images_per_s"]})
                del ours
                torch.compiler.reset()
    finish(rows, COLUMNS, asked.json)


if __name__ == "__main__":
    main()
