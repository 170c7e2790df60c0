"""Whether a device waits for its views: views/s beside the teacher's and the student's images/s; codecs; the pool.

    python -m benchmarks.label_rates --json benchmarks/results/label_rates.json

`views`: rendering alone, as `batch_views` does it from uint8 images on the device, with each of the ways in which a
view is changed. `teacher`: its forward pass over views that lie there. `student`: steps on one resident batch (as in
`benchmarks.train`). `encode`, `decode`: labels/s of each codec for 1,000 outputs and 512 features. `pool`: images/s of
teacher actors that label a set as the stage does, from the first finished file to the last, and of the same `Labeller`
in a bare loop (0 workers). All but the pool runs without Ray (`--no-pool`), on a GPU where there is one.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from benchmarks.provenance import finish, parser
from benchmarks.train import Case, keep, resident_steps, training_of
from ddoq_ray.core.labels import CODECS, make_codec
from ddoq_ray.core.views.params import ViewSpec
from ddoq_ray.core.views.render import batch_views
from ddoq_ray.models.classifiers import build_classifier, save_classifier
from ddoq_ray.models.labelling import Labeller
from ddoq_ray.models.training.images import Resident

COLUMNS = ["what", "size", "stored", "how", "per_s", "of_teacher"]
WAYS: dict[str, dict[str, Any]] = {
    "crop, flip": {"cutmix": False},
    "CutMix": {},
    "MixUp": {"cutmix": False, "mixup": 0.8},
    "CutMix, shuffled patches": {"patches": 2},
    "cutout": {"cutmix": False, "cutout": 0.5},
}
# (a student and its images, the teacher of its size)
SMALL = (
    (Case("convnet3-w32", 16, 16, 200, 10, 50), "convnet3-w32"),
    (Case("convnet3", 32, 32, 200, 10, 50), "resnet20-cifar"),
    (Case("resnet18", 224, 256, 40, 1000, 20), "resnet18"),
)
LARGE = (
    (Case("convnet3", 32, 32, 5000, 100, 1000), "resnet56-cifar"),
    (Case("resnet18", 224, 256, 2000, 1000, 256, "bfloat16"), "resnet18"),
)
TINY = ((Case("convnet3-w8", 8, 8, 8, 3, 4), "convnet3-w8"),)
POOL_IMAGES, POOL_EPOCHS = 200, 12


def median_seconds(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Of a call, the median of as many as fit after one that warms up."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    seen = [timed()]
    while sum(seen) < seconds:
        seen.append(timed())
    return statistics.median(seen)


def networks(case: Case, arch: str, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """The rows of views, teacher and student of one size."""
    teacher = build_classifier(arch, case.classes, case.size).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        kept = keep(case, folder, device)
    assert isinstance(kept, Resident)
    index = np.arange(case.batch)

    def views(way: str) -> torch.Tensor:
        spec = ViewSpec(size=case.size, min_scale=0.08, flip=True, **WAYS[way])
        return batch_views(kept.images, index, spec, 0, 0)[0]

    def answers() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bfloat16"):
            teacher(pixels)

    pixels = views("CutMix")
    steps = resident_steps(training_of(case, kept, device), case, device)
    taken = {("teacher", arch): median_seconds(answers, device, seconds)}
    taken[("student", case.arch)] = median_seconds(lambda: steps(1), device, seconds)
    for way in WAYS:
        taken[("views", way)] = median_seconds(lambda way=way: views(way), device, seconds)  # type: ignore[misc]
    whole = taken["teacher", arch]
    return [
        {"what": what, "size": case.size, "stored": case.stored, "how": how, "batch": case.batch,
         "precision": case.precision, "per_s": case.batch / spent, "of_teacher": whole / spent}
        for (what, how), spent in taken.items()
    ]  # fmt: skip


def codecs(device: torch.device, seconds: float, labels: int = 1000) -> list[dict[str, Any]]:
    """Labels/s of packing and unpacking."""
    head = torch.nn.Linear(512, 1000).requires_grad_(False).to(device)
    features = torch.rand(labels, 512, device=device)
    logits, rows = head(features), []
    for name in CODECS:
        codec = make_codec(name, 1000, 512)
        output = features if codec.packs_features else logits
        packed = codec.encode(output)
        calls: dict[str, Callable[[], Any]] = {
            "encode": lambda codec=codec, output=output: codec.encode(output),  # type: ignore[misc]
            "decode": lambda codec=codec, packed=packed: codec.decode(packed, head, device),  # type: ignore[misc]
        }
        for what, call in calls.items():
            rows.append({"what": what, "how": name, "per_s": labels / median_seconds(call, device, seconds)})
    return rows


def pool(images: int, epochs: int) -> list[dict[str, Any]]:
    """Images/s of the stage's teacher actors, one and two, and of a bare loop, on processors."""
    import ray

    from ddoq_ray.config.compose import load_config
    from ddoq_ray.data.image_set import NewImage, encode_picture, write_images
    from ddoq_ray.execution.pool import Elastic, run_elastic
    from ddoq_ray.models.protocol_views import view_spec
    from ddoq_ray.stages.label.images import shared_images
    from ddoq_ray.stages.label.teacher import LabelUnit, spawner
    from ddoq_ray.storage.folder import Folder
    from ddoq_ray.storage.label_grid import LabelGrid
    from ddoq_ray.storage.manifests import ImageShard

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 3, 32, 32), dtype=np.uint8)
    rates = {}
    with tempfile.TemporaryDirectory() as place:
        save_classifier(build_classifier("resnet20-cifar", 10, 32), f"{place}/teacher")
        keys = [f"teacher.path={place}/teacher", "student.image_size=32", "protocol.steps=100", "teacher.batch=50"]
        config, run = load_config(keys), Folder(f"{place}/run")
        made = [NewImage(0, i, 1 / images, "", 0, encode_picture(p.transpose(1, 2, 0))) for i, p in enumerate(pixels)]
        shards = [cast(ImageShard, write_images(run / "images", "images-000000", made))]
        spec, batch = view_spec(config.protocol, 32), config.teacher.batch
        labeller = Labeller(build_classifier("resnet20-cifar", 10, 32).eval(), "logits", spec, seed=0, batch=batch)
        start = time.perf_counter()
        for epoch in range(2):
            labeller.labels(torch.from_numpy(pixels), np.arange(images), epoch)
        rates[0] = 2 * images / (time.perf_counter() - start)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        for workers in (1, 2):
            grid = LabelGrid.of((images, epochs), 20, batch=batch, file_bytes=1 << 20, file_labels=images)
            shared = shared_images(run / "images", shards, 32, 32)
            units = [LabelUnit(f"labels-{workers}", "logits", file, grid, "", shared) for file in grid.all()]
            ends = [
                time.perf_counter()
                for _ in run_elastic(spawner(config, run), units, Elastic("label", workers, workers), name=str)
            ]
            rates[workers] = (len(ends) - workers) * images / (ends[-1] - ends[workers - 1])
        ray.shutdown()
    return [{"what": "pool", "size": 32, "stored": 32, "how": f"{w} workers", "per_s": r} for w, r in rates.items()]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    options.add_argument("--no-pool", action="store_true", help="without Ray")
    options.add_argument("--cpu", action="store_true", help="on the processor, where there is a GPU too")
    options.add_argument("--tiny", action="store_true", help="networks of a second, to see that it works")
    given = options.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() and not given.cpu else "cpu")
    cases = TINY if given.tiny else LARGE if device.type == "cuda" else SMALL
    rows = [row for case, arch in cases for row in networks(case, arch, device, given.seconds)]
    rows += codecs(device, given.seconds, 10 if given.tiny else 1000)
    if not given.no_pool:
        rows += pool(POOL_IMAGES, POOL_EPOCHS)
    finish([row | {"device": device.type} for row in rows], COLUMNS, given.json)


if __name__ == "__main__":
    main()
