"""Students: what ranks agree on, what resumes, what diverges, what fails and in whose words."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from support import ranks
from support.students import EPOCHS, IMAGES, Apart, small_job

from ddoq_ray.config.cluster import TrainerResources
from ddoq_ray.core.labels import CODECS, make_codec
from ddoq_ray.data.soft_labels import SoftLabels, load_head
from ddoq_ray.execution.errors import device_memory
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Events
from ddoq_ray.models.classifiers import build_classifier
from ddoq_ray.models.training.student import StudentTraining
from ddoq_ray.stages.prepare.step import Data
from ddoq_ray.stages.train import fitting
from ddoq_ray.stages.train.failures import own_words, worth_retrying
from ddoq_ray.stages.train.fitting import RECORD
from ddoq_ray.stages.train.memory import Room
from ddoq_ray.stages.train.ranks import Ranks
from ddoq_ray.stages.train.sets import Real
from ddoq_ray.stages.train.worker import Trainer
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.records import ClassInfo

ONE = Ranks(0, 1, torch.device("cpu"))


def trained(folder: Path, *keys: str, state: dict[str, Any] | None = None, **job: Any) -> dict[str, Any]:
    made = small_job(folder, *keys, **job)
    (row, facts) = made.rows[0]
    artifact = Artifact(made.run / row.folder, "train")
    Trainer(made, ONE).one_row(row, artifact, facts, state)
    return artifact.require()


# Ranks


AGREE = """
import sys, torch
from ddoq_ray.stages.train.ranks import Ranks
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
ranks = Ranks(rank, 2, torch.device("cpu"))
clock, seen = 1000.0 * (1 - rank), [rank == 0, False]  # each its own clock, and its own view of the disk
print(
    ranks.decide(lambda: clock > 60.0), ranks.decide(lambda: seen), ranks.decide(lambda: 7 if rank == 0 else None),
    ranks.mean(torch.tensor(1.0 + rank)), ranks.mean(torch.tensor(float("nan") if rank else 1.0)),
)
"""


@pytest.mark.processes
def test_two_ranks_with_unlike_clocks_and_disks_decide_alike(tmp_path: Path) -> None:
    """And where one rank's loss is not a number, it is none on the other: both stop at the same step."""
    commands = [[sys.executable, "-c", AGREE, str(rank), str(tmp_path / "meet")] for rank in (0, 1)]
    workers = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
    told = [worker.communicate(timeout=120)[0].strip() for worker in workers]
    assert told == ["True [True, False] 7 1.5 nan"] * 2


def test_a_rank_without_an_image_takes_part_with_zero_gradients(tmp_path: Path) -> None:
    """Batch norm over one image of one pixel stops; two copies of one do not, and their loss is nothing."""
    job = small_job(tmp_path, "student.arch=resnet18", "student.image_size=32", size=32)
    trainer = Trainer(job, Apart(1, 2, torch.device("cpu")))
    trainer._wrap = lambda model: model  # type: ignore[method-assign]
    student = trainer._begin(job.rows[0][0], None)
    model = student.training.model.train()
    loss = student.training.loss(np.array([3]), trainer._targets(student))
    loss.backward()
    assert float(loss.detach()) == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.processes
