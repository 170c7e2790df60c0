"""label: a pool of teacher actors stores soft labels of seeded views (FKD), and the teacher is checked first.

The view of an image at an epoch is a pure function of (seed, epoch, image_id), so a label needs no stored crop, and
the student finds the same view whatever its batch. The unit is (image shard, range of epochs).
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ddoq_ray.artifacts import Artifact, Folder, digest_of
from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.config.training import ProtocolConfig
from ddoq_ray.core.labels import choose_codec, make_codec
from ddoq_ray.core.views import ViewSpec
from ddoq_ray.distilled import load_image_arrays
from ddoq_ray.elastic import run_elastic
from ddoq_ray.records import fixed_binary, label_schema
from ddoq_ray.runtime import Events, Progress, device, pin_threads, say
from ddoq_ray.samples import load_arrays
from ddoq_ray.stages.networks import Networks
from ddoq_ray.stages.prepare import Data


@dataclass(frozen=True)
class LabelUnit:
    """Epochs first..last-1 of one image shard: rows offset..offset+images-1 of the set."""

    folder: str
    name: str
    offset: int
    images: int
    first: int
    last: int


def view_spec(protocol: ProtocolConfig, size: int) -> ViewSpec:
    """The views of a protocol; label, train and the online teacher must agree on them."""
    return ViewSpec(size=size, min_scale=protocol.min_scale, flip=protocol.flip, cutmix=protocol.cutmix)


def for_teacher(pixels: Any, size: int) -> Any:
    """A view at the teacher's own resolution; unchanged when the student's is the same."""
    import torch

    if pixels.shape[-1] == size:
        return pixels
    return torch.nn.functional.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)


def codec_name(config: RunConfig, networks: Networks) -> str:
    if config.labels.mode == "auto":
        return choose_codec(networks.teacher_outputs, networks.feature_dim)
    return config.labels.mode


@ray.remote
class Teacher:
    """Holds the teacher, and one image set at a time."""

    def __init__(self, path: str, run: Folder, config: RunConfig, codec: str) -> None:
        from ddoq_ray.models.classifiers import load_classifier

        pin_threads(config.cluster.threads)
        self.device = device()
        self.model = load_classifier(path, self.device)
        self.run_folder, self.config = run, config
        self.codec = make_codec(codec, self.model.num_classes, self.model.head.in_features)
        self.codec_name = codec
        self._set: tuple[str, Any] | None = None

    def run(self, unit: LabelUnit) -> dict[str, int]:
        """Label one unit: one file an epoch."""
        import torch

        from ddoq_ray.core.views import batch_views

        images = self._images(unit.folder)
        spec = view_spec(self.config.protocol, self.config.student.image_size)
        labels = self.run_folder / unit.folder / "labels"
        ids = np.arange(unit.offset, unit.offset + unit.images)
        total = 0
        for epoch in range(unit.first, unit.last):
            packed = []
            for first in range(0, len(ids), self.config.teacher.batch):
                index = ids[first : first + self.config.teacher.batch]
                pixels, _, _ = batch_views(images, index, spec, self.config.seed, epoch)
                with torch.inference_mode():
                    pixels = for_teacher(pixels, self.model.image_size)
                    out = self.model(pixels) if self.codec_name == "logits" else self.model.features(pixels)
                    packed.append(self.codec.encode(out))
            rows = np.concatenate(packed)
            table = pa.Table.from_arrays(
                [pa.array(ids), pa.array(np.full(len(ids), epoch, np.int32)), fixed_binary(rows)],
                schema=label_schema(self.codec_name, self.codec.nbytes),
            )
            out_file = io.BytesIO()
            pq.write_table(table, out_file, compression="NONE", use_dictionary=False, write_statistics=False)
            labels.publish(f"epoch-{epoch:04d}/{unit.name}.parquet", out_file.getvalue())
            total += len(out_file.getvalue())
        return {"labels": len(ids) * (unit.last - unit.first), "bytes": total}

    def _images(self, folder: str) -> Any:
        import torch

        if self._set is None or self._set[0] != folder:
            images = self.run_folder / folder / "images"
            shards = [images.path(n) for n in images.names("images-*.tar")]
            arrays = load_image_arrays(shards, self.config.student.image_size)
            self._set = (folder, torch.from_numpy(arrays.images).to(self.device))
        return self._set[1]

    def save_head(self, folder: str) -> None:
        """The linear head beside the features, so that a label can be decoded without the teacher."""
        import safetensors.torch

        head = {k: v.cpu().contiguous() for k, v in self.model.head.state_dict().items()}
        (self.run_folder / folder / "labels").publish("head.safetensors", safetensors.torch.save(head))

    def top1(self, shards: list[str], teacher_index: list[int]) -> tuple[float, int]:
        """(top-1 in %, images) on real images, over the classes of the data."""
        import torch

        resize = self.config.encoder.resize
        images, class_ids, _ = load_arrays(shards, self.model.image_size, len(teacher_index), resize=resize)
        correct = 0
        columns = torch.tensor(teacher_index)
        for first in range(0, len(images), self.config.teacher.batch):
            x = torch.from_numpy(images[first : first + self.config.teacher.batch]).to(self.device).float() / 255
            with torch.inference_mode():
                logits = self.model(x).cpu()[:, columns]
            correct += int((logits.argmax(1).numpy() == class_ids[first : first + len(x)]).sum())
        return 100.0 * correct / max(1, len(images)), len(images)


def _spawner(config: RunConfig, run_folder: Folder, codec: str) -> Any:
    resources = config.cluster.teacher

    def spawn() -> Any:
        return Teacher.options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus).remote(
            config.teacher.path, run_folder, config, codec
        )

    return spawn


def check_teacher(
    config: RunConfig, run_folder: Folder, data: Data, networks: Networks, events: Events
) -> dict[str, Any]:
    """Evaluate the teacher on the real validation images.

    Raises:
        ValueError: When its top-1 is below `teacher.min_top1`: labels from it would ruin every student.
    """
    actor = _spawner(config, run_folder, "logits")()
    indices = [c.teacher_index for c in data.classes]
    top1, images = ray.get(actor.top1.remote(data.val_urls, indices))
    ray.kill(actor)
    say(f"label      teacher {networks.teacher_arch}: top-1 {top1:.2f} % on {images:,} real validation images")
    events.add("teacher checked", top1_pct=top1, images=images)
    if images == 0:
        raise ValueError("no usable validation image to check the teacher on; see dataset.val_path")
    least = config.teacher.threshold(len(data.classes))
    if top1 < least:
        raise ValueError(
            f"the teacher has top-1 {top1:.2f} % on {images} real validation images, below "
            f"teacher.min_top1={least:g}. A low figure usually means a wrong class mapping "
            "(teacher_index in classes.json), other preprocessing, or a teacher of another dataset"
        )
    return {"top1_pct": top1, "images": images, "arch": networks.teacher_arch, "id": networks.teacher_id}


def identity(config: RunConfig) -> dict[str, Any]:
    views = {k: plain(config.protocol)[k] for k in ("epochs", "steps", "min_scale", "flip", "cutmix")}
    if config.protocol.steps is not None:
        views["batch"] = config.protocol.batch  # decides how many epochs the steps are
    size = config.student.image_size
    return {"views": views, "size": size, "seed": config.seed, "teacher_batch": config.teacher.batch}


def run(
    config: RunConfig, run_folder: Folder, folders: list[str], data: Data, events: Events, networks: Networks
) -> list[dict[str, Any]]:
    """Check the teacher, then label every image set in `folders` (relative to the run; "" is the run's own).

    With `labels.mode=online` only the check is done; the teacher labels while students train.
    """
    start = time.time()
    codec = codec_name(config, networks)
    artifacts = {f: Artifact(run_folder / f / "labels", "label") for f in folders}
    sources, facts = {}, {}
    for f in folders:
        sources[f] = Artifact(run_folder / f / "images", "synthesize").require()
        facts[f] = identity(config) | {"images": sources[f]["digest"], "teacher": networks.teacher_id, "codec": codec}
    todo = [f for f in folders if not artifacts[f].done(facts[f])]
    if todo:
        # Before anything is begun: labels refused for one teacher must not be in the way of the next.
        teacher = check_teacher(config, run_folder, data, networks, events)
        for f in todo:
            artifacts[f].begin(facts[f], overwrite=config.overwrite)
        made = dict.fromkeys(todo, (0, 0))
        if codec != "online":
            made |= _label(config, run_folder, {f: sources[f] for f in todo}, events, networks, codec)
        seconds = time.time() - start
        total = max(1, sum(n for n, _ in made.values()))
        for f in todo:
            artifacts[f].finish(
                facts[f],
                # The sets share the workers; a set's share of the time is its share of the views.
                seconds=round(seconds * made[f][0] / total, 3),
                items=made[f][0],
                unit="views",
                bytes=made[f][1],
                codec=codec,
                teacher=teacher,
                digest=digest_of(facts[f]),
                environment=networks.environment,
            )
        events.add("stage finished", stage="label", views=total)
    return [artifacts[f].require() for f in folders]


def _label(
    config: RunConfig,
    run_folder: Folder,
    sources: dict[str, dict[str, Any]],
    events: Events,
    networks: Networks,
    codec: str,
) -> dict[str, tuple[int, int]]:
    """Label the sets on an elastic pool: folder -> (labels, bytes)."""
    nbytes = make_codec(codec, networks.teacher_outputs, networks.feature_dim).nbytes
    say(f"label      codec {codec}: {nbytes} bytes a label")
    spawn = _spawner(config, run_folder, codec)
    if codec == "features":
        actor = spawn()
        ray.get([actor.save_head.remote(f) for f in sources])
        ray.kill(actor)
    units = _units(config, run_folder, sources)
    made = dict.fromkeys(sources, (0, 0))
    with Progress("label", sum(u.images * (u.last - u.first) for u in units), "views") as progress:
        for unit, result in run_elastic(
            spawn,
            units,
            min_workers=1,
            max_workers=config.labels.workers,
            name=lambda u: f"{u.folder}/labels/{u.name} epochs {u.first}-{u.last - 1}",
            on_event=lambda event, **f: events.add(event, stage="label", **f),
        ):
            labels, size = made[unit.folder]
            made[unit.folder] = (labels + result["labels"], size + result["bytes"])
            progress.advance(result["labels"])
    return made


def _units(config: RunConfig, run_folder: Folder, sources: dict[str, dict[str, Any]]) -> list[LabelUnit]:
    """Units that are not published yet; the last epoch's file of a unit is written last."""
    units = []
    step = config.labels.epochs_per_unit
    for folder, manifest in sources.items():
        published = set((run_folder / folder / "labels").names("epoch-*/*.parquet"))
        offset = 0
        epochs = config.protocol.epochs_for(manifest["items"])
        for shard in manifest["shards"]:
            for first in range(0, epochs, step):
                last = min(first + step, epochs)
                unit = LabelUnit(folder, shard["name"], offset, shard["images"], first, last)
                if f"epoch-{last - 1:04d}/{unit.name}.parquet" not in published:
                    units.append(unit)
            offset += shard["images"]
    return units


def read_labels(labels: Folder, epoch: int) -> np.ndarray:
    """uint8 [N, nbytes]: the stored labels of an epoch, in image order.

    Raises:
        ValueError: When an epoch is missing.
    """
    from ddoq_ray.records import binary_rows

    parts = [pq.read_table(io.BytesIO(labels.read(name))) for name in labels.names(f"epoch-{epoch:04d}/*.parquet")]
    if not parts:
        raise ValueError(f"{labels.uri} has no labels of epoch {epoch}; run the label stage with this protocol first")
    table = pa.concat_tables(parts)
    assert (np.diff(table["image_id"].to_numpy()) == 1).all(), "labels out of order"
    return binary_rows(table["label"], "u1")
