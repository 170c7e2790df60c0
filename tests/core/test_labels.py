"""Oracles: torch's own fp16, hand-computed bytes, and the bounds that the codecs promise."""

import subprocess
import sys
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from ddoq_ray.config.training import LabelsConfig
from ddoq_ray.core.label_cost import relative_kl
from ddoq_ray.core.labels import CODECS, FeaturesCodec, LogitsCodec, choose_codec, codec_sizes, make_codec


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(features, classes):
    """A head whose values do not depend on the process: torch seeds its own generator anew in each."""
    head = torch.nn.Linear(features, classes)
    with torch.no_grad():
        head.weight.copy_(randn(classes, features) * 0.2)
        head.bias.copy_(randn(classes, seed=2))
    return head


def test_sizes_of_the_design():
    def size(name, classes):
        return make_codec(name, classes, 512).nbytes

    assert size("logits", 1000) / size("features", 1000) == pytest.approx(3.9, abs=0.1)
    assert size("logits", 10450) / size("features", 10450) > 40
    assert choose_codec(1000, 512) == "features"
    assert choose_codec(1000, 2048) == "logits"
    assert choose_codec(10, 512) == "logits"
    assert choose_codec(100000, None) == "logits"
    assert choose_codec(100, 196) == "logits"  # equal sizes
    assert choose_codec(100, 195) == "features"


def test_a_budget_takes_the_most_exact_codec_that_fits():
    sizes = codec_sizes(1000, 2048)
    assert sizes == {"logits": 2000, "features": 2052, "logits_int8": 1004}
    assert [choose_codec(1000, 2048, most) for most in (2052, 2000, 1999.9, 1004)] == ["logits"] * 2 + [
        "logits_int8"
    ] * 2
    assert choose_codec(1000, 512, 2000) == "logits" and choose_codec(1000, 512, 1999) == "features"
    assert choose_codec(1000, None, 1999) == "logits_int8" and choose_codec(10, 4, 13) == "features"
    with pytest.raises(ValueError, match="at least 516 bytes"):
        choose_codec(1000, 512, 515)


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_what_codecs_cost_is_torchs_kl(temperature):
    head, features = linear(64, 30), randn(40, 64, seed=1).relu()
    logits = head(features).detach()
    costs = []
    for name in ("logits", "features", "logits_int8"):
        codec = make_codec(name, 30, 64)
        decoded = codec.decode(codec.encode(features if codec.packs_features else logits), head)
        kl, relative = relative_kl(logits, decoded, temperature)
        told, found = (x.double().div(temperature).log_softmax(1) for x in (logits, decoded))
        assert kl == pytest.approx(
            float(torch.nn.functional.kl_div(found, told, reduction="batchmean", log_target=True))
        )
        assert relative == pytest.approx(kl / relative_kl(logits, torch.zeros_like(logits), temperature)[0])
        costs.append(relative)
    assert 0 <= costs[0] < costs[1] < costs[2] < 1e-4


def test_logits_are_fp16():
    logits = randn(7, 13) * 20
    codec = LogitsCodec(13)
    packed = codec.encode(logits)
    assert packed.dtype == np.uint8 and packed.shape == (7, codec.nbytes) == (7, 26)
    assert torch.equal(codec.decode(packed), logits.half().float())
    assert torch.equal(codec.decode(torch.from_numpy(packed)), logits.half().float())
    assert codec.encode(torch.tensor([[1.0] + [0.0] * 12]))[0, :2].tolist() == [
        0x00,
        0x3C,
    ]  # fp16 1.0, little endian


def test_labels_survive_storage():
    for codec, values in ((LogitsCodec(10), randn(4, 10)), (FeaturesCodec(10, 32), randn(4, 32))):
        packed = codec.encode(values)
        stored = np.frombuffer(packed.tobytes(), dtype=np.uint8).reshape(4, codec.nbytes)  # read-only
        assert torch.equal(codec.decode(stored, torch.nn.Linear(32, 10)).isfinite(), torch.ones(4, 10, dtype=bool))
        np.testing.assert_array_equal(codec.encode(values[2:3])[0], packed[2])


def test_features_by_hand():
    codec = FeaturesCodec(2, 4)
    packed = codec.encode(torch.tensor([[0.0, 127.5, 63.75, 1.0]]))
    # offset 0, scale 0.5 (fp16 0x3800); 63.75 / 0.5 = 127.5 rounds to even
    assert packed[0].tolist() == [0x00, 0x38, 0x00, 0x00, 0, 255, 128, 2]
    assert codec.features(packed).tolist() == [[0.0, 127.5, 64.0, 1.0]]


