"""Every network path on a pretended GPU (pretended_gpu.py): no two devices meet, and the CPU's values come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from support.pretended_gpu import OnGpu, pretended_gpu
from support.tiny_networks import tiny_dit, tiny_kl, tiny_taesd, tiny_unet, tiny_vae

from ddoq_ray.config.cluster import TrainerResources
from ddoq_ray.config.training import ProtocolConfig, StudentConfig
from ddoq_ray.core.gram_batched import gram_kmeans_batched
from ddoq_ray.core.gram_kmeans import KMeansSettings
from ddoq_ray.core.labels import CODECS, make_codec
from ddoq_ray.core.views.params import ViewSpec
from ddoq_ray.core.views.render import batch_views
from ddoq_ray.data.pixel_rows import MemoryRows
from ddoq_ray.models.accuracy import top1_top5
from ddoq_ray.models.autoencoder import Autoencoder
from ddoq_ray.models.classifiers import build_classifier
from ddoq_ray.models.ensemble import Ensemble, for_teacher
from ddoq_ray.models.labelling import Labeller
from ddoq_ray.models.priors.base import STARTS, Sampling, Start
from ddoq_ray.models.priors.class_conditional import ClassConditionalPrior
from ddoq_ray.models.priors.loading import Loading
from ddoq_ray.models.protocol_views import view_spec
from ddoq_ray.models.training.images import Gathered, Resident
from ddoq_ray.models.training.student import (
    HardTargets,
    StoredTargets,
    StudentTraining,
    TeacherTargets,
    build_student,
)

SCHEDULERS: tuple[Any, ...] = (
    DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
    HeunDiscreteScheduler, LMSDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler,
)  # fmt: skip

COMMON = (DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler)


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with pretended_gpu() as device:
        yield device


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Any, **config: Any) -> Any:
    """The network with the same weights again."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return make(**config).eval()


def home(value: torch.Tensor) -> torch.Tensor:
    assert value.device.type == "cuda"
    return value.cpu()


def test_the_pretended_gpu_notices_two_devices(gpu: torch.device) -> None:
    there = torch.ones(3, device=gpu)
    assert torch.equal((there + 1).cpu(), torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="one device"):
        there + torch.ones(3)
    with pytest.raises(RuntimeError, match="one device"):
        torch.nn.Linear(3, 3).to(gpu)(torch.ones(1, 3))
    with pytest.raises(TypeError, match=r"Tensor\.cpu\(\)"):
        there.numpy()


AUTOENCODERS = {
    "kl": (tiny_kl, {"scaling_factor": 0.5, "shift_factor": 0.3}),
    "statistics": (tiny_kl, {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}),
    "grey": (tiny_kl, {"in_channels": 1, "out_channels": 1}),
    "tiny": (tiny_taesd, {}),
}


@pytest.mark.parametrize(("dtype", "channels_last"), [("float32", False), ("float16", True)])
@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_encode_and_decode(gpu: torch.device, kind: str, dtype: str, channels_last: bool) -> None:
    make, config = AUTOENCODERS[kind]
    here, there = (
        Autoencoder(seeded(make, **config), device=device, dtype=dtype, channels_last=channels_last)
        for device in ("cpu", gpu)
    )
    images, latents = drawn(2, 3, 8, 8).clamp(-1, 1), drawn(2, 4, 4, 4)
    near = {"atol": 1e-5 if dtype == "float32" else 2e-2, "rtol": 1e-3}
    torch.testing.assert_close(home(there.encode(images)), here.encode(images), **near)
    torch.testing.assert_close(home(there.encode(images.to(gpu))), here.encode(images), **near)
    torch.testing.assert_close(home(there.decode(latents)), here.decode(latents), **near)
    if make is tiny_kl:
        noise = drawn(2, 4, 4, 4, seed=1)
        torch.testing.assert_close(home(there.encode(images, noise)), here.encode(images, noise), **near)


def prior_on(device: Any, denoiser: Any, scheduler: Any) -> ClassConditionalPrior:
    parts = seeded(tiny_vae), seeded(denoiser), scheduler.from_config({})
    return ClassConditionalPrior(*parts, num_classes=3, how=Loading(device=device), id="x")


