"""The training commands make folders that the pipeline's own loaders read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddoq_ray.cli import main
from ddoq_ray.commands.table import BY_NAME
from ddoq_ray.commands.training_images import Through, read_images
from ddoq_ray.data.collections import DIGIT_NAMES
from ddoq_ray.models.classifiers import load_classifier
from ddoq_ray.models.fidelity import BATCH, reconstructions
from ddoq_ray.models.priors.load import load_prior
from ddoq_ray.models.training.checkpoints import Checkpoints


def test_train_teacher_makes_a_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "teacher"
    arguments = [
        "train-teacher",
        f"out={out}",
        "training.epochs=2",
        "training.arch=convnet3-w32",
        "training.flip=false",
    ]
    assert main(arguments) == 0
    teacher = load_classifier(out)
    assert teacher.classes == list(DIGIT_NAMES) and teacher.image_size == 16
    assert json.loads((out / "config.json").read_text())["training"]["held_out_images"] == 297
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "overwrite=true"]) == 0


def test_a_teacher_learns_what_an_autoencoder_gives_back_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = load_prior("shipped:digits-prior")
    plain, twice = (
        read_images(BY_NAME["train-teacher"].compose([f"out={tmp_path / name}"]), through).open()
        for name, through in (("plain", None), ("twice", Through(prior.autoencoder, prior.id)))
    )
    assert len(twice.images) == 2 * len(plain.images) and len(twice.held_out[0]) == len(plain.held_out[0])
    # Some are read, and then the same ones are given back.
    assert np.array_equal(twice.images[:BATCH], plain.images[:BATCH])
    again = slice(BATCH, 2 * BATCH)
    assert np.array_equal(twice.images[again], reconstructions(prior.autoencoder, plain.images[:BATCH]))
    assert np.array_equal(twice.class_ids[again], plain.class_ids[:BATCH])

    tiny = ["train-teacher", f"out={tmp_path / 'teacher'}", "training.epochs=1", "training.arch=convnet3-w8"]
    assert main([*tiny, "through=shipped:digits-prior"]) == 0
    record = json.loads((tmp_path / "teacher/config.json").read_text())["training"]
    assert (record["images"], record["through"]) == (len(twice.images), prior.id)
    assert main(["train-teacher", f"out={tmp_path / 'no'}", "through=shipped:cifar10-prior"]) == 2
    assert "its images have 32 px, and image_size=16" in capsys.readouterr().err


def test_train_prior_makes_a_prior_and_repeats_itself(tmp_path: Path) -> None:
    tiny = [
        "training.autoencoder_steps=3", "training.denoiser_steps=3", "training.autoencoder_batch=8",
        "training.denoiser_batch=8", "training.unet_widths=[8,8]",
    ]  # fmt: skip
    for name in ("one", "two"):
        assert main(["train-prior", f"out={tmp_path / name}", *tiny]) == 0
    prior = load_prior(tmp_path / "one")
    assert prior.classes == list(DIGIT_NAMES)
    assert prior.encode(torch.zeros(2, 3, 16, 16)).shape == (2, *prior.latent_shape)
    assert prior.id == load_prior(tmp_path / "two").id, "the same seed and threads give the same weights"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train-prior", "trainin.steps=1"],
        ["train-teacher", "dataset=nothing"],
        ["train-teacher", "device=gpu"],
    ],
)
def test_bad_keys_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert arguments[1].split("=")[0].split(".")[0] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train-teacher", "device=cuda", f"out={tmp_path / 'teacher'}"]) == 2
    assert "device=cuda: torch sees no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_tune_decoder_makes_a_prior_of_the_same_latents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tuned"
    words = ["tune-decoder", f"out={out}", "training.steps=2", "training.batch=8"]
    assert main(words) == 2 and "perceptual=CLASSIFIER" in capsys.readouterr().err
    assert main([*words, "perceptual=shipped:digits-teacher"]) == 0
    made, source = load_prior(out), load_prior("shipped:digits-prior")
    assert made.id != source.id and made.latents_id == source.id
    assert json.loads((out / "ddoq_prior.json").read_text())["tuned"]["after"]["held_out"] is True


def test_a_resumed_training_reads_no_shard_again(
    tmp_path: Path, write_corpus: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    corpus = write_corpus(tmp_path / "digits", shards=2, per_shard=40)
    words = [
        "train-prior", f"dataset.path={corpus}", "image_size=8", "training.autoencoder_steps=4",
        "training.denoiser_steps=2", "training.autoencoder_batch=8", "training.denoiser_batch=8",
        "training.autoencoder_widths=[8,8]", "training.unet_widths=[8,8]", "training.checkpoint_every=2",
    ]  # fmt: skip
    assert main([*words, f"out={tmp_path / 'whole'}"]) == 0
    save, out = Checkpoints.save, [f"out={tmp_path / 'cut'}"]

    def stop(self: Checkpoints, state: dict[str, Any]) -> None:
        save(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        assert main([*words, *out]) == 130
    assert "the same command again goes on" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "cut.training/images").iterdir()} == {"train.pixels", "train.npz"}
    shards = {shard: shard.read_bytes() for shard in corpus.glob("*.tar")}
    for shard, data in shards.items():
        shard.write_bytes(bytes(len(data)))  # as large as before; read again, they would hold nothing
    assert main([*words, *out, "resize=pad"]) == 2
    assert "unfinished training of other images" in capsys.readouterr().err
    assert main([*words, *out]) == 0
    assert load_prior(tmp_path / "cut").id == load_prior(tmp_path / "whole").id
    assert not (tmp_path / "cut.training").exists()
    assert main([*words, f"out={tmp_path / 'new'}"]) == 2
    assert "no usable sample in 2 shards" in capsys.readouterr().err
