"""A student's own loop against the same student fed one batch that never changes: what the input path costs.

    python -m benchmarks.train --json benchmarks/results/train.json

`steps_per_s`: `StudentTraining.train_epoch`, which is what a training worker calls: an order of the epoch, seeded
crops, flips and CutMix cut from uint8 images, stored labels decoded as `labels.mode=auto` stores them for a teacher of
512 features (logits up to 258 classes, else features), weights, the loss. `resident_steps_per_s`: forward pass, loss,
backward pass and step of the same student in the same arithmetic on one random batch that lies on the device with its
answers. Both take short turns, one after the other; rates are medians, and `ratio_to_resident` is the median ratio of
neighbouring turns, since a machine that others use changes its pace within a minute. `cpu_ratio` is the same by the
process's own seconds of processor. `kept`: where the images are (on the device, in host memory, in a file of
this machine), by the classes that the stage uses. Needs no Ray. On a GPU the students are those of ImageNet; on a
processor small ones.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.provenance import finish, parser
from ddoq_ray.config.cluster import TrainerResources
from ddoq_ray.config.training import ProtocolConfig, StudentConfig
from ddoq_ray.core.labels import choose_codec, make_codec
from ddoq_ray.core.losses import weighted_kl
from ddoq_ray.data.pixel_rows import FileRows, MemoryRows
from ddoq_ray.models.protocol_views import view_spec
from ddoq_ray.models.training.course import arithmetic
from ddoq_ray.models.training.images import Gathered, Images, Resident
from ddoq_ray.models.training.student import StoredTargets, StudentTraining, build_student

FEATURES = 512  # of the teacher, as ResNet-18's
PROTOCOL = ProtocolConfig(temperature=20.0, min_scale=0.08, flip=True, lr=1e-3)
COLUMNS = ["student", "size", "batch", "images", "students", "precision", "kept", "steps_per_s", "resident_steps_per_s",
           "ratio_to_resident", "cpu_ratio"]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A student with the images that it trains on.

    Attributes:
        arch, size: Of the student.
        stored: Side of the images that views are cut from.
        images, classes, batch: How many.
        precision: Of the forward and backward pass.
        kept: device, host or file.
        epochs: Of a student, times those that are asked for; of a small set as many as are rendered at once, and more.
        students: Of a turn, which see the same views one after another, as those of all seeds do.
    """

    arch: str
    size: int
    stored: int
    images: int
    classes: int
    batch: int
    precision: str = "float32"
    kept: str = "device"
    epochs: int = 1
    students: int = 1


SMALL = (
    Case("convnet3-w8", 16, 16, 50, 10, 50, epochs=270),  # the main job's
    Case("convnet3-w8", 16, 16, 50, 10, 50, epochs=54, students=10),
    Case("convnet3-w8", 16, 16, 1000, 10, 50),
    Case("convnet3-w8", 16, 16, 1000, 10, 50, epochs=2, students=10),
    Case("convnet3-w32", 16, 16, 1000, 10, 50),
    Case("convnet3", 32, 32, 1000, 10, 100),
    Case("convnet3", 32, 32, 1000, 10, 100, kept="file"),
    Case("resnet18-small-w16", 32, 32, 500, 100, 50),
    Case("resnet18", 64, 72, 200, 200, 20),
)
LARGE = (
    *(
        Case(arch, 224, 256, 10_000, 1000, 256, precision)
        for arch in ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "swin_t")
        for precision in ("float32", "bfloat16")
    ),
    Case("resnet18", 224, 256, 10_000, 1000, 256, "bfloat16", "host"),
    Case("resnet18", 224, 256, 10_000, 1000, 256, "bfloat16", "file"),
    Case("convnet3", 32, 32, 50_000, 100, 256, "bfloat16"),
)
TINY = (Case("convnet3-w8", 8, 8, 20, 3, 8), Case("convnet3-w8", 8, 8, 20, 3, 8, "bfloat16", "file"))


def keep(case: Case, folder: str, device: torch.device) -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (case.images, 3, case.stored, case.stored), dtype=np.uint8)
    if case.kept == "device":
        return Resident(torch.from_numpy(pixels).to(device))
    if case.kept == "host":
        return Gathered(MemoryRows(pixels), device)
    rows = FileRows(str(Path(folder) / "pixels"), (case.images, 3, case.stored, case.stored))
    for row, picture in enumerate(pixels):
        rows.put(row, picture.transpose(1, 2, 0))
    return Gathered(rows, device)


