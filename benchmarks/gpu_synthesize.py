"""Synthesis on a GPU: images a second of Stable Diffusion 1.5 and DiT-XL/2, and the part of the matrix peak that it is.

The networks are built in their real sizes with random weights, on which speed does not depend (the last layer is made
small, so that no step leaves the range of half precision). `eager`, `channels_last` and `compiled` are what a decoder
actor does with a batch: centroids noised to strength 0.7, denoised with guidance, decoded, pictures back as bytes.
`d4m-loop` is what D4M's released code does: one image at a time, eager, the text encoder asked for each, the picture
resized and saved as PNG before the next one. Rows of other schedulers take the fastest form and batch. `peak_tflops` is
a large matrix product in the same arithmetic, measured in the same run; `of_peak` is the networks' own operations
(convolutions and products, counted by torch) over it. Needs no Ray. Without a GPU every row says so; `--tiny` runs all
of it on the processor with small networks, to show that it works.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.gpu_encode import build as build_autoencoder
from benchmarks.gpu_encode import matrix_peak, seconds_of
from benchmarks.provenance import finish, parser
from ddoq_ray.models.autoencoder import DTYPES
from ddoq_ray.models.priors.base import Sampling
from ddoq_ray.models.priors.class_conditional import ClassConditionalPrior
from ddoq_ray.models.priors.loading import Loading
from ddoq_ray.models.priors.sampling import DiffusionPrior
from ddoq_ray.models.priors.schedulers import make_scheduler
from ddoq_ray.models.priors.stable_diffusion import StableDiffusionPrior

FORMS: dict[str, dict[str, bool]] = {
    "eager": {},
    "channels_last": {"channels_last": True},
    "compiled": {"channels_last": True, "compile": True},
}
STORED = 224  # px, of D4M's pictures
D4M_DTYPE = "float16"
STRENGTH, STEPS = 0.7, 50
SCHEDULES = {"ddim": STEPS, "pndm": STEPS, "dpm++2m": STEPS, "dpm++2m, 20 steps": 20}  # -> steps
MEASURED = ["calls", "images_per_s", "tflops", "peak_tflops", "of_peak", "ratio_to_d4m", "peak_gib"]
COLUMNS = ["model", "form", "scheduler", "dtype", "batch", *MEASURED]


@dataclass
class Model:
    """A prior's architecture.

    Attributes:
        name: as it is published.
        size: side of the images, in pixels.
        guidance: the published scale.
        batches: images at once that are tried.
        denoiser: makes the network.
        widths: channels of the autoencoder's levels.
        scheduler: the folder's own.
        text: (tokens, width) of a prompt's embedding; None: labels.
    """

    name: str
    size: int
    guidance: float
    batches: tuple[int, ...]
    denoiser: Callable[[], Any]
    widths: tuple[int, ...]
    scheduler: dict[str, Any]
    text: tuple[int, int] | None = None

    def prior(self, dtype: str, device: str, scheduler: str = "folder", **form: bool) -> DiffusionPrior:
        """The prior with random weights."""
        how = Loading(device=device, dtype=dtype, **form)  # type: ignore[arg-type]
        with torch.device(device):
            vae, denoiser = build_autoencoder(self.size, list(self.widths)), self.denoiser()
        with torch.no_grad():
            last = denoiser.conv_out if self.text else denoiser.proj_out_2
            last.weight.mul_(1e-3)
        solver = make_scheduler(self.scheduler, scheduler)
        if self.text is None:
            return ClassConditionalPrior(vae, denoiser, solver, how=how, id="random")
        prompts: Any = SimpleNamespace(tokens=self.text[0], width=self.text[1])  # the conditions are drawn here
        return StableDiffusionPrior(vae, denoiser, solver, prompts, how=how, id="random")

    def condition(self, rows: int) -> torch.Tensor:
        """What a batch is asked for."""
        return torch.arange(rows) if self.text is None else torch.randn(rows, 2, *self.text)

    @cached_property
    def operations(self) -> tuple[int, int]:
        """Floating-point operations of one call of the denoiser and of one decoding, for one image."""
        with torch.device("meta"):
            vae, denoiser = build_autoencoder(self.size, list(self.widths)), self.denoiser()
            side = self.size // 2 ** (len(self.widths) - 1)
            z, t = torch.empty(1, 4, side, side), torch.empty(1, dtype=torch.int64)
            with FlopCounterMode(display=False) as of_call:
                if self.text is None:
                    denoiser(z, timestep=t, class_labels=torch.empty(1, dtype=torch.int64))
                else:
                    denoiser(z, t, encoder_hidden_states=torch.empty(1, *self.text))
            with FlopCounterMode(display=False) as of_decoding:
                vae.decode(z)
        return of_call.get_total_flops(), of_decoding.get_total_flops()


_BETAS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_PNDM = dict(PNDMScheduler(**_BETAS, skip_prk_steps=True, steps_offset=1).config) | {"_class_name": "PNDMScheduler"}
_DDIM = dict(DDIMScheduler(clip_sample=False).config) | {"_class_name": "DDIMScheduler"}
_XL = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32}
_SMALL_DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
_SMALL_UNET: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (8, 8), "layers_per_block": 1, "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 2, "norm_num_groups": 4,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def models(tiny: bool) -> tuple[Model, ...]:
    """Both models in their published sizes, or in ones that a processor runs in a second."""
    widths = (8, 8) if tiny else (128, 256, 512, 512)
    unet: dict[str, Any] = _SMALL_UNET if tiny else {"sample_size": 64, "cross_attention_dim": 768}
    dit = {"in_channels": 4, "out_channels": 8, "patch_size": 2, **(_SMALL_DIT if tiny else _XL)}
    return (
        Model(
            "sd-1.5", 16 if tiny else 512, 8.0, (1, 2) if tiny else (1, 4, 16, 32),
            lambda: UNet2DConditionModel(**unet), widths, _PNDM,
            (8, 16) if tiny else (77, 768),
        ),
        Model(
            "dit-xl-2-256", 16 if tiny else 256, 4.0, (1, 2) if tiny else (1, 8, 32, 128),
            lambda: DiTTransformer2DModel(**dit), widths, _DDIM,
        ),
    )  # fmt: skip


def batch_maker(model: Model, prior: DiffusionPrior, batch: int, steps: int) -> Callable[[], Any]:
    """What a decoder actor does with a batch of centroids in host memory."""
    z, noise = (torch.randn(batch, *prior.latent_shape) for _ in range(2))
    condition, asked = model.condition(batch), Sampling(STRENGTH, steps, guidance=model.guidance)
    return lambda: prior.synthesize(z, condition, noise, asked).numpy()


def d4m_loop(model: Model, prior: DiffusionPrior, steps: int, folder: Path) -> Callable[[], Any]:
    """D4M's work for one image: the text encoder is asked for the prompt and the negative prompt, the PNG is saved."""
    make = batch_maker(model, prior, 1, steps)
    encoder: Any = None
    if model.text is not None:
        tokens, width = model.text
        config = CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, max_position_embeddings=tokens,
                                num_attention_heads=max(1, width // 64))  # fmt: skip
        encoder = torch.nn.Module.to(CLIPTextModel(config), prior.device, DTYPES[D4M_DTYPE]).eval()

    @torch.no_grad()
    def work() -> None:
        if encoder is not None:
            encoder(torch.zeros(2, encoder.config.max_position_embeddings, dtype=torch.int64, device=prior.device))
        Image.fromarray(make()[0]).resize((STORED, STORED)).save(folder / "image.png")

    return work


def calls_of(prior: DiffusionPrior, steps: int) -> int:
    """Calls of the denoiser for an image, a guided pair being one; the scheduler's own number."""
    run = prior.check_settings(Sampling(STRENGTH, steps))
    return len(prior.sampler.schedule(run, steps)[1])


@dataclass
class Bench:
    """Where and how long is measured, and what was found."""

    device: str
    least: float
    peaks: dict[str, float]
    shorter: int = 1  # by which numbers of steps are divided

    def row(self, model: Model, prior: DiffusionPrior, work: Callable[[], Any], batch: int, dtype: str,
            steps: int) -> dict[str, Any]:  # fmt: skip
        """Measure `work`, which makes `batch` images."""
        gpu = self.device == "cuda"
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(work, self.device, self.least)
        call, decoding = model.operations
        calls = calls_of(prior, steps)
        tflops = batch * (2 * calls * call + decoding) / seconds / 1e12  # a guided call is one with and one without
        return {
            "batch": batch,
            "calls": calls,
            "images_per_s": batch / seconds,
            "tflops": tflops,
            "peak_tflops": self.peaks[dtype],
            "of_peak": tflops / self.peaks[dtype],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else "not measured",
        }

    def of_model(self, model: Model, dtypes: list[str], forms: list[str]) -> Iterator[dict[str, Any]]:
        """All rows of a model."""
        steps = STEPS // self.shorter
        with tempfile.TemporaryDirectory() as folder:
            prior = model.prior(D4M_DTYPE, self.device)
            loop = self.row(model, prior, d4m_loop(model, prior, steps, Path(folder)), 1, D4M_DTYPE, steps)
        yield {"form": "d4m-loop", "scheduler": "folder", "dtype": D4M_DTYPE, **loop, "ratio_to_d4m": 1.0}
        del prior
        found: list[dict[str, Any]] = []
        for dtype in dtypes:
            for form in forms:
                for row in self._batches(model, dtype, form, "folder", steps, model.batches):
                    found += [row] if "images_per_s" in row else []
                    yield row | _ratio(row, loop)
        best = max(found, key=lambda row: row["images_per_s"])
        for name, whole in SCHEDULES.items():
            steps = whole // self.shorter
            solver = name.partition(",")[0]
            for row in self._batches(model, best["dtype"], best["form"], solver, steps, (best["batch"],)):
                yield row | {"scheduler": name} | _ratio(row, loop)

    def _batches(self, model: Model, dtype: str, form: str, scheduler: str, steps: int,
                 batches: tuple[int, ...]) -> Iterator[dict[str, Any]]:  # fmt: skip
        about = {"form": form, "scheduler": scheduler, "dtype": dtype}
        prior = model.prior(dtype, self.device, scheduler, **FORMS[form])
        for batch in batches:
            try:
                yield about | self.row(model, prior, batch_maker(model, prior, batch, steps), batch, dtype, steps)
            except torch.OutOfMemoryError:
                yield about | {"batch": batch} | {"out_of_memory": True}
                break
        del prior
        torch.compiler.reset()


def _ratio(row: dict[str, Any], loop: dict[str, Any]) -> dict[str, float]:
    return {"ratio_to_d4m": row["images_per_s"] / loop["images_per_s"]} if "images_per_s" in row else {}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dtype", nargs="+", default=["bfloat16", "float16"], choices=sorted(DTYPES))
    arguments.add_argument("--form", nargs="+", default=list(FORMS), choices=list(FORMS))
    arguments.add_argument("--model", nargs="+", default=[m.name for m in models(False)])
    arguments.add_argument("--matrix", type=int, default=8192, help="side of the matrices whose product is the peak")
    arguments.add_argument("--seconds", type=float, default=3.0, help="how long a row is measured, at least")
    arguments.add_argument("--tiny", action="store_true", help="small networks, on the processor too")
    asked = arguments.parse_args()
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    about = {"gpu": torch.cuda.get_device_name() if gpu else "none", "torch": torch.__version__, "tiny": asked.tiny}
    rows: list[dict[str, Any]] = []

    def report(model: Model, row: dict[str, Any]) -> None:
        rows.append({"model": model.name, "size": model.size} | about | row)
        print(*(f"{c}={rows[-1].get(c)}" for c in COLUMNS), flush=True)

    chosen = [m for m in models(asked.tiny) if m.name in asked.model]
    if not gpu and not asked.tiny:
        unmeasured = dict.fromkeys(["batch", *MEASURED], "not measured")
        for model in chosen:
            report(model, {"form": "d4m-loop", "scheduler": "folder", "dtype": D4M_DTYPE} | unmeasured)
            for dtype in asked.dtype:
                for form in asked.form:
                    report(model, {"form": form, "scheduler": "folder", "dtype": dtype} | unmeasured)
        finish(rows, COLUMNS, asked.json)
        return
    torch.backends.cudnn.benchmark = False  # as in an actor
    torch.manual_seed(0)
    dtypes = sorted({D4M_DTYPE, *asked.dtype})
    peaks = {d: matrix_peak(DTYPES[d], device, asked.matrix, asked.seconds) for d in dtypes}
    for model in chosen:
        for row in Bench(device, asked.seconds, peaks, 5 if asked.tiny else 1).of_model(model, asked.dtype, asked.form):
            report(model, row)
    finish(rows, COLUMNS, asked.json)


if __name__ == "__main__":
    main()
