"""Teachers and students: images in [0, 1] to logits, as features and one linear head.

Shape suffixes: B batch, C classes, d features, S image size.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from ddoq_ray.models.cifar_resnet import WIDTHS, CifarResNet
from ddoq_ray.models.folders import content_digest, published_folder, read_json, resolve_folder, write_json
from ddoq_ray.models.weights_files import ENDINGS, check_finite, check_not_pointers, fit_names, read_tensors

CONFIG_JSON = "config.json"
WEIGHTS_FILE = "model.safetensors"
_TORCHVISION_PREFIX = "torchvision:"
_SMALL = re.compile(r"(convnet3|resnet18-small)(?:-w(\d+))?")
_CIFAR = re.compile(r"resnet(\d+)-cifar")
# torchvision families whose last linear layer is the head and whose output is one tensor.
_FAMILIES = (
    "alexnet", "convnext", "densenet", "efficientnet", "maxvit", "mnasnet", "mobilenet", "regnet", "resnet",
    "resnext", "shufflenet", "swin", "vgg", "vit", "wide_resnet",
)  # fmt: skip


@dataclass(frozen=True)
class Normalisation:
    """What a network subtracts from pixels in [0, 1], and divides by, a channel each.

    Raises:
        ValueError: not three of each, or a deviation that is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        mean, std = self.mean, self.std
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"classifier: expected 3 means and 3 positive standard deviations, got {mean}, {std}")


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Classifier(nn.Module):
    """A trunk, a linear head, and the normalisation inside, so that callers only know pixels in [0, 1].

    Attributes:
        arch: the name `build_classifier` understands.
        num_classes, image_size: C and S.
        classes: names in label order, or None.
        head: nn.Linear, d to C.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        arch: str,
        trunk: nn.Module,
        head: nn.Linear,
        *,
        image_size: int,
        normalisation: Normalisation,
        classes: Sequence[str] | None = None,
    ) -> None:
        """Join the parts; see `build_classifier`."""
        super().__init__()
        if classes is not None and len(classes) != head.out_features:
            raise ValueError(f"classifier: {len(classes)} class names for {head.out_features} outputs")
        self.arch = arch
        self.image_size = image_size
        self.num_classes = head.out_features
        self.classes = None if classes is None else list(classes)
        self.trunk = trunk
        self.head = head
        # Not in the state dict: the folder's config.json is where they are written and read.
        for name, values in (("mean", normalisation.mean), ("std", normalisation.std)):
            by_channel = torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(name, by_channel, persistent=False)

    def features(self, x: Tensor) -> Tensor:
        """Map float [B, 3, S, S] in [0, 1] to the head's inputs [B, d]."""
        return self.trunk((x - self.mean) / self.std)

    def forward(self, x: Tensor) -> Tensor:
        """Map float [B, 3, S, S] in [0, 1] to logits [B, C]; equals head(features(x))."""
        return self.head(self.features(x))

    @property
    def id(self) -> str:
        """Content digest of configuration and weights: equal for equal teachers, wherever they lie."""
        return content_digest(self.config(), self.state_dict())

    def config(self) -> dict[str, Any]:
        """What `classifier_of` needs to make this network again, without its weights."""
        return {
            "arch": self.arch,
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            "mean": [round(float(v), 7) for v in self.mean.flatten()],
            "std": [round(float(v), 7) for v in self.std.flatten()],
            "classes": self.classes,
        }