def training_of(case: Case, images: Images, device: torch.device) -> StudentTraining:
    how = TrainerResources(precision=case.precision, channels_last=device.type == "cuda")  # type: ignore[arg-type]
    model = build_student(StudentConfig(case.arch, case.size), case.classes, seed=0).to(device)
    protocol = replace(PROTOCOL, batch=case.batch)
    weights = torch.ones(case.images, device=device)
    return StudentTraining(
        model, model, images, weights, protocol, view_spec(protocol, case.size), seed=0, view_seed=0, how=how
    )


def stored_labels(case: Case, device: torch.device) -> StoredTargets:
    """A packed row an image, decoded as stored labels are; of the codec that `labels.mode=auto` takes."""
    head = torch.nn.Linear(FEATURES, case.classes, device=device).requires_grad_(False)
    codec = make_codec(choose_codec(case.classes, FEATURES), case.classes, FEATURES)
    features = torch.from_numpy(np.random.default_rng(1).random((case.images, FEATURES), dtype=np.float32))
    packed = codec.encode(features if codec.packs_features else head(features.to(device)))
    return StoredTargets(lambda index: codec.decode(packed[index], head, device=device))


def resident_steps(made: StudentTraining, case: Case, device: torch.device) -> Callable[[int], None]:
    """Steps of the student on a batch that never changes."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(case.batch, 3, case.size, case.size, generator=generator).to(device)
    if made.how.channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    answers = torch.randn(case.batch, case.classes, generator=generator).to(device)
    weights = torch.ones(case.batch, device=device)

    def steps(count: int) -> None:
        made.model.train()
        for _ in range(count):
            with arithmetic(device, case.precision):
                logits = made.model(pixels)
            loss = weighted_kl(logits, answers, weights, PROTOCOL.temperature)
            made.optimizer.zero_grad()
            loss.backward()
            made.optimizer.step()

    return steps


def measure(case: Case, device: torch.device, turns: int, epochs: int) -> dict[str, Any]:
    """One row."""
    whole = case.images // case.batch * case.batch  # no batch that is smaller than the resident one
    case = replace(case, images=whole)
    with tempfile.TemporaryDirectory() as folder:
        made = training_of(case, keep(case, folder, device), device)
        targets = stored_labels(case, device)
        steps = case.students * epochs * case.epochs * whole // case.batch
        resident = resident_steps(made, case, device)

        def real(count: int) -> None:
            begun = made.epoch
            for number in range(count * case.batch // whole):
                if number % (epochs * case.epochs) == 0:  # the next student sees what the first one saw
                    made.epoch = begun
                made.train_epoch(1e-3, targets)

        rates: dict[str, list[float]] = {"steps_per_s": [], "resident_steps_per_s": []}
        spent: dict[str, list[float]] = {name: [] for name in rates}
        for turn in range(turns + 1):
            for name, run in (("steps_per_s", real), ("resident_steps_per_s", resident)):
                if isinstance(made.images, Resident):
                    made.images = Resident(made.images.images)  # of which no student has seen a view
                start, begun = time.perf_counter(), time.process_time()
                run(steps)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn:  # the first one warms up
                    rates[name].append(steps / (time.perf_counter() - start))
                    spent[name].append(time.process_time() - begun)
    found = {name: statistics.median(seen) for name, seen in rates.items()}
    paired = [real / still for real, still in zip(*rates.values(), strict=True)]
    cpu = [still / real for real, still in zip(*spent.values(), strict=True)]
    return {
        "student": case.arch, "size": case.size, "batch": case.batch, "images": case.images, "students": case.students,
        "precision": case.precision, "kept": case.kept,
        **found, "ratio_to_resident": statistics.median(paired), "cpu_ratio": statistics.median(cpu),
        "device": device.type, "turns": turns, "steps_a_turn": steps, "threads": torch.get_num_threads(),
    }  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=11, help="measured turns of each, after one that warms up")
    options.add_argument("--epochs", type=int, default=1, help="epochs of a turn")
    options.add_argument("--threads", type=int, default=1, help="torch threads, on a processor")
    options.add_argument("--cpu", action="store_true", help="small students on the processor, where there is a GPU too")
    options.add_argument("--tiny", action="store_true", help="students of a second, to see that it works")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    gpu = torch.cuda.is_available() and not given.cpu
    device = torch.device("cuda" if gpu else "cpu")
    cases = TINY if given.tiny else LARGE if gpu else SMALL
    finish([measure(case, device, given.turns, given.epochs) for case in cases], COLUMNS, given.json)


if __name__ == "__main__":
    main()
