"""The table of classifiers' architectures: a row a family, found by its name; each makes a trunk without its head.

torchvision is imported by the networks that are made of it: to import it takes as long as torch itself, and a worker
of a small run is started for less work than that.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddoq_ray.models.cifar_resnet import WIDTHS, CifarResNet
from ddoq_ray.models.folders import first_line
from ddoq_ray.models.small_networks import NORMS, ConvNet, ResNetAP10, SmallResNet18, norm_of

# torchvision families whose last linear layer is the head and whose output is one tensor.
_FAMILIES = (
    "alexnet", "convnext", "densenet", "efficientnet", "maxvit", "mnasnet", "mobilenet", "regnet", "resnet",
    "resnext", "shufflenet", "swin", "vgg", "vit", "wide_resnet",
)  # fmt: skip
_SUFFIXES = rf"(?:-w(?P<width>\d+))?(?:-(?P<norm>{'|'.join(NORMS)}))?"

Trunk = tuple[nn.Module, int]  # a network from pixels to features, and how many of these there are


@dataclass(frozen=True)
class Architecture:
    """A family of networks.

    Attributes:
        form: How a name is written, for people.
        pattern: Of the name; its groups `width` and `norm`, where it has them, are the network's.
        least: Smallest side of an image, in pixels.
        make: (match, image size) to the trunk.
    """

    form: str
    pattern: str
    least: int
    make: Callable[[re.Match[str], int], Trunk]


def _width(name: re.Match[str], usual: int) -> int:
    width = int(name["width"] or usual)
    if width < 1 or (name["norm"] == "group" and width % 4):
        raise ValueError(f"classifier: a width must be positive, and a multiple of 4 for group norm, got {name[0]!r}")
    return width


def _convnet(name: re.Match[str], size: int) -> Trunk:
    depth, width = int(name["depth"]), _width(name, 128)
    if size < 2**depth:
        raise ValueError(f"classifier: {name[0]} needs images of at least {2**depth} px, got {size}")
    return ConvNet(depth, width, name["norm"] or "instance"), width * (size // 2**depth) ** 2


def _small_resnet18(name: re.Match[str], size: int) -> Trunk:
    width = _width(name, 64)
    return SmallResNet18(width, name["norm"] or "batch"), 8 * width


def _resnetap10(name: re.Match[str], size: int) -> Trunk:
    width = _width(name, 64)
    return ResNetAP10(size, width, name["norm"] or "instance"), 8 * width


def _resnet_norm(name: re.Match[str], size: int) -> Trunk:
    import torchvision

    norm = functools.partial(norm_of, name["norm"])
    return without_head(torchvision.models.get_model(name["net"], weights=None, norm_layer=norm))


def _cifar_resnet(name: re.Match[str], size: int) -> Trunk:
    return CifarResNet(int(name["depth"])), WIDTHS[-1]


ARCHITECTURES = (
    Architecture("convnet3..6[-w<width>][-<norm>]", rf"convnet(?P<depth>[3-6]){_SUFFIXES}", 8, _convnet),
    Architecture("resnet18-small[-w<width>][-<norm>]", rf"resnet18-small{_SUFFIXES}", 8, _small_resnet18),
    Architecture("resnetap10[-w<width>][-<norm>]", rf"resnetap10{_SUFFIXES}", 16, _resnetap10),
    Architecture("resnet18|34|50|101-instance|group", r"(?P<net>resnet(?:18|34|50|101))-(?P<norm>instance|group)", 32,
                 _resnet_norm),
    Architecture("resnet<depth>-cifar", r"resnet(?P<depth>\d+)-cifar", 4, _cifar_resnet),
)  # fmt: skip


def build_trunk(arch: str, num_classes: int, image_size: int) -> Trunk:
    """A freshly initialised trunk of an architecture by name, or by the import path of a callable (`module:name`).

    Raises:
        ValueError: There is none of that name, it does not fit the images, or what the path gives is no such network.
    """
    if is_import_path(arch):
        return _imported(arch, num_classes, image_size)
    for row in ARCHITECTURES:
        name = re.fullmatch(row.pattern, arch)
        if name is not None:
            if image_size < row.least:
                raise ValueError(f"classifier: {arch} needs images of at least {row.least} px, got {image_size}")
            return row.make(name, image_size)
    return without_head(torchvision_model(arch))


def torchvision_model(arch: str, weights: Any = None) -> nn.Module:
    """The torchvision model `arch`; a ValueError when it is unknown or has no single linear head."""
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known or not arch.startswith(_FAMILIES):
        families = [name for name in known if name.startswith(_FAMILIES)]
        raise ValueError(
            f"classifier: unknown architecture {arch!r}; expected {', '.join(a.form for a in ARCHITECTURES)} "
            f"(<norm>: {', '.join(NORMS)}), one of torchvision's {families}, or the import path of a callable that "
            "takes the number of classes, such as mypackage.nets:wide"
        )
    return torchvision.models.get_model(arch, weights=weights)


def head_of(model: nn.Module) -> tuple[str, nn.Linear]:
    """The name and the layer of a network's last linear layer.

    Raises:
        ValueError: it has none.
    """
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear or not linear[-1][0]:
        raise ValueError("classifier: the network has no torch.nn.Linear inside, which its head must be")
    return linear[-1]


def without_head(model: nn.Module) -> Trunk:
    """Cut the last linear layer off: the model then returns the features."""
    name, head = head_of(model)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())
    return model, head.in_features


def is_import_path(arch: str) -> bool:
    """Whether an architecture is code of the user's own.

    >>> is_import_path("mypackage.nets:wide"), is_import_path("resnet18")
    (True, False)
    """
    return ":" in arch


def _imported(path: str, num_classes: int, image_size: int) -> Trunk:
    """The trunk of the network that the callable at `module:name` gives for a number of classes."""
    module, _, name = path.partition(":")
    where = f"classifier: {path}"
    try:
        made: Any = importlib.import_module(module)
        for part in name.split("."):
            made = getattr(made, part)
    except ImportError as error:
        raise ValueError(
            f"{where}: cannot import {module} ({error}); put it on PYTHONPATH, and for a cluster into the job's "
            "working directory"
        ) from error
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{where}: expected MODULE:NAME of a callable, and found none there ({error})") from error
    except (Exception, SystemExit) as error:  # what the user's own file does when it is run
        raise ValueError(f"{where}: importing {module} failed: {type(error).__name__}: {first_line(error)}") from error
    if not callable(made):
        raise ValueError(f"{where}: expected a callable that takes the number of classes, got {type(made).__name__}")
    try:
        network = made(num_classes)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise ValueError(f"{where}({num_classes}) failed: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{where}({num_classes}): expected a torch.nn.Module, got {type(network).__name__}")
    return _checked(where, network, num_classes, image_size)


def _checked(where: str, network: nn.Module, num_classes: int, image_size: int) -> Trunk:
    """The trunk, where the network is exactly its last linear layer after it."""
    images = torch.linspace(0, 1, 2 * 3 * image_size**2).view(2, 3, image_size, image_size)
    try:
        head = head_of(network)[1]
        with torch.no_grad():
            logits: Tensor = network.eval()(images)
            trunk, features = without_head(network)
            again = head(trunk(images))
    except Exception as error:  # the user's own code again
        raise ValueError(
            f"{where}: it does not take images [B, 3, {image_size}, {image_size}] to logits by a last torch.nn.Linear "
            f"({first_line(error)})"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes) or head.out_features != num_classes:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{where}: expected logits [2, {num_classes}] of two images, got {got}")
    if type(head) is not nn.Linear:
        raise ValueError(
            f"{where}: its last layer is a {type(head).__name__}; expected a plain torch.nn.Linear, which is made anew "
            "for the run's classes"
        )
    if again.shape != logits.shape or not torch.allclose(again, logits, atol=1e-4, rtol=1e-4, equal_nan=True):
        raise ValueError(f"{where}: its last torch.nn.Linear is not its last layer, which a classifier's head must be")
    return trunk.train(), features
