"""Training on a handful of images: reproducible, published whole, better than nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddoq_ray.config.network_training import DecoderTuning
from ddoq_ray.config.schema import from_mapping
from ddoq_ray.data.image_file import ImageFile
from ddoq_ray.models.accuracy import top1_top5
from ddoq_ray.models.classifiers import build_classifier, load_classifier
from ddoq_ray.models.features import FeatureLevels
from ddoq_ray.models.fidelity import reconstructions
from ddoq_ray.models.priors.base import Sampling
from ddoq_ray.models.priors.load import load_prior
from ddoq_ray.models.training import prior as priors
from ddoq_ray.models.training import teacher as teachers
from ddoq_ray.models.training.autoencoder import build_autoencoder
from ddoq_ray.models.training.checkpoints import Checkpoints
from ddoq_ray.models.training.course import Course, Passes
from ddoq_ray.models.training.data import Destination, TrainingSet
from ddoq_ray.models.training.decoder import Tuned, tune_decoder
from ddoq_ray.models.training.pictures import Pictures
from ddoq_ray.models.training.prior import PriorTraining
from ddoq_ray.models.training.ranks import Alone
from ddoq_ray.models.training.seen_by import Classifiers
from ddoq_ray.models.training.teacher import TeacherTraining

CLASSES = ["dark", "light"]
TINY = {
    "autoencoder_widths": (8, 8), "autoencoder_steps": 60, "autoencoder_batch": 16, "denoiser_steps": 40,
    "denoiser_batch": 16, "unet_widths": (8,), "dit_layers": 1, "dit_heads": 2, "dit_width": 16,
}  # fmt: skip


def data(n: int = 32, size: int = 8, seed: int = 0):
    """Noise, dark in its lower half or light everywhere: separable by mean and, for instance norm, shape."""
    rng = np.random.default_rng(seed)
    ids = np.arange(n) % 2
    images = rng.integers(0, 100, (n, 3, size, size)) + 150 * ids[:, None, None, None]
    images[:, :, : size // 2] += 150 * (1 - ids)[:, None, None, None]
    return images.astype(np.uint8), ids.astype(np.int64)


def train_teacher(images, class_ids, classes, out, held_out=None, **how):
    return teachers.train_teacher(TrainingSet(images, class_ids, classes, held_out), Destination(out), **how)


def train_prior(images, class_ids, classes, out, teacher=None, extra=None, **how):
    data, seen_by = TrainingSet(images, class_ids, classes), Classifiers(teacher)
    return priors.train_prior(data, Destination(out, extra=extra or {}), seen_by=seen_by, **how)


@pytest.mark.parametrize("denoiser", ["unet", "dit"])
def test_a_trained_prior_loads_and_is_reproducible(tmp_path, denoiser):
    images, ids = data()
    config = PriorTraining(denoiser=denoiser, flip=denoiser == "dit", **TINY)
    seen: list[tuple[str, int, int, float | None]] = []
    shuffled = np.random.default_rng(5).permutation(len(images))
    in_file = mapped(tmp_path / "images", images[shuffled], ids[shuffled])  # shards may come in any order
    assert in_file.order()[1] == TrainingSet(images, ids, CLASSES).order()[1]
    for name, found in (("a", TrainingSet(images, ids, CLASSES)), ("b", in_file)):
        out = Destination(tmp_path / name, extra={"data": "noise"})
        record = priors.train_prior(found, out, config, on_progress=lambda *progress: seen.append(progress))
        torch.rand(3)
    a, b = load_prior(tmp_path / "a"), load_prior(tmp_path / "b")
    assert a.id == b.id and a.classes == CLASSES and a.image_size == 8 and a.latent_shape == (4, 4, 4)
    assert list(dict.fromkeys(phase for phase, *_ in seen)) == ["autoencoder", "latents", "denoiser"]
    assert all(step <= steps and (loss is None or np.isfinite(loss)) for _, step, steps, loss in seen)
    # As long as training's phases where images are many: it is not left silent.
    encoded = 32 * (2 if config.flip else 1)
    assert [rest for phase, *rest in seen if phase == "latents"][-1] == [encoded, encoded, None]
    assert a.denoiser.dtype == torch.float32
    # Latents have unit deviation, and decode to what they were.
    pixels = torch.from_numpy(images).float() / 127.5 - 1
    z = a.encode(pixels)
    assert abs(float(z.std()) - 1) < 0.2
    back = a.synthesize(z, torch.from_numpy(ids), torch.randn_like(z), Sampling(0.0, 5)).float().mean((1, 2, 3))
    assert back[ids == 1].mean() > back[ids == 0].mean() + 5
    sampled = a.synthesize(z, torch.from_numpy(ids), torch.randn_like(z), Sampling(0.4, 5, guidance=2.0))
    assert sampled.shape == (32, 8, 8, 3)
    written = json.loads((tmp_path / "a/ddoq_prior.json").read_text())
    assert written["training"]["options"]["denoiser"] == denoiser and written["training"]["data"] == "noise"
    assert record["images"] == 32 and sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["a", "b"]
    other = PriorTraining(denoiser=denoiser, seed=1, **TINY)
    train_prior(images, ids, CLASSES, tmp_path / "c", config=other)
    assert load_prior(tmp_path / "c").id != a.id


def mapped(place, images, ids) -> TrainingSet:
    """The same images, in a file."""
    file = ImageFile(place, {})
    file.write(zip(ids.tolist(), images, strict=True), images.shape[-1])
    return TrainingSet.mapped(file.open(), CLASSES, None)


def test_mapped_images_are_not_held(tmp_path):
    peaks = []
    vae = build_autoencoder(32, PriorTraining(autoencoder_widths=(8,) * 5, latent_channels=1))
    for n in (256, 1280):  # of 3,072 bytes
        found = mapped(tmp_path / str(n), *data(n, size=32))
        tracemalloc.start()
        try:
            pictures = Pictures(found.images, found.class_ids, found.order()[0])
            assert pictures.pixels(Passes(n, 64, (0,)).rows(1), torch.device("cpu")).shape == (64, 3, 32, 32)
            priors.write_latents(vae, pictures, 1, tmp_path / f"{n}.npy", Alone())
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 1024 < 100, peaks  # bytes an image: rows of a pass


class Stopped(Exception):
    """Raised in the middle of a training."""


@pytest.mark.parametrize("phase, at", [("autoencoder", 2), ("denoiser", 1)])
def test_a_stopped_prior_training_goes_on_to_the_same_bytes(tmp_path, phase, at):
    images, ids = data()
    teacher = build_classifier("convnet3-w8", 2, 8, seed=3)
    config = PriorTraining(
        checkpoint_every=15, samples_every=10, flip=True, feature_weight=0.1, prediction_type="v_prediction",
        zero_snr=True, min_snr=5.0, **TINY,
    )  # fmt: skip
    train_prior(images, ids, CLASSES, tmp_path / "whole", config=config, teacher=teacher)
    assert (tmp_path / "whole/samples.png").is_file()
    saved = []
    save = Checkpoints.save

    def stop(self, state):
        save(self, state)
        saved.append(state.get("running", {}).get("phase"))
        if saved.count(phase) == at:
            raise Stopped

    Checkpoints.save = stop
    try:
        with pytest.raises(Stopped):
            train_prior(images, ids, CLASSES, tmp_path / "cut", config=config, teacher=teacher)
    finally:
        Checkpoints.save = save
    if phase == "denoiser":
        page = (tmp_path / "cut.training/samples.html").read_text()
        assert "samples-0000010.png" in page and "step 10" in page and "dark, light" in page
        assert (tmp_path / "cut.training/samples-0000010.png").is_file()
    other = PriorTraining(**{**asdict(config), "ema": 0.5})
    with pytest.raises(ValueError, match=r"unfinished training.*\(options differ\)"):
        train_prior(images, ids, CLASSES, tmp_path / "cut", config=other, teacher=teacher)
    made: list[tuple[str, int]] = []
    train_prior(
        images, ids, CLASSES, tmp_path / "cut", config=config, teacher=teacher,
        on_progress=lambda phase, step, steps, loss: made.append((phase, step)),
    )  # fmt: skip
    assert ("autoencoder" in dict(made)) == (phase == "autoencoder")  # a finished phase is not run again
    for part in ("vae", "unet"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]


def test_a_training_by_time_ends_by_time_and_its_rate_is_a_bow():
    course = Course(10, seconds=1.0)
    rates = []
    for _ in course:
        rates.append(course.rate(1.0))
        course.spent += 0.02
    assert 45 <= course.done <= 51 and course.expected == course.done
    assert max(rates) > 0.99 and rates[0] < 0.5 and rates[-1] < 0.02
    by_steps = Course(50)
    rates = [by_steps.rate(1.0) for _ in by_steps]
    assert len(rates) == 50 and max(rates) > 0.99 and 0 < rates[-1] < 0.01 and 0 < rates[0] < 0.2


def test_passes_see_every_row_once_and_any_step_alone():
    passes = Passes(10, 4, (0, "x"))
    flat = np.concatenate([passes.rows(step) for step in range(5)])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and list(flat[:10]) != list(flat[10:])
    assert np.array_equal(Passes(10, 4, (0, "x")).rows(3), passes.rows(3))
    assert sorted(Passes(3, 8, (0,)).rows(7)) == [0, 1, 2]


def test_a_step_takes_its_rows_and_copies_no_pass():
    passes = Passes(1_000_000, 8, (0, "large"))
    passes.rows(0)  # which draws the pass
    tracemalloc.start()
    try:
        assert len(set(passes.rows(1)) - set(passes.rows(0))) == 8
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_features_of_a_teacher_make_reconstructions_that_it_knows(tmp_path):
    images, ids = data(64)
    train_teacher(images, ids, CLASSES, tmp_path / "t", config=TeacherTraining(arch="convnet3-w8", epochs=10))
    teacher = load_classifier(tmp_path / "t")
    distances = {}
    for weight in (0.0, 0.3):
        config = PriorTraining(**TINY, feature_weight=weight)
        train_prior(images, ids, CLASSES, tmp_path / f"p{weight}", config=config, teacher=teacher)
        made = reconstructions(load_prior(tmp_path / f"p{weight}").autoencoder, images)
        x, y = (torch.from_numpy(a).float() / 255 for a in (made, images))
        distances[weight] = float(FeatureLevels(teacher).distance(x, y))
    assert distances[0.3] < 0.9 * distances[0.0]


def test_distances_of_logits_are_those_of_what_soft_labels_are_made_of():
    teacher = build_classifier("convnet3-w8", 5, 16).eval()
    y = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x = (0.7 * y + 0.1).requires_grad_()
    distance = FeatureLevels(teacher).distances(x, y)[1]
    with torch.no_grad():
        got, right = (teacher(images).double() for images in (x, y))
    p, q = ((logits / 1000).softmax(1) for logits in (right, got))
    divergence = (p * (p / q).log()).sum(1) * 1000**2  # of labels at a high temperature
    of_uniform = (p * (p * 5).log()).sum(1) * 1000**2
    assert float(distance) == pytest.approx(float((divergence / of_uniform).mean()), rel=1e-2)
    slope = torch.autograd.grad(distance, x)[0]
    nearer = (x - 1e-3 * slope / slope.norm()).detach()
    assert float(FeatureLevels(teacher).distances(nearer, y)[1]) < float(distance)


def test_training_leaves_the_global_generator_alone(tmp_path):
    images, ids = data()
    state = torch.random.get_rng_state()
    train_prior(images, ids, CLASSES, tmp_path / "p", config=PriorTraining(**{**TINY, "autoencoder_steps": 2}))
    train_teacher(images, ids, CLASSES, tmp_path / "t", config=TeacherTraining(arch="convnet3-w8", epochs=1))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "options",
    [{"arch": "convnet3-w8"}, {"arch": "resnet18-small-w8", "cutmix": True},
     {"arch": "convnet3-w8", "mixup": 0.2, "ema": 0.9, "precision": "bfloat16", "label_smoothing": 0.1},
     {"arch": "convnet3-w8", "augment": "trivialaugment"}],
)  # fmt: skip
def test_a_trained_teacher_classifies_and_is_reproducible(tmp_path, options):
    images, ids = data(64)
    config = TeacherTraining(epochs=25, batch=16, lr=1e-2, dtype="float32", **options)
    held_out, seen = data(40, seed=1), []
    records = [
        train_teacher(
            images, ids, CLASSES, tmp_path / name, config=config, held_out=held_out,
            on_progress=lambda *progress: seen.append(progress),
        )
        for name in ("a", "b")
    ]  # fmt: skip
    a, b = load_classifier(tmp_path / "a"), load_classifier(tmp_path / "b")
    assert a.id == b.id and records[0] == records[1]
    top1, _ = top1_top5(a, *(torch.from_numpy(part) for part in held_out))
    assert top1 == records[0]["held_out_accuracy"] > 80.0
    assert a.classes == CLASSES and seen[-1][1] == seen[-1][2]
    expected = images.astype(np.float64).mean((0, 2, 3)) / 255
    np.testing.assert_allclose(a.mean.flatten().numpy(), expected, atol=1e-6)


def test_sgd_and_a_failed_run_leaves_nothing(tmp_path):
    images, ids = data()
    config = TeacherTraining(arch="convnet3-w8", epochs=1, optimizer="sgd", lr=0.05)
    train_teacher(images, ids, CLASSES, tmp_path / "t", config=config)

    def stop(*progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_teacher(images, ids, CLASSES, tmp_path / "u", config=config, on_progress=stop)
    with pytest.raises(KeyboardInterrupt):
        train_prior(images, ids, CLASSES, tmp_path / "u", config=PriorTraining(**TINY), on_progress=stop)
    # Nothing but what a stopped training goes on from.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t", "u.training"]
    with pytest.raises(ValueError, match="exists already"):  # before training, not after
        train_prior(images, ids, CLASSES, tmp_path / "t", config=PriorTraining(**TINY), on_progress=stop)


def test_inputs_that_do_not_fit_are_refused(tmp_path):
    images, ids = data()
    for arguments, match in [
        ((images.astype(np.float32), ids), "uint8"),
        ((images[..., :4], ids), "uint8"),
        ((images, ids[:3]), "labels"),
        ((images, ids + 1), "0 .. 1"),
        ((images[:0], ids[:0]), "at least one"),
    ]:
        for train in (train_prior, train_teacher):
            with pytest.raises(ValueError, match=match):
                train(*arguments, CLASSES, tmp_path / "x")
    with pytest.raises(ValueError, match="divisible by 4"):
        train_prior(images[:, :, :6, :6], ids, CLASSES, tmp_path / "x")
    for options in ({"denoiser": "mlp"}, {"dtype": "int8"}, {"ema": 1.0}, {"unet_widths": (12,)},
                    {"prediction_type": "sample"}, {"denoiser_steps": 0}):  # fmt: skip
        with pytest.raises(ValueError, match=r"training\."):
            from_mapping(PriorTraining, options, "training.")
    for options in ({"epochs": 0}, {"optimizer": "lion"}, {"dtype": "bfloat16"}, {"augment": "auto"}, {"mixup": -1.0},
                    {"ema": 1.0}, {"minutes": 0.0}, {"precision": "fp8"}, {"checkpoint_every": 0}):  # fmt: skip
        with pytest.raises(ValueError, match=r"training\."):
            from_mapping(TeacherTraining, options, "training.")


def test_a_tuned_decoder_keeps_latents_and_what_the_teacher_sees(tmp_path):
    images, ids = data(64)
    train_teacher(images, ids, CLASSES, tmp_path / "t", config=TeacherTraining(arch="convnet3-w8", epochs=10))
    teacher = load_classifier(tmp_path / "t")
    train_prior(images, ids, CLASSES, tmp_path / "p", config=PriorTraining(**TINY))
    whole, out = TrainingSet(images, ids, CLASSES), Destination(tmp_path / "tuned")
    config = DecoderTuning(steps=60, batch=16, lr=5e-3, feature_weight=1.0, logit_weight=0.1)
    seen_by = Classifiers(teacher)
    record = tune_decoder(whole, out, config, source=Tuned(str(tmp_path / "p"), seen_by))
    before, after = load_prior(tmp_path / "p"), load_prior(tmp_path / "tuned")
    assert after.id != before.id and after.latents_id == before.latents_id == before.id
    x = torch.from_numpy(images).float() / 127.5 - 1
    assert torch.equal(before.encode(x), after.encode(x))
    assert load_prior(tmp_path / "tuned", dtype="bfloat16").latents_id == before.id  # whatever it runs in
    sizes = {d: (tmp_path / d / "vae/diffusion_pytorch_model.safetensors").stat().st_size for d in ("p", "tuned")}
    assert str(tmp_path) not in (tmp_path / "tuned/vae/config.json").read_text()
    assert sizes["tuned"] == sizes["p"]  # kept in half precision, as the source is
    real = torch.from_numpy(images).float() / 255

    def distance(prior):
        made = torch.from_numpy(reconstructions(prior.autoencoder, images)).float() / 255
        return float(FeatureLevels(teacher).distance(made, real))

    assert distance(after) < 0.8 * distance(before)
    assert set(record["decoder_losses"]) == {"loss", "mse", "features", "logits"}
    assert set(record["after"]) == set(record["before"]) and (tmp_path / "tuned/unet").is_dir()
    # Tuned again, the latents are still the first one's; with another encoder they are nobody's.
    again = Destination(tmp_path / "again")
    tune_decoder(whole, again, DecoderTuning(steps=2, batch=16), source=Tuned(str(tmp_path / "tuned"), seen_by))
    assert load_prior(tmp_path / "again").latents_id == before.id
    shutil.rmtree(tmp_path / "again/vae")
    train_prior(images, ids, CLASSES, tmp_path / "other", config=PriorTraining(**{**TINY, "seed": 9}))
    shutil.copytree(tmp_path / "other/vae", tmp_path / "again/vae")
    with pytest.raises(ValueError, match="its encoder is another by now"):
        load_prior(tmp_path / "again")
    with pytest.raises(ValueError, match="expected perceptual=CLASSIFIER"):
        tune_decoder(whole, Destination(tmp_path / "x"), config, source=Tuned(str(tmp_path / "p"), Classifiers()))
    with pytest.raises(ValueError, match="the prior makes images of 8 px"):
        wide = TrainingSet(np.repeat(images, 2, 3).repeat(2, 2), ids, CLASSES)
        tune_decoder(wide, Destination(tmp_path / "x"), config, source=Tuned(str(tmp_path / "p"), seen_by))


@pytest.mark.slow
def test_compiled_networks_train_alike(tmp_path):
    images, ids = data()
    tiny = {**TINY, "autoencoder_steps": 3, "denoiser_steps": 3, "samples_every": 2}
    records = [
        train_prior(images, ids, CLASSES, tmp_path / str(wanted), config=PriorTraining(**tiny, compile=wanted))
        for wanted in (False, True)
    ]
    for key in ("autoencoder_losses", "denoiser_losses"):
        assert records[1][key] == pytest.approx(records[0][key], rel=1e-4)
    assert records[1]["options"]["compile"] and "compile" not in records[0]["options"]
    for part in ("vae", "unet"):  # the same names: what is compiled is no other network
        files = [tmp_path / wanted / part / "diffusion_pytorch_model.safetensors" for wanted in ("False", "True")]
        a, b = (load_file(file) for file in files)
        assert a.keys() == b.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("training.compile", "from ddoq_ray.models.training.course import compiled; compiled((abs,), True)"),
        (
            "encoder.compile",
            "from ddoq_ray.models.autoencoder import load_autoencoder; "
            "load_autoencoder('shipped:digits-prior', compile=True)",
        ),
        (
            "synthesizer.compile",
            "from ddoq_ray.models.priors.load import load_prior; load_prior('shipped:digits-prior', compile=True)",
        ),
    ],
)
def test_compiling_where_there_is_no_compiler_is_refused_in_words(tmp_path, key, code):
    here = {**os.environ, "CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True, check=False)
    assert f"ValueError: {key}=true: torch.compile does not work here" in ended.stderr
    assert "leave the key out" in ended.stderr
