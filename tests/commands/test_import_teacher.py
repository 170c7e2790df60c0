"""Weights that others trained become a teacher: the same network, or a refusal that names what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from ddoq_ray.cli import main
from ddoq_ray.models.cifar_resnet import CifarResNet
from ddoq_ray.models.classifiers import load_classifier

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def normalised(mean: float, std: float) -> torch.Tensor:
    return (X - mean) / std


def test_a_cifar_resnet_with_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As published: `linear` is its head, and `module.` is what DataParallel put before each name."""
    net = torch.nn.Sequential(CifarResNet(20), torch.nn.Linear(64, 3)).eval()
    names = {f"module.{k.removeprefix('0.')}" if k.startswith("0.") else f"module.linear.{k[2:]}": v
             for k, v in net.state_dict().items()}  # fmt: skip
    torch.save({"state_dict": names}, tmp_path / "net.th.pth")
    (tmp_path / "classes.json").write_text(json.dumps(["cat", "dog", "eel"]))
    words = ["import-teacher", f"source={tmp_path / 'net.th.pth'}", "arch=resnet20-cifar", "image_size=32",
             "mean=0.5,0.5,0.5", "std=0.25,0.25,0.25", f"out={tmp_path / 't'}",
             f"classes={tmp_path / 'classes.json'}"]  # fmt: skip
    assert main(words) == 0 and "resnet20-cifar of 3 outputs at 32 px" in capsys.readouterr().err
    teacher = load_classifier(tmp_path / "t")
    assert teacher.classes == ["cat", "dog", "eel"]
    with torch.no_grad():
        torch.testing.assert_close(teacher(X), net(normalised(0.5, 0.25)))
    assert main(words) == 2 and "exists already" in capsys.readouterr().err
    for changed, said in [
        (["arch=resnet56-cifar"], "tensors lacking"),
        (["arch=resnet20-cifar", "mean=1,2,3"], "mean and std belong together"),
        ([f"source={tmp_path}/none.pth"], "none.pth"),
        (["arch=own_nets:wide"], "known by name"),
        (["match=order", "arch=resnet56-cifar"], "it holds"),
    ]:
        kept = [w for w in words if w.partition("=")[0] not in {c.partition("=")[0] for c in changed} | {"std"}]
        more = [] if "mean and" in said else ["std=0.25,0.25,0.25"]
        assert main([*kept, *changed, *more, f"out={tmp_path / 'u'}"]) == 2
        assert said in capsys.readouterr().err
    assert main(["import-teacher"]) == 2 and "source= is missing" in capsys.readouterr().err


def test_a_folder_as_timm_leaves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.shufflenet_v2_x0_5(num_classes=4).eval()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "shufflenet_v2_x0_5", "num_classes": 4,
              "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 32, 32]}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["import-teacher", f"source={tmp_path}", f"out={tmp_path / 't'}"]) == 0
    teacher = load_classifier(tmp_path / "t")
    assert (teacher.image_size, teacher.num_classes, teacher.classes) == (32, 4, None)
    with torch.no_grad():
        torch.testing.assert_close(teacher(X), net(normalised(0.5, 0.5)))


def test_other_names_in_the_same_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As timm names torchvision's EfficientNet: the layers are the same ones, one after another."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.resnet18(num_classes=4).eval()
    renamed = {
        f"layer_{i}.{name.rpartition('.')[2]}": tensor for i, (name, tensor) in enumerate(net.state_dict().items())
    }
    torch.save(renamed, tmp_path / "net.pt")
    words = ["import-teacher", f"source={tmp_path / 'net.pt'}", "arch=resnet18", f"out={tmp_path / 't'}"]
    assert main([*words, "match=order"]) == 2 and "give image_size=" in capsys.readouterr().err
    assert main([*words, "image_size=32"]) == 2 and "does not fit" in capsys.readouterr().err
    assert main([*words, "image_size=32", "match=order", "mean=0,0,0", "std=1,1,1"]) == 0
    with torch.no_grad():
        torch.testing.assert_close(load_classifier(tmp_path / "t")(X), net(X))
    assert main([*words, "image_size=32", "match=order", "arch=resnet34", f"out={tmp_path / 'u'}"]) == 2
    assert "it holds 122 tensors, and the network" in capsys.readouterr().err
