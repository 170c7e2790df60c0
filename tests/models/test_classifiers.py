"""Classifiers: features + head, normalisation inside, folders that round-trip or say what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from ddoq_ray.data import collections as sources
from ddoq_ray.data.samples import to_square
from ddoq_ray.models.accuracy import top1_top5
from ddoq_ray.models.classifiers import (
    Classifier,
    Normalisation,
    build_classifier,
    load_classifier,
    save_classifier,
)

PLAIN = Normalisation((0, 0, 0), (1, 1, 1))
SMALL = ["convnet3", "convnet3-w8", "resnet18-small", "resnet18-small-w8"]


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("size", [16, 28])
def test_small_architectures(arch, size):
    model = build_classifier(arch, 7, size).eval()
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        features, logits = model.features(x), model(x)
        assert torch.equal(logits, model.head(features))
    assert logits.shape == (2, 7) and features.shape == (2, model.head.in_features)
    assert (model.num_classes, model.image_size, model.arch) == (7, size, arch)


@pytest.mark.parametrize(
    "arch",
    ["resnet18", "mobilenet_v2", "efficientnet_b0", "swin_t", "shufflenet_v2_x0_5", "convnext_tiny",
     "densenet121", "vit_b_16", "vgg11"],
)  # fmt: skip
def test_torchvision_architectures_build(arch):
    with torch.device("meta"):  # shapes only: the arithmetic of these networks is torchvision's
        model = build_classifier(arch, 5, 224).eval()
        x = torch.empty(1, 3, 224, 224)
        assert model.features(x).shape == (1, model.head.in_features) and model(x).shape == (1, 5)


def test_torchvision_trunk_is_the_network_without_its_head():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = torchvision.models.resnet18(weights=None).eval()
    model = build_classifier("resnet18", 1000, 64).eval()
    model.trunk.load_state_dict({k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")})
    model.head.load_state_dict(reference.fc.state_dict())
    x = torch.rand(2, 3, 64, 64)
    normalise = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(normalise(x)))


def test_small_resnet18_is_torchvisions_with_another_stem():
    reference = torchvision.models.resnet18(weights=None, num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    model = build_classifier("resnet18-small", 10, 32).eval()
    state = {**model.trunk.state_dict(), **{f"fc.{k}": v for k, v in model.head.state_dict().items()}}
    reference.load_state_dict(state)
    x = torch.rand(2, 3, 32, 32)
    plain = Classifier("resnet18-small", model.trunk, model.head, image_size=32, normalisation=PLAIN)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), reference.eval()(x))


def test_normalisation_is_inside():
    x = torch.rand(2, 3, 16, 16)
    plain = build_classifier("convnet3-w8", 3, 16, PLAIN, seed=4)
    inside = build_classifier("convnet3-w8", 3, 16, Normalisation((0.1, 0.2, 0.3), (0.5, 0.25, 0.125)), seed=4)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
    torch.testing.assert_close(inside(x), plain((x - mean) / std))
    assert not any(key == "mean" or key == "std" for key in inside.state_dict())


def test_seeds_decide_the_weights_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    a, b, c = (build_classifier("resnet18-small-w8", 4, 16, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert a.id == b.id != c.id
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.head.weight, c.head.weight)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip(tmp_path, dtype):
    normalisation = Normalisation((0.3,) * 3, (0.2,) * 3)
    model = build_classifier("resnet18-small-w8", 3, 16, normalisation, seed=1, classes=["a", "b", "c"])
    model.train()(torch.rand(8, 3, 16, 16))  # running statistics unlike the initial ones
    save_classifier(model, tmp_path / "t", extra={"training": {"epochs": 3}}, dtype=dtype)
    back = load_classifier(tmp_path / "t")
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(back(x), model.eval()(x), atol=0 if dtype == "float32" else 2e-2, rtol=0)
    assert not back.training and back.classes == ["a", "b", "c"] and next(back.parameters()).dtype == torch.float32
    assert json.loads((tmp_path / "t/config.json").read_text())["training"] == {"epochs": 3}
    assert (back.id == model.id) == (dtype == "float32")
    assert [p.name for p in tmp_path.iterdir()] == ["t"]  # nothing temporary is left


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path):
    model = build_classifier("convnet3-w8", 3, 16, seed=1)
    save_classifier(model, tmp_path / "t")
    with pytest.raises(ValueError, match="exists already"):
        save_classifier(model, tmp_path / "t")
    other = build_classifier("convnet3-w8", 3, 16, seed=2)
    save_classifier(other, tmp_path / "t", overwrite=True)
    assert load_classifier(tmp_path / "t").id == other.id
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no existing folder"):
        load_classifier(tmp_path / "absent")
    folder = tmp_path / "t"
    save_classifier(build_classifier("convnet3-w8", 3, 16), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_classes": 4}))
    with pytest.raises(ValueError, match="does not fit"):
        load_classifier(folder)
    (folder / "config.json").write_text(json.dumps({**config, "classes": ["a"]}))
    with pytest.raises(ValueError, match="1 class names for 3"):
        load_classifier(folder)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "head.bias"}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"head\.bias"):
        load_classifier(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="does not read as a file of tensors"):
        load_classifier(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="expected the file model"):
        load_classifier(folder)
    del config["std"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="std"):
        load_classifier(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_classifier(folder)


@pytest.mark.parametrize("arch", ["resnet19", "convnet3-w", "googlenet", "squeezenet1_0", "convnet3-w0"])
def test_unknown_architectures_are_refused(arch):
    with pytest.raises(ValueError, match="classifier"):
        build_classifier(arch, 10, 32)


def test_images_and_statistics_that_do_not_fit_are_refused():
    for match, make in [
        ("at least 8 px", lambda: build_classifier("convnet3", 10, 4)),
        ("num_classes", lambda: build_classifier("convnet3", 0, 16)),
        ("3 means", lambda: Normalisation((0.5,), (0.5,))),
        ("3 means", lambda: Normalisation((0.5,) * 3, (0.5, 0.5, 0.0))),
    ]:
        with pytest.raises(ValueError, match=match):
            make()


def test_torchvisions_own_weights(monkeypatch):
    """They would be downloaded; here they are random."""
    state = torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict()
    enum = torchvision.models.get_model_weights("shufflenet_v2_x0_5")
    monkeypatch.setattr(enum, "get_state_dict", lambda self, *args, **kwargs: state)
    model = load_classifier("torchvision:shufflenet_v2_x0_5")
    assert (model.num_classes, model.image_size, len(model.classes)) == (1000, 224, 1000)
    assert torch.equal(model.head.weight, state["fc.weight"])
    with pytest.raises(ValueError, match="unknown architecture"):
        load_classifier("torchvision:absent")


def test_the_shipped_digits_teacher():
    digits, ids = sources.digits()["selection"]
    images = np.stack([to_square(Image.fromarray(d).convert("RGB"), 16) for d in digits]).transpose(0, 3, 1, 2)
    top1, _ = top1_top5(load_classifier("shipped:digits-teacher"), torch.from_numpy(images), torch.from_numpy(ids))
    assert top1 >= 99.0
