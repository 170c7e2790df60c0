"""Settings and networks that cannot work are told by the process that looks at them, in one line each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddoq_ray.config.compose import load_config
from ddoq_ray.execution.known_networks import keep, kept, place_of
from ddoq_ray.execution.networks import Inspection, Networks, check_batches, check_side
from ddoq_ray.models import inspect
from ddoq_ray.models.classifiers import build_classifier, load_classifier, save_classifier
from ddoq_ray.models.folders import resolve_folder
from ddoq_ray.models.inspect import check_student, describe
from ddoq_ray.models.training.student import share


def question(**changes: Any) -> dict[str, Any]:
    asked = {
        "threads": 1,
        "prior": {"path": "shipped:digits-prior"},
        "encoder": {"path": None, "posterior": "mode", "tried": True},
        "noise": [0.0, 25],
        "synthesizer": {"start": "noised", "strength": 0.1, "steps": 25, "guidance": 1.0},
        "teacher": None,
        "judge": None,
        "student": None,
    }
    return asked | changes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strength": 0.03}, ["strength 0.03 of 25 steps runs none", "0.04", "synthesizer.steps=25"]),
        ({"steps": 2000}, ["steps must lie in 1 .. 1000"]),
    ],
)
def test_settings_that_run_no_step_or_too_many(settings: dict[str, Any], words: list[str]) -> None:
    asked = {"start": "noised", "strength": 0.1, "steps": 25, "guidance": 1.0} | settings
    with pytest.raises(ValueError) as error:
        describe(question(synthesizer=asked))
    assert all(w in str(error.value) for w in words), error.value


@pytest.mark.parametrize("steps", [3, 7, 25, 29, 100])
def test_the_least_strength_that_the_message_names_works(steps: int) -> None:
    asked = {"start": "noised", "strength": 0.5 / steps, "steps": steps, "guidance": 1.0}
    with pytest.raises(ValueError) as error:
        describe(question(synthesizer=asked))
    least = float(str(error.value).split("at least ")[1].split(",")[0].split(" ")[0])
    describe(question(synthesizer=asked | {"strength": least}))


@pytest.mark.parametrize(("arch", "size"), [("vit_b_16", 32), ("alexnet", 32)])
def test_a_student_that_does_not_fit_its_images(arch: str, size: int) -> None:
    with pytest.raises(ValueError, match=rf"student.arch={arch} does not take images of student.image_size={size}"):
        check_student(arch, size)


def test_batch_norm_refuses_a_batch_of_one_and_the_run_says_so() -> None:
    assert check_student("convnet3-w8", 16)[0] and not check_student("resnet18-small-w8", 8)[0]
    facts = Networks("", (4,), 8, None, 10, None, None, None, 0, 0, {}, student_takes_one=False)
    config = load_config(["protocol.batch=3"])
    with pytest.raises(
        ValueError, match=r"protocol.batch=3 leaves a batch with less than two images of the set \(10\)"
    ):
        check_batches({"the set": 10}, config, facts)
    check_batches({"the set": 11}, config, facts)


def test_images_are_not_stored_larger_than_the_prior_makes_them() -> None:
    facts = Networks("", (4,), 8, None, 10, None, None, None, 0, 0, {})
    for words in ([], ["synthesizer.image_size=8"], ["synthesizer.image_size=4"]):
        check_side(load_config(words), facts)
    with pytest.raises(ValueError, match=r"synthesizer.image_size=9: the prior makes images of 8 px.*prior.image_size"):
        check_side(load_config(["synthesizer.image_size=9"]), facts)
    check_side(load_config(["synthesizer.image_size=9", "stages=[label]"]), facts)


@pytest.mark.parametrize(("batch", "images", "works"), [
    (4, 8, True), (4, 9, False), (4, 11, True), (1, 8, False), (100, 1, False), (100, 2, True), (100, 3, True),
])  # fmt: skip
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_last_batch_is_the_one_that_training_takes(batch: int, images: int, works: bool, workers: int) -> None:
    """Refused where, and only where, the ranks' shares of an epoch's batches hold a single image."""
    facts = Networks("", (4,), 8, None, 10, None, None, None, 0, 0, {}, student_takes_one=False)
    config = load_config([f"protocol.batch={batch}", f"cluster.trainer.workers={workers}"])
    batches = [np.arange(images)[first : first + batch] for first in range(0, images, batch)]
    shares = [len(share(b, rank, workers)) for b in batches for rank in range(workers)]
    assert works == (1 not in shares)
    if works:
        check_batches({"the set": images}, config, facts)
        return
    with pytest.raises(ValueError, match="less than two images") as error:
        check_batches({"the set": images}, config, facts)
    if "use protocol.batch=" in str(error.value):
        near = int(str(error.value).rpartition("=")[2])
        check_batches({"the set": images}, load_config([f"protocol.batch={near}"]), facts)
    else:
        assert images == 1


def test_the_student_is_tried_with_the_outputs_of_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    def build(arch: str, outputs: int, size: int) -> Any:
        built.append(outputs)
        return build_classifier(arch, outputs, size)

    monkeypatch.setattr(inspect, "build_classifier", build)
    student = {"arch": "convnet3-w8", "image_size": 16}
    facts = describe(question(teacher="shipped:digits-teacher", student=student))
    assert built == [facts["teacher_outputs"]] == [10]


@pytest.mark.parametrize("start", ["noised", "inversion", "noise"])
def test_centroids_of_noised_latents_are_denoised_from_their_own_level_or_refused(start: str) -> None:
    keys = ["quantizer=gram", "quantizer.noise_level=0.2", f"synthesizer.start={start}"]
    if start == "noised":
        config = load_config([*keys, "synthesizer.strength=0.2"])
        asked = {"start": "given", "strength": 0.2, "steps": config.synthesizer.steps, "guidance": 1.0}
        noise = [0.2, config.synthesizer.steps]
        signal, sigma = describe(question(noise=noise, synthesizer=asked))["noise_scales"]
        assert 0 < sigma < signal < 1
    with pytest.raises(
        ValueError, match=rf"noise_level=0\.2 with synthesizer\.start={start}.*expected .*strength=0\.2"
    ):
        load_config([*keys, "synthesizer.strength=0.4"])


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    save_classifier(build_classifier("convnet3-w8", 3, 16), tmp_path / "t")
    tensors = load_file(tmp_path / "t/model.safetensors")
    tensors["head.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "t/model.safetensors")
    with pytest.raises(ValueError, match=r"head\.weight"):
        load_classifier(tmp_path / "t")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    network = build_classifier("convnet3-w8", 3, 16, seed=3)
    save_classifier(network, tmp_path / "t")
    tensors = load_file(tmp_path / "t/model.safetensors")
    save_file({f"{prefix}{k}": v for k, v in tensors.items()}, tmp_path / "t/model.safetensors")
    assert torch.equal(load_classifier(tmp_path / "t").head.weight, network.head.weight)


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    save_classifier(build_classifier("convnet3-w8", 3, 16), tmp_path / "t")
    (tmp_path / "t/model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="git-lfs pointer"):
        load_classifier(tmp_path / "t")


def test_torchvision_normalises_as_its_own_weights_say(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    from ddoq_ray.models import classifiers

    blank = torchvision.models.efficientnet_v2_l(weights=None)
    monkeypatch.setattr(classifiers, "torchvision_model", lambda arch, weights=None: blank)
    network = classifiers._torchvision_classifier("efficientnet_v2_l")
    recipe = torchvision.models.EfficientNet_V2_L_Weights.DEFAULT.transforms()
    assert network.config()["mean"] == pytest.approx(recipe.mean) and network.config()["std"] == pytest.approx(
        recipe.std
    )
    assert network.image_size == recipe.crop_size[0]


@pytest.mark.processes
def test_an_answer_is_kept_until_something_it_follows_from_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prior = tmp_path / "prior"
    shutil.copytree(resolve_folder("shipped:digits-prior", "prior"), prior)
    keys = [f"prior.path={prior}", "stages=[encode]"]

    def inspection(*more: str) -> Inspection:
        made = Inspection(load_config([*keys, *more]), teacher=False)
        made.start()
        return made

    first = inspection()
    assert first._process is not None
    facts = first.result()
    again = inspection()
    assert again._process is None and again.result() == facts  # types of the values too
    [file] = (tmp_path / "cache").rglob("*.json")
    assert not list((tmp_path / "cache").rglob("*.part"))

    def place(question: str = "{}", path: str = str(prior)) -> Path | None:
        return place_of(question, [path])

    assert place() == place() != place('{"a": 1}') and place(path="facebook/DiT-XL-2-256") is None
    before = place()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert place() != before
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    os.utime(prior / "model_index.json", ns=(1, 1))
    assert place() != before
    file.write_text("{ damaged")
    assert kept(file) is None and kept(tmp_path / "none") is None
    (tmp_path / "flat").touch()
    keep(tmp_path / "flat" / "networks" / "x.json", {})  # a cache that cannot be written


@pytest.mark.processes
def test_a_look_that_memory_is_too_small_for_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: failed to map segment from shared object')")
    process = subprocess.Popen(
        [sys.executable, "-c", "import torch"], env={"PYTHONPATH": str(tmp_path)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"failed to map segment.*ulimit -v"):
        Inspection._answer(process)


@pytest.mark.processes
def test_the_inquiry_is_a_process_that_answers_or_refuses_in_words() -> None:
    known = Inspection(load_config(), teacher=True).result()
    assert known.prior_id and known.latent_shape and known.teacher_outputs == 10 and known.student_takes_one
    wrong = Inspection(load_config(["synthesizer.strength=0.01"]), teacher=False)
    with pytest.raises(ValueError, match=r"strength 0\.01 of 25 steps.*synthesizer\.strength=0\.01"):
        wrong.result()
    assert resolve_folder("shipped:digits-prior", "prior").is_dir()
