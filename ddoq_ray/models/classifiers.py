"""Teachers and students: images in [0, 1] to logits, as features and one linear head.

Shape suffixes: B batch, C classes, d features, S image size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ddoq_ray.models.architectures import build_trunk, head_of, is_import_path, torchvision_model, without_head
from ddoq_ray.models.folders import content_digest, first_line, published_folder, read_json, resolve_folder, write_json
from ddoq_ray.models.weights_files import ENDINGS, check_finite, check_not_pointers, fit_names, read_tensors

CONFIG_JSON = "config.json"
WEIGHTS_FILE = "model.safetensors"
TORCHVISION_PREFIX = "torchvision:"


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
        arch: a name of `architectures.ARCHITECTURES`, such as "convnet3-w32", "resnet18-small", "resnet20-cifar"; a
            torchvision classification model such as "resnet18", "swin_t"; or "module:name" of a callable.
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
        trunk, d = build_trunk(arch, num_classes, image_size)
        head = nn.Linear(d, num_classes)
    return Classifier(arch, trunk, head, image_size=image_size, normalisation=normalisation, classes=classes)


def classifier_of(config: Mapping[str, Any]) -> Classifier:
    """The network that `Classifier.config` tells of, freshly initialised: for weights that are loaded next."""
    normalisation = Normalisation(tuple(config["mean"]), tuple(config["std"]))
    classes = config.get("classes")
    return build_classifier(config["arch"], config["num_classes"], config["image_size"], normalisation, classes=classes)


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
    if os.fspath(path).startswith(TORCHVISION_PREFIX):
        return _torchvision_classifier(os.fspath(path).removeprefix(TORCHVISION_PREFIX)).to(device).eval()
    if Path(path).is_file():
        raise ValueError(
            f"classifier: {path} is a file; expected a folder, which `ddoq-ray import-teacher source={path} arch=NAME "
            "image_size=PIXELS out=FOLDER` makes of it"
        )
    folder = resolve_folder(path, "classifier")
    config = read_json(folder / CONFIG_JSON, "classifier")
    _check_config(config, folder / CONFIG_JSON)
    if is_import_path(str(config["arch"])):
        raise ValueError(
            f"classifier: {folder / CONFIG_JSON} names code to import ({config['arch']}), which a folder of weights "
            "must not have run; a teacher is of one of the architectures that are known by name"
        )
    check_not_pointers(folder, "classifier")
    file = weights_file(folder)
    model = classifier_of(config)
    tensors = fit_names(read_tensors(file, "classifier"), model.state_dict(), f"classifier: {file}")
    check_finite(tensors, f"classifier: {file}")
    model.load_state_dict(tensors)  # copies into float32 parameters
    return model.to(device).eval()


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    """Raise a ValueError that names the key where a config.json is not of `Classifier.config`'s kind."""
    absent = [key for key in ("arch", "num_classes", "image_size", "mean", "std") if key not in config]
    if absent:
        raise ValueError(f"classifier: {file} lacks {absent}")

    def expect(key: str, right: bool, what: str) -> None:
        if not right:
            raise ValueError(f"classifier: {file}: expected {key} to be {what}, got {str(config[key])[:80]!r}")

    expect("arch", isinstance(config["arch"], str), "the name of an architecture")
    for key in ("num_classes", "image_size"):
        expect(key, type(config[key]) is int and config[key] >= 1, "a whole number, 1 or more")
    for key in ("mean", "std"):
        values = config[key]
        numbers = isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
        expect(key, numbers, "3 numbers, one a channel")
    if config.get("classes") is not None:
        expect("classes", isinstance(config["classes"], list), "a list of names in the order of the outputs, or null")


def check_answers(model: nn.Module, arch: str, image_size: int) -> None:
    """Whether a network answers an image of its size with finite numbers.

    Raises:
        ValueError: it does not.
    """
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            logits = model(torch.full((1, 3, image_size, image_size), 0.5, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"{arch} does not take images of image_size={image_size} px ({first_line(error)})") from error
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"{arch} answers a grey image with NaN or infinite logits")


def weights_file(folder: Path) -> Path:
    """The one file of weights in a folder; a ValueError where there is none, or several."""
    if (folder / WEIGHTS_FILE).is_file():
        return folder / WEIGHTS_FILE
    others = sorted(p for p in folder.glob("*") if p.suffix in ENDINGS)
    if len(others) != 1:
        found = ", ".join(p.name for p in others) or "none"
        raise ValueError(f"classifier: expected the file {WEIGHTS_FILE} in {folder}, found {found}")
    return others[0]


def _torchvision_classifier(arch: str) -> Classifier:
    import torchvision

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
    head = head_of(source)[1]
    trunk, _ = without_head(source)
    names = weights.meta.get("categories")
    normalisation = Normalisation(tuple(transforms.mean), tuple(transforms.std))
    return Classifier(arch, trunk, head, image_size=size, normalisation=normalisation, classes=names)
