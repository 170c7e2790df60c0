"""The real data and weights that studies read, and the teachers among them as folders that `load_classifier` reads."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file

from ddoq_ray.models.classifiers import build_classifier, save_classifier

ASSETS = Path(os.environ.get("DDOQ_ASSETS", Path(__file__).resolve().parents[2] / "shared/assets"))
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10_data() -> list[str]:
    """The keys of a run that name the CIFAR-10 shards."""
    shards = ASSETS / "cifar10-wds"
    return [
        f"dataset.path={shards}/train-{{000000..000019}}.tar",
        f"dataset.val_path={shards}/test-{{000000..000004}}.tar",
        f"dataset.classes={shards}/classes.json",
    ]


def write_cifar10_teacher(depth: int, out: Path) -> Path:
    """Write the ResNet of 20 or 56 layers, as it was published, as a classifier's folder; a folder there is kept."""
    if not out.exists():
        tensors = load_file(ASSETS / "cifar10-teachers" / f"resnet{depth}.safetensors")
        model = build_classifier(f"resnet{depth}-cifar", 10, 32, classes=list(CIFAR10))
        renamed = {
            name.replace("linear.", "head.") if name.startswith("linear.") else f"trunk.{name}": tensor
            for name, tensor in tensors.items()
        }
        model.load_state_dict(renamed)
        save_classifier(model, out, extra={"origin": "He et al. 2015, section 4.2; BSD"})
    return out
