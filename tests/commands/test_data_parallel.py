"""Training on several ranks by Ray Train: as one process trains, through a death, with words for what cannot work."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import torch
from safetensors.torch import load_file

from ddoq_ray.commands import train_prior, train_teacher, tune_decoder
from ddoq_ray.commands.data_parallel import Job, Train, check_room, fit_job, with_whole_paths
from ddoq_ray.commands.table import BY_NAME
from ddoq_ray.commands.training_images import ReadImages, read_images
from ddoq_ray.config.cluster import TrainerResources
from ddoq_ray.data.image_file import ImageFile
from ddoq_ray.models.training.ranks import Alone, Part, check_parts
from ddoq_ray.stages.train.ranks import Ranks

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test's module

# Adam divides a gradient by its size: where that is nothing but rounding, a weight goes either way, by about the rate.
TINY = [
    "training.autoencoder_steps=6", "training.denoiser_steps=6", "training.autoencoder_batch=10",
    "training.denoiser_batch=11", "training.autoencoder_widths=[16,16]", "training.unet_widths=[16]",
    "training.autoencoder_lr=2e-5", "training.denoiser_lr=1e-5", "training.flip=true", "training.dtype=float32",
    "training.checkpoint_every=4", "training.samples_every=0", "training.kl_weight=0.1", "image_size=16",
    "perceptual=shipped:digits-teacher",
]  # fmt: skip


def quiet(*_: object) -> None:
    pass


def on(workers: int, out: Path, prepare: Callable[[Any], Train], words: list[str]) -> dict[str, Any]:
    """Train with that many workers; one is this process."""
    names = {tune_decoder.prepared: "tune-decoder", train_teacher.prepared: "train-teacher"}
    name = names.get(prepare, "train-prior")
    command = BY_NAME[name].compose([f"out={out}", f"workers={workers}", *words])
    read = read_images(command)
    if workers == 1:
        torch.set_num_threads(1)
        return prepare(command)(read.open(), Alone(), quiet)
    return fit_job(name, Job(prepare, command, read), TrainerResources(workers, num_cpus=0.4), quiet)


def assert_same(one: Path, other: Path, *parts: str) -> None:
    """All weights to 1e-5."""
    for part in parts:
        file = f"{part}/diffusion_pytorch_model.safetensors"
        a, b = load_file(one / file), load_file(other / file)
        assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-5, part


def test_parts_are_the_batch_and_their_means_its_mean() -> None:
    batch = torch.arange(11.0)
    parts = [Part(11, Ranks(rank, 4)) for rank in range(4)]
    assert sorted(torch.cat([part.of(batch) for part in parts]).tolist()) == batch.tolist()
    assert sum(float(part.of(batch).mean()) * part.share for part in parts) == pytest.approx(float(batch.mean()))
    alone = Part(11, Alone())
    assert alone.share == 1.0 and torch.equal(alone.of(batch), batch)
    check_parts(100, 11, 4, "training.batch")
    for images, size in ((100, 3), (3, 100)):
        with pytest.raises(ValueError, match=r"workers=4: a step has 3 images \(training.batch="):
            check_parts(images, size, 4, "training.batch")


def test_workers_without_room_are_refused_in_words() -> None:
    two = TrainerResources(2, num_cpus=2.0)
    check_room(two, [{"CPU": 2.0}, {"CPU": 3.0}])
    with pytest.raises(ValueError, match=r"workers=2: each takes 2 CPUs .* Ray has 3 CPUs and 0 GPUs\. Give fewer"):
        check_room(two, [{"CPU": 3.0}])
    with pytest.raises(ValueError, match="1 CPUs and 1 GPU "):
        check_room(TrainerResources(2, num_gpus=1.0), [{"CPU": 4.0, "GPU": 1.0}])


@pytest.mark.parametrize(
    "words, said",
    [(["workers=0"], "expected 1 or more"), (["address=auto"], "no effect with workers=1")],
)
def test_keys_that_cannot_work_are_refused(words: list[str], said: str) -> None:
    for name in ("train-prior", "train-teacher", "tune-decoder"):
        with pytest.raises(ValueError, match=said):
            BY_NAME[name].compose(words)


def test_workers_need_not_stand_where_the_command_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    words = {"train-teacher": "through", "train-prior": "judge", "tune-decoder": "source"}
    for name, key in words.items():
        command = BY_NAME[name].compose(["out=made", f"{key}=there", "workers=2"])
        found = with_whole_paths(command)
        assert (found.out, getattr(found, key)) == (str(tmp_path / "made"), str(tmp_path / "there"))
        assert getattr(with_whole_paths(found), key) == getattr(found, key)
    shipped = with_whole_paths(BY_NAME["train-teacher"].compose(["through=shipped:digits-prior", "workers=2"]))
    assert shipped.through == "shipped:digits-prior"
    read = read_images(BY_NAME["train-teacher"].compose(["out=made"]))
    monkeypatch.chdir("/")
    assert len(pickle.loads(pickle.dumps(read)).open().images) == len(read.open().images) > 0


def test_images_that_a_node_does_not_see_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.pixels is not to be seen from the node .* every node sees"):
        ReadImages(["a"], ImageFile(tmp_path / "train", {}), None).open()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_two_ranks_train_the_prior_that_one_process_trains(tmp_path: Path) -> None:
    alone = on(1, tmp_path / "one", train_prior.prepared, TINY)
    record = on(2, tmp_path / "two", train_prior.prepared, TINY)
    assert_same(tmp_path / "one", tmp_path / "two", "vae", "unet")
    assert record["workers"] == 2 and "workers" not in alone
    assert json.loads((tmp_path / "two/ddoq_prior.json").read_text())["training"] == record
    for key in ("autoencoder_losses", "denoiser_losses"):
        assert record[key] == pytest.approx(alone[key], rel=1e-5)
    assert not (tmp_path / "two.training/checkpoint.pt").exists()


def dies_once(command: Any) -> Train:
    """As train-prior, with a rank that dies after the denoiser's first checkpoint."""
    trained = train_prior.prepared(command)
    mark = Path(command.out).with_name("died")

    def dying(data: Any, ranks: Any, on_progress: Any) -> dict[str, Any]:
        sums = iter(range(1, 10**6))

        class Dying(Ranks):
            def add_up(self, tensors: Sequence[Any]) -> None:
                # Two sums a step: this is in the eleventh, the denoiser's fifth.
                if next(sums) == 22 and self.rank == 1 and not mark.exists():
                    mark.touch()
                    os._exit(1)
                super().add_up(tensors)

        return trained(data, Dying(ranks.rank, ranks.world, ranks.device), on_progress)

    return dying


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_four_ranks_and_a_death_make_the_same_prior_and_decoder(tmp_path: Path) -> None:
    on(1, tmp_path / "one", train_prior.prepared, TINY)
    on(4, tmp_path / "four", dies_once, TINY)
    assert (tmp_path / "died").exists()
    assert_same(tmp_path / "one", tmp_path / "four", "vae", "unet")
    words = [
        f"source={tmp_path / 'one'}", "perceptual=shipped:digits-teacher", "training.steps=6", "training.batch=9",
        "training.lr=1e-5",
    ]  # fmt: skip
    for workers in (1, 4):
        on(workers, tmp_path / f"tuned-{workers}", tune_decoder.prepared, words)
    assert_same(tmp_path / "tuned-1", tmp_path / "tuned-4", "vae")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_ranks_train_the_teacher_that_one_process_trains(tmp_path: Path) -> None:
    """A ConvNet, whose norm is of one image, with mixed and augmented views; batches that ranks do not divide."""
    words = [
        "image_size=16", "training.arch=convnet3-w8", "training.epochs=1", "training.batch=250", "training.cutmix=true",
        "training.mixup=0.3", "training.augment=trivialaugment", "training.optimizer=sgd", "training.lr=0.01",
        "training.dtype=float32", "training.ema=0.5",
    ]  # fmt: skip
    records = {w: on(w, tmp_path / str(w), train_teacher.prepared, words) for w in (1, 2, 4)}
    for workers in (2, 4):
        a, b = (load_file(tmp_path / str(w) / "model.safetensors") for w in (1, workers))
        assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-5
        assert records[workers]["loss"] == pytest.approx(records[1]["loss"], rel=1e-5)
        assert records[workers]["workers"] == workers
        assert not (tmp_path / f"{workers}.training/checkpoint.pt").exists()
