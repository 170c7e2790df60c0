"""What a prior under training makes so far: a picture of samples now and then, and a page that shows them.

Shape suffixes: n images, S image size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ddoq_ray.models.fidelity import generate
from ddoq_ray.models.priors.base import Prior, Sampling
from ddoq_ray.models.priors.class_conditional import ClassConditionalPrior
from ddoq_ray.models.priors.loading import Loading
from ddoq_ray.storage.records import ClassInfo

ACROSS, ROWS, STEPS = 8, 10, 25


def grid(prior: Prior, classes: Sequence[str]) -> npt.NDArray[np.uint8]:
    """uint8 [rows S, 8 S, 3]: eight samples of each of the first ten classes, a row a class; always of one noise."""
    shown = [ClassInfo(c, name, name, c, c) for c, name in enumerate(classes[:ROWS])]
    how = Sampling(1.0, STEPS, "noise", prior.guidance_of(None))
    made = generate(prior, [info for info in shown for _ in range(ACROSS)], how, seed=0)
    size = made.shape[-1]
    tiles = made.reshape(len(shown), ACROSS, 3, size, size).transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(tiles.reshape(len(shown) * size, ACROSS * size, 3))


def draw(folder: Path, networks: tuple[Any, Any, Any], classes: Sequence[str], step: int) -> None:
    """Add a picture of samples to a folder, and to the page in it.

    Args:
        folder: `samples-<step>.png` and `samples.html` go there.
        networks: autoencoder, denoiser and scheduler as they are; copied, since a prior freezes what it takes.
        classes: names in label order.
        step: how far the training is.
    """
    vae, denoiser, scheduler = (copy.deepcopy(part) for part in networks)
    device = next(denoiser.parameters()).device
    prior = ClassConditionalPrior(vae, denoiser, scheduler, classes=list(classes), how=Loading(device=device))
    Image.fromarray(grid(prior, classes)).save(folder / f"samples-{step:07d}.png")
    shown = "".join(
        f'<figure><img src="{p.name}" style="image-rendering: pixelated; width: 24rem" alt="samples">'
        f"<figcaption>step {int(p.stem.rpartition('-')[2]):,}</figcaption></figure>"
        for p in sorted(folder.glob("samples-*.png"), reverse=True)
    )
    rows = ", ".join(classes[:ROWS])
    (folder / "samples.html").write_text(
        f"<!doctype html><meta charset=utf-8><title>samples</title><p>A row a class: {rows}</p>{shown}\n"
    )