def test_one_two_and_four_ranks_train_and_score_the_same_student(tmp_path: Path) -> None:
    """Three epochs of eight images by five: the last batch of three has too few for three ranks, and none for one."""
    students = [ranks.train(tmp_path / str(world), world) for world in (1, 2, 4)]
    weights = [safetensors.torch.load_file(folder / "model.safetensors") for folder in students]
    curves = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in students]
    for other, curve in zip(weights[1:], curves[1:], strict=True):
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-5)
        for point, alone in zip(curve, curves[0], strict=True):
            assert (point["top1_pct"], point["top5_pct"]) == (alone["top1_pct"], alone["top5_pct"])
            assert point["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)


# What a student depends on


def test_a_checkpoint_is_used_only_by_the_row_that_wrote_it(tmp_path: Path) -> None:
    """After overwrite=true with another learning rate the folder is the same, and the student is not."""
    trainer = Trainer(small_job(tmp_path), ONE)
    state = {"identity": digest_of({"lr": 1}), "epoch": 3}
    assert trainer._resumed(state, {"lr": 1}) is state
    assert trainer._resumed(state, {"lr": 2}) is None and trainer._resumed(None, {"lr": 1}) is None
    assert trainer._resumed({"folder": "students/s-seed0", "epoch": 3}, {"lr": 1}) is None  # of an older version


@pytest.mark.parametrize("arch,size,ema", [("convnet3-w4", 8, 0.9), ("mobilenet_v2", 32, 0)])
def test_a_resumed_student_is_the_same_dropout_included(tmp_path: Path, arch: str, size: int, ema: float) -> None:
    keys = (f"student.arch={arch}", f"protocol.ema={ema}", "protocol.schedule=constant", "protocol.cutmix=false")
    trained(tmp_path / "whole", *keys, size=size)
    job = small_job(tmp_path / "cut", *keys, size=size)
    (row, facts) = job.rows[0]
    whole = (tmp_path / "whole" / row.folder / "model.safetensors").read_bytes()
    first = Trainer(job, ONE)
    student = first._begin(row, None)
    training = student.training
    for _ in range(2):
        training.train_epoch(job.config.protocol.lr, first._targets(student))
    state = {"metrics": [], **training.state()}
    torch.rand(1000)  # what another row, or another process, drew in between
    Trainer(job, ONE).one_row(row, Artifact(job.run / row.folder, "train"), facts, state)
    assert (tmp_path / "cut" / row.folder / "model.safetensors").read_bytes() == whole


def test_feature_labels_are_decoded_by_the_head_that_was_saved_with_them(tmp_path: Path) -> None:
    """No teacher is loaded: there is none at teacher.path."""
    keys = ("teacher.path=/nowhere/at/all",)
    assert not trained(tmp_path, *keys, codec="features")["diverged"]
    labels = Folder(str(tmp_path / "labels"))
    stored = SoftLabels(labels)
    rows = stored.epoch(1)[np.arange(IMAGES)]
    head = load_head(labels, stored.store.manifest["head"], "cpu")
    torch.testing.assert_close(stored.decode(rows, "cpu"), make_codec("features", 2, 6).decode(rows, head))
    data = bytearray(labels.read("head.safetensors"))
    data[-1] ^= 1
    labels.publish("head.safetensors", bytes(data))
    with pytest.raises(ValueError, match=r"head\.safetensors is damaged.*label stage"):
        SoftLabels(labels).decode(rows, "cpu")
    labels.remove("head.safetensors")
    with pytest.raises(ValueError, match=r"head\.safetensors is missing.*label stage"):
        SoftLabels(labels).decode(rows, "cpu")


def test_a_longer_training_sees_the_labelled_epochs_again(tmp_path: Path) -> None:
    """Six epochs are labelled: the seventh has the views and the labels of the first, and another order."""
    job = small_job(tmp_path, f"protocol.steps={4 * EPOCHS}")
    trainer = Trainer(job, ONE)
    student = trainer._begin(job.rows[0][0], None)
    assert student.epochs == 2 * EPOCHS
    losses = []
    for epoch in (1, 1 + EPOCHS, 2):
        student.training.epoch = epoch
        with torch.no_grad():
            losses.append(float(student.training.loss(np.arange(IMAGES), trainer._targets(student))))
    assert losses[0] == losses[1] != losses[2]


def test_views_are_cut_from_the_stored_resolution(tmp_path: Path) -> None:
    job = small_job(tmp_path, "student.image_size=8", size=8)
    assert Trainer(job, ONE).sets.get("images", Real()).images.shape == (IMAGES, 3, 8, 8)
    job = small_job(tmp_path, size=32)
    small = dataclasses.replace(job.config, student=dataclasses.replace(job.config.student, image_size=16))
    trainer = Trainer(dataclasses.replace(job, config=small), ONE)
    student = trainer._begin(job.rows[0][0], None)
    assert student.set.images.shape == (IMAGES, 3, 32, 32)
    assert student.training.loss(np.arange(4), trainer._targets(student)).isfinite()


@pytest.mark.parametrize(
    "views",
    [
        (),
        ("protocol.cutmix=false", "protocol.mixup=0.8"),
        ("protocol.shuffle_patches=2", "protocol.cutout=0.5", "weights.cutmix=mixed"),
    ],
)
@pytest.mark.parametrize("labels", ["logits", "features", "logits_int8", "online", "hard"])
def test_a_step_up_to_its_loss_on_a_gpu(tmp_path: Path, labels: str, views: tuple[str, ...]) -> None:
    """FakeTensorMode carries "cuda" through without one; it raises where two devices meet and where a value is read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if labels in CODECS:
        job = small_job(tmp_path, *views, codec=labels)
    else:
        job = small_job(tmp_path, *views, f"labels.mode={labels}")
        ((row, facts),) = job.rows
        job = dataclasses.replace(job, rows=((dataclasses.replace(row, labels=None), facts),))
    with FakeTensorMode():
        trainer = Trainer(job, Ranks(0, 1, torch.device("cuda")), room=Room(device=float("inf")))

        def on_gpu(seed: int) -> Any:  # Module.to cannot move fake parameters: they are made there
            with torch.device("cuda"):
                return build_classifier("convnet3-w4", 2, 8, seed=seed)

        trainer._student = on_gpu  # type: ignore[method-assign]
        trainer.teacher = on_gpu(1).eval()  # of online labels
        student = trainer._begin(job.rows[0][0], None)
        loss = student.training.loss(np.arange(4), trainer._targets(student))
    assert loss.device.type == "cuda" and loss.shape == ()


def test_hard_labels_need_neither_labels_nor_a_teacher(tmp_path: Path) -> None:
    keys = ("labels.mode=hard", "teacher.path=/nowhere/at/all", "protocol.cutmix=false", "protocol.min_scale=1.0")
    job = small_job(tmp_path, *keys)
    (row, facts) = job.rows[0]
    row = dataclasses.replace(row, labels=None)
    artifact = Artifact(job.run / row.folder, "train")
    Trainer(job, ONE).one_row(row, artifact, facts, None)
    losses = [json.loads(line)["train_loss"] for line in job.run.read(f"{row.folder}/metrics.jsonl").splitlines()]
    assert not artifact.require()["diverged"] and losses[-1] < losses[0]


# Students that diverge


@pytest.mark.parametrize("learning_rate", ["1e8", "1e20"])
def test_a_student_that_diverges_says_so_and_ends(tmp_path: Path, learning_rate: str) -> None:
    keys = (f"protocol.lr={learning_rate}", "protocol.schedule=constant")
    manifest = trained(tmp_path, *keys)
    folder = tmp_path / "students/s-t-p-8px-seed0"
    assert manifest["diverged"] is True and manifest["diverged_epoch"] < EPOCHS
    assert manifest["best_top1_pct"] is None and not (folder / "model.safetensors").exists()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    json.loads((folder / "manifest.json").read_text(), parse_constant=refuse)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_student_that_breaks_at_its_last_step_has_diverged_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss was taken of the weights that the last step left."""
    job = small_job(tmp_path, "protocol.steps=2")
    trainer = Trainer(job, ONE)
    epoch = StudentTraining.train_epoch

    def breaks(training: StudentTraining, *asked: Any) -> float:
        loss = epoch(training, *asked)
        training.model.head.bias.data[0] = float("inf")
        return loss

    monkeypatch.setattr(StudentTraining, "train_epoch", breaks)
    (row, facts) = job.rows[0]
    artifact = Artifact(job.run / row.folder, "train")
    trainer.one_row(row, artifact, facts, None)
    assert artifact.require()["diverged"] is True


# Failures


def test_what_is_tried_again_and_in_whose_words_it_fails() -> None:
    ours, dead, bug = ValueError("mend this"), RayActorError(), KeyError("x")
    broken, small = RuntimeError("Connection closed by peer"), torch.OutOfMemoryError("CUDA out of memory")
    cases: list[tuple[dict[int, Exception], int, str | None, bool]] = [
        ({0: ours}, 1, "mend this", False),
        ({0: broken, 1: ours}, 2, "mend this", False),
        ({0: dead}, 1, None, True),
        ({0: broken, 1: dead}, 2, None, True),
        ({0: broken}, 2, None, True),  # the other rank's death is not seen yet
        ({0: broken}, 1, None, False),
        ({0: bug}, 1, None, False),
        ({0: bug, 1: broken}, 2, None, False),
        ({0: broken, 1: small}, 2, device_memory(small), False),
    ]
    for found, workers, words, again in cases:
        error = WorkerGroupError("", found)
        assert (own_words(error), worth_retrying(error, workers)) == (words, again), found
    assert own_words(ControllerError(ours)) == "mend this" and not worth_retrying(ControllerError(ours), 1)
    assert own_words(RayActorError()) is None and worth_retrying(RayActorError(), 1)  # Ray Train's own controller died


class Dies:
    """Ray Train where the workers of each attempt die, with so much reached before."""

    def __init__(self, folder: Folder, reached: list[bytes]) -> None:
        self.folder, self.reached = folder, list(reached)

    def fit(self) -> None:
        if not self.reached:
            return
        if record := self.reached.pop(0):
            self.folder.publish(RECORD, record)
        raise WorkerGroupError("", {0: RayActorError()})


@pytest.mark.parametrize(
    "reached, told",
    [
        ([b""] * 3, [1, 2, 3]),
        ([b"1", b"1", b"1"], [1, 2, 3]),
        ([b"1", b"1", b"2", b"2", b"3", b"3", b"4"], [1, 2, 1, 2, 1, 2, 1]),  # days on nodes that may vanish
    ],
)
def test_only_deaths_between_checkpoints_count_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reached: list[bytes], told: list[int]
) -> None:
    folder, deaths = Folder(str(tmp_path)), []
    dies = Dies(folder, reached)
    monkeypatch.setattr(fitting, "_trainer", lambda *_: dies)
    fitting.fit(print, {}, TrainerResources(), folder, lambda _, count: deaths.append(count))
    assert deaths == told

    dies.reached, done = [b"5", *[b""] * 3], iter([1, 1, 1, 1])
    with pytest.raises(WorkerGroupError):
        fitting.fit(print, {}, TrainerResources(), folder, lambda *_: None, reached=lambda: next(done))
    dies.reached, done = [b"6", *[b""] * 4], iter([1, 1, 1, 2, 2])  # a short student has no checkpoint: it is done
    fitting.fit(print, {}, TrainerResources(), folder, lambda *_: None, reached=lambda: next(done))


# The driver


def test_counts_are_taken_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A property that adds up all shards, asked for once a class, is 96 minutes at ImageNet-1K's size."""
    from ddoq_ray.stages.train import step as train

    asked = []

    class Counted(Data):
        @property
        def counts(self) -> dict[int, int]:
            asked.append(1)
            return {c.class_id: 1 for c in self.classes}

    classes = tuple(ClassInfo(c, f"c{c}", f"c{c}", c) for c in range(1000))
    run = Folder(str(tmp_path))
    data = Counted(run, classes, (), ())
    networks = Networks("prior", (1,), 8, None, 1000, "teacher", "net", None, 1000, 4, {})
    job = small_job(tmp_path)
    cell = dataclasses.replace(job.rows[0][0], images=None, labels=None)
    monkeypatch.setattr(train, "_fit", lambda *_: None)
    with pytest.raises(ValueError, match="not finished"):  # nobody trained it
        train.run(Run(job.config, run, data, networks, Events(run)), [train.Train(cell, None, None)])
    assert len(asked) == 1