class _ConvNet3(nn.Module):
    """ConvNet-3 of the dataset-condensation benchmark: three of conv 3x3, instance norm, ReLU, average pool.

    Source: Zhao et al., Dataset Condensation with Gradient Matching (VICO-UoE/DatasetCondensation).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for i in range(3):
            blocks += [
                nn.Conv2d(3 if i == 0 else width, width, 3, padding=1),
                # One group a channel is instance norm with a learned scale and offset.
                nn.GroupNorm(width, width),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).flatten(1)


class _SmallResNet18(nn.Module):
    """ResNet-18 for small images: 3x3 stem of stride 1, no max-pool; parameter names as torchvision's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        planes = width
        for i in range(4):
            out, stride = width * 2**i, 1 if i == 0 else 2
            shortcut = None
            if stride != 1:
                shortcut = nn.Sequential(nn.Conv2d(planes, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            self.add_module(
                f"layer{i + 1}",
                nn.Sequential(BasicBlock(planes, out, stride, shortcut), BasicBlock(out, out)),
            )
            planes = out
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for i in range(4):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return x.mean(dim=(2, 3))


def build_classifier(
    arch: str,
    num_classes: int,
    image_size: int,
    normalisation: Normalisation = IMAGENET,
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> Classifier:
    """A freshly initialised classifier; the same weights for the same seed, the global generators untouched.

    Args:
        arch: "convnet3" (width 128) or "convnet3-w<width>"; "resnet18-small" (width 64) or
            "resnet18-small-w<width>"; "resnet<depth>-cifar" (depth 20, 32, 44, 56, 110); or a
            torchvision classification model such as "resnet18", "swin_t".
        num_classes: C.
        image_size: S.
        normalisation: of the pixels.
        seed: of the initialisation.
        classes: names in label order.

    Raises:
        ValueError: unknown architecture, or an image too small for it.
    """
    if num_classes < 1:
        raise ValueError(f"classifier: num_classes must be positive, got {num_classes}")
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        trunk, d = _build_trunk(arch, image_size)
        head = nn.Linear(d, num_classes)
    return Classifier(arch, trunk, head, image_size=image_size, normalisation=normalisation, classes=classes)


def classifier_of(config: Mapping[str, Any]) -> Classifier:
    """The network that `Classifier.config` tells of, freshly initialised: for weights that are loaded next."""
    normalisation = Normalisation(tuple(config["mean"]), tuple(config["std"]))
    classes = config.get("classes")
    return build_classifier(config["arch"], config["num_classes"], config["image_size"], normalisation, classes=classes)


def _build_trunk(arch: str, image_size: int) -> tuple[nn.Module, int]:
    small, cifar = _SMALL.fullmatch(arch), _CIFAR.fullmatch(arch)
    if cifar is not None:
        return CifarResNet(int(cifar.group(1))), WIDTHS[-1]
    if small is None:
        return _torchvision_trunk(torchvision_model(arch))
    name, width = small.group(1), small.group(2)
    if image_size < 8:
        raise ValueError(f"classifier: {arch} needs images of at least 8 px, got {image_size}")
    if width is not None and int(width) < 1:
        raise ValueError(f"classifier: a width must be positive, got {arch!r}")
    if name == "convnet3":
        w = int(width or 128)
        return _ConvNet3(w), w * (image_size // 8) ** 2
    w = int(width or 64)
    return _SmallResNet18(w), 8 * w


def torchvision_model(arch: str, weights: Any = None) -> nn.Module:
    """The torchvision model `arch`; a ValueError when it is unknown or has no single linear head."""
    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known or not arch.startswith(_FAMILIES):
        families = [name for name in known if name.startswith(_FAMILIES)]
        raise ValueError(
            f"classifier: unknown architecture {arch!r}; expected convnet3[-w<width>], "
            f"resnet18-small[-w<width>], resnet<depth>-cifar or one of torchvision's {families}"
        )
    return torchvision.models.get_model(arch, weights=weights)


def _torchvision_trunk(model: nn.Module) -> tuple[nn.Module, int]:
    """Cut the last linear layer off: the model then returns the features."""
    name, head = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())
    return model, head.in_features


def save_classifier(
    model: Classifier,
    out: str | os.PathLike[str],
    *,
    extra: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Publish config.json and model.safetensors as the folder `out`, whole or not at all.

    Args:
        model: to save.
        out: must not exist, unless `overwrite`.
        extra: how the model was made; kept in config.json beside the architecture.
        dtype: "float32" or "float16" for the stored tensors; they are float32 once loaded.
        overwrite: replace an existing folder.
    """
    kinds = {"float32": torch.float32, "float16": torch.float16}
    if dtype not in kinds:
        raise ValueError(f"classifier: expected a dtype of {sorted(kinds)}, got {dtype!r}")
    tensors = {
        name: (t.to(kinds[dtype]) if t.is_floating_point() else t).detach().cpu().contiguous()
        for name, t in model.state_dict().items()
    }
    with published_folder(out, overwrite=overwrite) as work:
        save_file(tensors, work / WEIGHTS_FILE)
        write_json(work / CONFIG_JSON, {**model.config(), **(extra or {})})


def load_classifier(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Classifier:
    """Load a classifier in eval mode, float32.

    Args:
        path: a folder that `save_classifier` wrote, `shipped:<name>`, a Hugging Face id of such a folder, or
            `torchvision:<arch>` for torchvision's own ImageNet-1K weights (downloaded by torchvision).
        device: where it runs.

    Raises:
        ValueError: the folder is missing or incomplete, or its weights do not fit its config.
    """
    if os.fspath(path).startswith(_TORCHVISION_PREFIX):
        return _torchvision_classifier(os.fspath(path).removeprefix(_TORCHVISION_PREFIX)).to(device).eval()
    folder = resolve_folder(path, "classifier")
    config = read_json(folder / CONFIG_JSON, "classifier")
    absent = [key for key in ("arch", "num_classes", "image_size", "mean", "std") if key not in config]
    if absent:
        raise ValueError(f"classifier: {folder / CONFIG_JSON} lacks {absent}")
    check_not_pointers(folder, "classifier")
    file = _weights_file(folder)
    model = classifier_of(config)
    tensors = fit_names(read_tensors(file, "classifier"), model.state_dict(), f"classifier: {file}")
    check_finite(tensors, f"classifier: {file}")
    model.load_state_dict(tensors)  # copies into float32 parameters
    return model.to(device).eval()


def _weights_file(folder: Path) -> Path:
    if (folder / WEIGHTS_FILE).is_file():
        return folder / WEIGHTS_FILE
    others = sorted(p for p in folder.glob("*") if p.suffix in ENDINGS)
    if len(others) != 1:
        found = ", ".join(p.name for p in others) or "none"
        raise ValueError(f"classifier: expected the file {WEIGHTS_FILE} in {folder}, found {found}")
    return others[0]


def _torchvision_classifier(arch: str) -> Classifier:
    torchvision_model(arch)  # the message about unknown names, before torchvision's own
    weights = torchvision.models.get_model_weights(arch)["DEFAULT"]
    try:
        source = torchvision_model(arch, weights)
    except OSError as error:
        raise ValueError(
            f"classifier: torchvision:{arch}: its weights are not on this machine and could not be downloaded "
            f"({error}); put {weights.url.rpartition('/')[2]} into torch's hub cache "
            f"({torch.hub.get_dir()}/checkpoints) where there is no network, or give a folder of save_classifier"
        ) from error
    transforms = weights.transforms()
    crop = transforms.crop_size
    size = crop[0] if isinstance(crop, Sequence) else int(crop)
    head = [m for m in source.modules() if isinstance(m, nn.Linear)][-1]
    trunk, _ = _torchvision_trunk(source)
    names = weights.meta.get("categories")
    normalisation = Normalisation(tuple(transforms.mean), tuple(transforms.std))
    return Classifier(arch, trunk, head, image_size=size, normalisation=normalisation, classes=names)