def check_alike(denoiser: Any, scheduler: Any, *runs: tuple[Start, float]) -> None:
    here = prior_on("cpu", denoiser, scheduler)
    z, labels, noise = drawn(2, 4, 4, 4), torch.tensor([0, 2]), drawn(2, 4, 4, 4, seed=1)
    for start, guidance in runs:
        how = Sampling(0.5, 4, start, guidance)
        expected = here.synthesize(z, labels, noise, how)
        with pretended_gpu() as gpu:
            there = prior_on(gpu, denoiser, scheduler)
            made = there.synthesize(z, labels, noise, how)
            assert there.noise_scales(0.5, 4) == pytest.approx(here.noise_scales(0.5, 4))
        assert not isinstance(made, OnGpu) and made.dtype == torch.uint8
        assert int((made.int() - expected.int()).abs().max()) <= 1  # of 255: a sum in another order


@pytest.mark.parametrize("denoiser", [tiny_unet, tiny_dit])
def test_synthesize_from_every_start(denoiser: Any) -> None:
    check_alike(denoiser, DDIMScheduler, ("noised", 1.0), *((start, 3.0) for start in STARTS))


@pytest.mark.parametrize(
    "scheduler",
    [pytest.param(s, id=s.__name__, marks=[] if s in COMMON else pytest.mark.slow) for s in SCHEDULERS[1:]],
)
def test_synthesize_with_every_scheduler(scheduler: Any) -> None:
    check_alike(tiny_unet, scheduler, ("noised", 1.0), ("noise", 1.0))


def test_generators_a_row_feed_the_steps_of_a_gpu(gpu: torch.device) -> None:
    def made(device: Any) -> torch.Tensor:
        prior = prior_on(device, tiny_unet, DDPMScheduler)
        rows = [torch.Generator().manual_seed(i) for i in range(2)]
        z, noise = drawn(2, 4, 4, 4), drawn(2, 4, 4, 4, seed=1)
        return prior.synthesize(z, torch.tensor([0, 1]), noise, Sampling(0.5, 4), rows)

    assert int((made(gpu).int() - made("cpu").int()).abs().max()) <= 1


