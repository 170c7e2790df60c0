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
from ddoq_ray.models.inspect import check_student

PLAIN = Normalisation((0, 0, 0), (1, 1, 1))
SMALL = [
    "convnet3", "convnet3-w8", "convnet4-w8-batch", "convnet3-w8-group", "resnet18-small", "resnet18-small-w8",
    "resnet18-small-w8-instance", "resnetap10-w8", "resnetap10-w8-group", "resnetap10-w8-batch",
]  # fmt: skip


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
    ("arch", "size", "parameters"),
    [("convnet3", 32, 320_010), ("convnet6", 128, 748_170), ("convnet5-group", 128, 615_690),
     ("resnetap10", 64, 4_903_242),
     ("resnetap10", 128, 4_903_242), ("resnetap10-batch", 224, 4_910_922), ("resnet18-instance", 64, 11_181_642),
     ("resnet20-cifar", 32, 269_722)],
)  # fmt: skip
def test_networks_have_as_many_parameters_as_their_papers_or_hand_say(arch, size, parameters):
    """ConvNet-3 of the condensation benchmark: 320,010 at ten classes. ResNet-18: torchvision's 11,181,642."""
    with torch.device("meta"):
        model = build_classifier(arch, 10, size)
        assert model(torch.empty(2, 3, size, size)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_resnetap_pools_where_a_resnet_strides():
    """A 2x2 checkerboard is what strides alias and pools average; a black and a white one look alike to it."""
    block = build_classifier("resnetap10-w8", 3, 32).trunk.levels[1]
    x = torch.randn(1, 8, 8, 8)
    out = block.conv1(x)
    pooled = torch.nn.functional.avg_pool2d(torch.relu(block.bn1(out)), 2)
    short = block.shortcut[2](torch.nn.functional.avg_pool2d(block.shortcut[0](x), 2))
    torch.testing.assert_close(block(x), torch.relu(block.bn2(block.conv2(pooled)) + short))


NETS = """
import torch
from torch import nn

value = 3

def wide(classes):
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, classes))

def scaled(classes):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = wide(classes)
        def forward(self, x):
            return 2 * self.net(x)
    return Scaled()

def one(classes):
    return wide(1)

def plain(classes):
    return nn.Flatten()

def text(classes):
    return "net"

def broken(classes):
    raise KeyError("weights")

def ended(classes):
    raise SystemExit("two\\nlines")

def strict(classes):
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = wide(classes)
        def forward(self, x):
            assert x.shape[-1] > 16, "too small"
            return self.net(x)
    return Strict()

def normed(classes):
    net = wide(classes)
    net[-1] = nn.utils.parametrizations.spectral_norm(net[-1])
    return net

def helped(classes):
    class Helped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = wide(classes)
        def forward(self, x):
            return (self.net(x), None) if self.training else self.net(x)
    return Helped()
"""


def test_a_network_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(NETS)
    (tmp_path / "spoilt_nets.py").write_text("wide = undefined")
    monkeypatch.syspath_prepend(tmp_path)
    model, again = (build_classifier("own_nets:wide", 4, 16, seed=3) for _ in range(2))
    x = torch.rand(2, 3, 16, 16)
    assert model.training and model.features(x).shape == (2, 20) and model(x).shape == (2, 4)
    assert torch.equal(model(x), again(x)) and model.arch == "own_nets:wide"
    for path, match in [
        ("absent_nets:wide", "cannot import absent_nets.*PYTHONPATH.*working directory"),
        ("own_nets:narrow", "expected MODULE:NAME of a callable"),
        ("own_nets:", "expected MODULE:NAME of a callable"),
        ("own_nets:value", "takes the number of classes, got int"),
        ("own_nets:broken", r"own_nets:broken\(4\) failed: KeyError"),
        ("own_nets:ended", r"own_nets:ended\(4\) failed: SystemExit: two$"),
        ("own_nets:strict", "too small"),
        ("own_nets:normed", r"ParametrizedLinear; expected a plain torch\.nn\.Linear"),
        ("spoilt_nets:wide", "importing spoilt_nets failed: NameError"),
        ("own_nets:text", r"expected a torch\.nn\.Module, got str"),
        ("own_nets:one", r"expected logits \[2, 4\] of two images, got \(2, 1\)"),
        ("own_nets:plain", r"no torch\.nn\.Linear inside"),
        ("own_nets:scaled", "is not its last layer"),
    ]:
        with pytest.raises(ValueError, match=match):
            build_classifier(path, 4, 16)
    with pytest.raises(ValueError, match=r"student\.arch=own_nets:helped does not take images"):
        check_student("own_nets:helped", 16, 4)
    save_classifier(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="names code to import"):
        load_classifier(tmp_path / "saved")


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


@pytest.mark.parametrize(
    "arch",
    [
        "resnet19",
        "convnet3-w",
        "googlenet",
        "squeezenet1_0",
        "convnet3-w0",
        "convnet7",
        "convnet3-layer",
        "convnet3-w6-group",
    ],
)
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