@pytest.mark.parametrize("make", ["relu", "signed", "tiny", "large", "shifted"])
def test_features_are_within_half_a_step(make):
    x = randn(200, 64)
    x = {"relu": x.relu(), "signed": x, "tiny": x * 1e-6, "large": x * 1e4, "shifted": x + 1000}[make]
    packed = FeaturesCodec(5, 64).encode(x)
    scale = packed[:, :2].copy().view("<f2").astype(np.float64)
    restored = FeaturesCodec(5, 64).features(packed).double().numpy()
    error = np.abs(restored - x.double().numpy())
    rounding = np.abs(restored) * 2**-23  # the decoder works in float32
    assert (error <= scale / 2 + rounding).all()
    if make != "tiny" and make != "shifted":
        span = (x.max(1).values - x.min(1).values).numpy()
        assert (error.max(1) <= span / 510 * 1.02).all()


def test_constant_rows_are_kept():
    x = torch.tensor([[0.0] * 3, [2.5] * 3, [-7.0] * 3])
    codec = FeaturesCodec(2, 3)
    assert torch.equal(codec.features(codec.encode(x)), x)


def test_features_and_head_give_the_teachers_logits():
    head = linear(512, 100)
    features = randn(32, 512, seed=1).relu()
    codec = FeaturesCodec(100, 512)
    logits = codec.decode(codec.encode(features), head)
    expected = head(features).detach()
    assert logits.dtype == torch.float32 and not logits.requires_grad
    assert (logits - expected).abs().max() < 0.02 * expected.std()
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    plain = torch.nn.Linear(512, 100, bias=False)
    assert torch.equal(
        codec.decode(codec.encode(features), plain), codec.features(codec.encode(features)) @ plain.weight.T
    )


def test_make_codec():
    assert make_codec("logits", 10, None) == LogitsCodec(10)
    assert make_codec("features", 10, 4) == FeaturesCodec(10, 4)


@pytest.mark.parametrize("name", CODECS)
def test_every_row_of_the_table_keeps_the_promises_of_a_codec(name):
    """Named as its row, of the size that it says, decoded to logits by what is stored, and open to configurations."""
    codec = make_codec(name, 10, 24)
    assert codec.name == name in get_args(get_type_hints(LabelsConfig)["mode"])
    head = linear(24, 10)
    features = randn(6, 24, seed=1).relu()
    packed = codec.encode(features if codec.packs_features else head(features))
    assert packed.dtype == np.uint8 and packed.shape == (6, codec.nbytes)
    logits = codec.decode(packed, head if codec.packs_features else None)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    assert torch.equal(logits.argmax(1), head(features).argmax(1))


@pytest.mark.processes
def test_names_and_sizes_are_known_without_torch():
    code = "import sys, ddoq_ray.core.labels as l; print(l.choose_codec(1000, 512), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["features", "False"]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="one of"):
        make_codec("int4", 10, 4)
    with pytest.raises(ValueError, match="penultimate"):
        make_codec("features", 10, None)
    with pytest.raises(ValueError, match="num_classes"):
        make_codec("logits", 0, None)
    with pytest.raises(ValueError, match="num_classes=10"):
        LogitsCodec(10).encode(torch.zeros(2, 11))
    for bad in (float("nan"), float("inf"), 1e5):
        with pytest.raises(ValueError, match="fp16"):
            LogitsCodec(2).encode(torch.tensor([[0.0, bad]]))
        with pytest.raises(ValueError, match="fp16"):
            FeaturesCodec(2, 2).encode(torch.tensor([[0.0, bad]]))
    with pytest.raises(ValueError, match=r"\[B, 20\]"):
        LogitsCodec(10).decode(np.zeros((2, 19), dtype=np.uint8))
    packed = FeaturesCodec(3, 4).encode(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="head"):
        FeaturesCodec(3, 4).decode(packed)
    with pytest.raises(ValueError, match="not the head"):
        FeaturesCodec(3, 4).decode(packed, torch.nn.Linear(4, 5))


def test_labels_are_decoded_where_the_head_or_the_student_is():
    """FakeTensorMode carries "cuda" through on a machine without one, and raises where two devices meet."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        head = torch.nn.Linear(4, 3, device="cuda")
        features, logits = np.zeros((2, 8), np.uint8), np.zeros((2, 6), np.uint8)
        assert FeaturesCodec(3, 4).decode(features, head).device.type == "cuda"
        assert FeaturesCodec(3, 4).decode(torch.from_numpy(features), head, device="cuda").device.type == "cuda"
        assert FeaturesCodec(3, 4).decode(features, torch.nn.Linear(4, 3)).device.type == "cpu"
        assert LogitsCodec(3).decode(logits).device.type == "cpu"
        assert LogitsCodec(3).decode(logits, device="cuda").device.type == "cuda"