@pytest.mark.parametrize("codec", ["logits", "features"])
@pytest.mark.parametrize("teacher_size", [8, 16, 24])
def test_views_are_rendered_and_labelled(gpu: torch.device, codec: str, teacher_size: int) -> None:
    """Student's views of 16 px go to a teacher of a smaller, the same and a larger size."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 20, 20), dtype=np.uint8))

    def labelled(device: Any) -> tuple[torch.Tensor, torch.Tensor]:
        teacher = build_classifier("convnet3-w8", 5, teacher_size).to(device).eval()
        packer = make_codec(codec, 5, teacher.head.in_features)
        spec = ViewSpec(size=16, min_scale=0.08, flip=True, cutmix=1.0)
        with torch.inference_mode():
            pixels, _, _ = batch_views(images.to(device), np.arange(6), spec, 0, 3)
            assert pixels.device.type == torch.device(device).type
            sized = for_teacher(pixels, teacher_size)
            packed = packer.encode(teacher(sized) if codec == "logits" else teacher.features(sized))
            decoded = packer.decode(packed, teacher.head, device=device)
            assert decoded.device.type == torch.device(device).type
        return pixels.cpu(), decoded.cpu()

    for there, here in zip(labelled(gpu), labelled("cpu"), strict=True):
        torch.testing.assert_close(there, here, atol=2e-2, rtol=1e-2)


VIEWS = {
    "cutmix": {},
    "mixup": {"cutmix": False, "mixup": 0.8},
    "patches and cutout": {"shuffle_patches": 2, "cutout": 0.5},
}


@pytest.mark.parametrize("kind", ["classifier", "ensemble"])
@pytest.mark.parametrize("views", VIEWS)
def test_a_labeller_packs_and_costs_every_codec(gpu: torch.device, kind: str, views: str) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 3, 20, 20), dtype=np.uint8))
    index, spec = np.array([4, 0, 8, 2, 7]), view_spec(ProtocolConfig(min_scale=0.08, flip=True, **VIEWS[views]), 16)

    def labelled(device: Any) -> tuple[dict[str, torch.Tensor], Any]:
        teacher: Any = build_classifier("convnet3-w8", 5, 16).to(device).eval()
        if kind == "ensemble":
            teacher = Ensemble([teacher, build_classifier("convnet3-w8", 5, 8, seed=1).to(device).eval()], 2.0)
        head, decoded = getattr(teacher, "head", None), {}
        costs = Labeller(teacher, "logits", spec, seed=1, batch=2).codec_costs(images.to(device), index, 2.0)
        for codec in costs:
            labeller = Labeller(teacher, codec, spec, seed=1, batch=2)
            packed, told = labeller.labels(images.to(device), index, 3)
            logits = labeller.codec.decode(packed, head, device)
            assert logits.device.type == torch.device(device).type and len(told) % len(index) == 0
            decoded[codec] = logits.cpu()
        return decoded, costs

    (there, costs), (here, expected) = labelled(gpu), labelled("cpu")
    assert list(there) == list(here) == [c for c in CODECS if kind == "classifier" or c != "features"]
    for codec, logits in there.items():
        torch.testing.assert_close(logits, here[codec], atol=2e-2, rtol=1e-2)
        assert costs[codec]["nbytes"] == expected[codec]["nbytes"]


@pytest.mark.parametrize("views", VIEWS)
def test_images_that_stay_beside_a_teachers_gpu_get_the_same_labels(gpu: torch.device, views: str) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 3, 20, 20), dtype=np.uint8))
    index, spec = np.array([4, 0, 8, 2, 7]), view_spec(ProtocolConfig(min_scale=0.08, flip=True, **VIEWS[views]), 16)
    teacher = build_classifier("convnet3-w8", 5, 16).to(gpu).eval()
    (there, told), (beside, told_beside) = (
        Labeller(teacher, "logits", spec, seed=1, batch=2).labels(where, index, 3) for where in (images.to(gpu), images)
    )
    assert np.array_equal(there, beside) and told == told_beside
    costs = Labeller(teacher, "logits", spec, seed=1, batch=2).codec_costs(images, index, 2.0)
    assert 0 < costs["logits_int8"]["kl"] < 0.1


@pytest.mark.parametrize("kept", ["device", "file"])
@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("targets", ["logits", "features", "logits_int8", "online", "hard"])
def test_a_training_step_up_to_its_loss(gpu: torch.device, targets: str, views: str, kept: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 3, 20, 20), dtype=np.uint8)
    batch = np.array([4, 0, 8, 2, 7])
    protocol = ProtocolConfig(batch=5, min_scale=0.3, flip=True, **VIEWS[views])
    features = drawn(9, 7).abs()

    def loss(device: Any) -> torch.Tensor:
        model = build_student(StudentConfig("resnet18-small-w4", 16), 5, 0).to(device)
        images: Any = Gathered(MemoryRows(pixels), device)
        if kept == "device":
            images = Resident(torch.from_numpy(pixels).to(device))
        made = StudentTraining(
            model, model, images, torch.linspace(0.5, 1.5, 9).to(device), protocol, view_spec(protocol, 16), 0, 1,
            how=TrainerResources(channels_last=True), cutmix_weight="mixed",
        )  # fmt: skip
        model.train()
        with torch.no_grad():
            return made.loss(batch, answers(device)).cpu()

    def answers(device: Any) -> Any:
        if targets == "online":
            return TeacherTargets(build_classifier("convnet3-w8", 5, 24, seed=3).to(device).eval())
        if targets == "hard":
            return HardTargets((torch.arange(9) % 5).to(device), 5)
        codec = make_codec(targets, 5, 7)
        head = seeded(lambda: torch.nn.Linear(7, 5)).to(device)
        packed = codec.encode(features if codec.packs_features else drawn(9, 5, seed=2))
        return StoredTargets(lambda index: codec.decode(packed[index], head, device))

    torch.testing.assert_close(loss(gpu), loss("cpu"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", ["convnet3-w8", "resnet18-small-w4"])
def test_accuracy_is_measured_where_the_student_is(gpu: torch.device, arch: str) -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8))
    truth, columns = torch.arange(12) % 3, torch.tensor([4, 0, 2])

    def measured(device: Any) -> tuple[float, float]:
        student = build_classifier(arch, 5, 32).to(device)
        with torch.inference_mode():  # a view of another mode's tensor is what the pretended GPU cannot make
            return top1_top5(student, pixels.to(device), truth.to(device), columns.to(device), batch=5)

    assert measured(gpu) == measured("cpu")


@pytest.mark.parametrize("product", ["float32", "bfloat16"])
def test_gram_on_a_gpu(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    classes = [rng.standard_normal((n, 6)).astype(dtype) for n, dtype in ((12, "f2"), (9, "f4"), (3, "f4"))]
    classes[1][5] = classes[1][4]  # copies are folded
    how: dict[str, Any] = {"seed": 1, "class_ids": [0, 1, 2], "settings": KMeansSettings(product=product)}
    expected = gram_kmeans_batched(classes, 4, device="cpu", **how)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pretended_gpu():
        found = gram_kmeans_batched(classes, 4, device="cuda", **how)
    for (centroids, counts), (near, same) in zip(found, expected, strict=True):
        np.testing.assert_allclose(centroids, near, atol=1e-5)
        assert counts.tolist() == same.tolist()
