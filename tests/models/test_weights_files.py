"""Files of weights as others leave them: the same network, or one line that says what is wrong with them."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from ddoq_ray.config.importing import ImportTeacherConfig
from ddoq_ray.models.classifiers import Classifier, build_classifier, load_classifier
from ddoq_ray.models.importing import import_classifier
from ddoq_ray.models.inspect import check_teacher

NETWORK = build_classifier("resnet18-small-w4", 3, 16, seed=3)
STATE = {name.removeprefix("trunk."): t for name, t in NETWORK.state_dict().items()}
OTHER = {name: torch.zeros_like(t) for name, t in STATE.items()}


def saved(folder: Path, value: Any, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(NETWORK.config() | config))
    torch.save(value, folder / "model.pth")
    return folder


def is_ours(model: Classifier) -> bool:
    return torch.equal(model.head.weight, NETWORK.head.weight)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"net": s, "acc": 94.1, "epoch": 7},  # kuangliu's CIFAR-10
        lambda s: {"weights": s, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        lambda s: {"model": s, "best": torch.tensor(1.0)},
        lambda s: {"state_dict": OTHER, "state_dict_ema": s},  # timm
        lambda s: {"model": OTHER, "model_ema": s},  # torchvision's references
        lambda s: {"model": {"state_dict": s}},
        lambda s: {f"encoder.{k}": v for k, v in s.items()},
        lambda s: {f"module.student.{k}": v for k, v in s.items()},
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
    ],
)
def test_wrapped_weights_are_found(tmp_path: Path, wrap: Callable[[Mapping[str, Tensor]], Any]) -> None:
    assert is_ours(load_classifier(saved(tmp_path / "t", wrap(STATE))))


@pytest.mark.parametrize(
    "arch",
    [
        "resnet18", "swin_t", "shufflenet_v2_x0_5",
        *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("densenet121", "vgg11", "efficientnet_b0")),
    ],
)  # fmt: skip
def test_torchvisions_own_names(tmp_path: Path, arch: str) -> None:
    network = torchvision.models.get_model(arch, num_classes=3)
    config = build_classifier(arch, 3, 64).config()
    loaded = load_classifier(saved(tmp_path / "t", network.state_dict(), **config))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.eval()((images - loaded.mean) / loaded.std)
        torch.testing.assert_close(loaded(images), expected)


def test_objects_beside_tensors_are_named_and_never_made(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    beside, evil = {"model": STATE, "args": argparse.Namespace(lr=1)}, Evil()
    for value, word in ((beside, "argparse.Namespace"), (NETWORK, "Classifier"), (evil, "never run")):
        folder = saved(tmp_path / "t", {})
        with open(folder / "model.pth", "wb") as f:
            pickle.dump(value, f) if value is evil else torch.save(value, f)
        with pytest.raises(ValueError, match=f"does not read as a file of tensors.*{word}.*state_dict") as error:
            load_classifier(folder)
        assert not any(word in str(error.value) for word in ("\n", "\x1b", "weights_only"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"arch": None},
        {"arch": ["resnet18"]},
        {"num_classes": "3"},
        {"num_classes": 3.0},
        {"image_size": [3, 16, 16]},
        {"image_size": 0},
        {"mean": 0.5},
        {"mean": ["a", "b", "c"]},
        {"std": [1.0, 1.0, float("nan")]},
        {"classes": 3},
        {"classes": {"0": "a", "1": "b", "2": "c"}},
    ],
)
def test_a_config_that_tells_of_no_network(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"config\.json: expected {next(iter(config))} .*got"):
        load_classifier(saved(tmp_path / "t", STATE, **config))


def test_a_file_is_told_from_a_folder(tmp_path: Path) -> None:
    file = saved(tmp_path / "t", STATE) / "model.pth"
    with pytest.raises(ValueError, match=r"model\.pth is a file.*import-teacher"):
        load_classifier(file)


def test_a_size_that_the_teacher_cannot_take(tmp_path: Path) -> None:
    small = build_classifier("vit_b_32", 2, 64)
    with pytest.raises(ValueError, match=r"teacher.*vit_b_32.*64 px.*224"):
        check_teacher(small)
    save_file({k.replace("trunk.", ""): v for k, v in small.state_dict().items()}, tmp_path / "own.safetensors")
    asked = ImportTeacherConfig(source=str(tmp_path / "own.safetensors"), arch="vit_b_32", image_size=64)
    with pytest.raises(ValueError, match=r"image_size=64.*224"):
        import_classifier(asked)


def test_what_is_missing_is_named_whole(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"give arch=\.\.\. image_size=\.\.\."):
        import_classifier(ImportTeacherConfig(source=str(tmp_path / "w.pth")))
