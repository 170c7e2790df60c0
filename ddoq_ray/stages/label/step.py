"""label: a pool of teacher actors stores soft labels of seeded views (FKD), and the teacher is checked first.

The view of an image at an epoch is a pure function of (seed, epoch, image_id), so a label needs no stored crop, and
the student finds the same view whatever its batch. The unit is (image shard, range of epochs).
"""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.core.labels import choose_codec, make_codec
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.pool import run_elastic
from ddoq_ray.execution.workers import Events, Progress, say
from ddoq_ray.stages.evaluate.validation import check_refused, teacher_columns
from ddoq_ray.stages.label.teacher import LabelUnit, for_teacher, spawner, view_spec
from ddoq_ray.stages.label.teacher_check import check_teacher
from ddoq_ray.stages.prepare.step import Data
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.records import binary_rows

__all__ = ["for_teacher", "identity", "read_labels", "run", "view_spec"]


def codec_name(config: RunConfig, networks: Networks) -> str:
    if config.labels.mode == "auto":
        return choose_codec(networks.teacher_outputs, networks.feature_dim)
    return config.labels.mode


def identity(config: RunConfig) -> dict[str, Any]:
    views = {k: plain(config.protocol)[k] for k in ("epochs", "steps", "min_scale", "flip", "cutmix")}
    if config.protocol.steps is not None:
        views["batch"] = config.protocol.batch  # decides how many epochs the steps are
    size = config.student.image_size
    # A crop's pixels are those of the picture it is cut from; pictures of unlike sizes are kept at this one.
    views["stored"] = config.protocol.stored_side(size)
    return {"views": views, "size": size, "seed": config.seed, "teacher_batch": config.teacher.batch}


def run(
    config: RunConfig,
    run_folder: Folder,
    folders: list[str],
    data: Data,
    events: Events,
    networks: Networks,
    *,
    teacher: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Check the teacher, then label every image set in `folders` (relative to the run; "" is the run's own).

    With `labels.mode=online` only the check is done; the teacher labels while students train.

    Args:
        teacher: What the check of this run found, where it was done before.
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
        teacher = teacher or check_teacher(config, run_folder, data, networks, events)
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
                outputs=networks.teacher_outputs,
                teacher_index=list(teacher_columns(data)),
                shards=[{"name": s["name"], "images": s["images"]} for s in sources[f]["shards"]],
                teacher=teacher,
                digest=digest_of(facts[f]),
                environment=networks.environment,
            )
        events.add("stage finished", stage="label", views=total)
    return [artifacts[f].require() for f in folders]


def check_scored(config: RunConfig, run_folder: Folder, label: dict[str, Any]) -> None:
    """Before students train on labels that were made before: were enough validation images scored for this run?

    Raises:
        ValueError: More were refused than `max_bad_fraction` says now.
    """
    facts = label["teacher"]
    check_refused(config, run_folder, facts["images"], facts.get("refused", 0), facts.get("reasons", ""))


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
    spawn = spawner(config, run_folder, codec)
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
    """Units of the epochs that are not published yet, each known by its own file: a run may resume in other units."""
    units = []
    for folder, manifest in sources.items():
        offset = 0
        epochs = config.protocol.epochs_for(manifest["items"])
        names = [shard["name"] for shard in manifest["shards"]]
        published = _published(run_folder / folder / "labels", names, epochs)
        for shard, there in zip(manifest["shards"], published, strict=True):
            for first, last in _runs(np.flatnonzero(~there).tolist(), config.labels.epochs_per_unit):
                units.append(LabelUnit(folder, shard["name"], offset, shard["images"], first, last))
            offset += shard["images"]
    return units


def _published(labels: Folder, shards: list[str], epochs: int) -> npt.NDArray[np.bool_]:
    """bool [image shards, epochs]: which files are there. Listed an epoch at a time: there may be millions in all."""
    place = {f"{name}.parquet": i for i, name in enumerate(shards)}
    found = np.zeros((len(shards), epochs), bool)
    for folder in labels.names("epoch-*"):
        epoch = int(folder.removeprefix("epoch-"))
        if epoch < epochs:
            there = (place.get(name.rpartition("/")[2]) for name in labels.names(f"{folder}/*.parquet"))
            found[[i for i in there if i is not None], epoch] = True
    return found


def _runs(numbers: list[int], longest: int) -> list[tuple[int, int]]:
    """Ascending numbers as runs first..last-1 without a gap, none longer than `longest`."""
    runs: list[tuple[int, int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n and n - runs[-1][0] < longest:
            runs[-1] = (runs[-1][0], n + 1)
        else:
            runs.append((n, n + 1))
    return runs


def read_labels(labels: Folder, epoch: int) -> np.ndarray:
    """uint8 [N, nbytes]: the stored labels of an epoch, in image order.

    Raises:
        ValueError: When labels of the epoch, or of an image shard in it, are missing or damaged.
    """
    parts, offset = [], 0
    for shard in Artifact(labels, "label").require()["shards"]:
        parts.append(_read_part(labels, epoch, shard["name"], offset, shard["images"]))
        offset += shard["images"]
    return np.concatenate(parts)


def _read_part(labels: Folder, epoch: int, shard: str, offset: int, images: int) -> np.ndarray:
    name = f"epoch-{epoch:04d}/{shard}.parquet"
    mend = f"remove {labels.path('manifest.json')} and run the label stage again, which makes what is missing"
    try:
        table = pq.read_table(io.BytesIO(labels.read(name)), page_checksum_verification=True)
    except FileNotFoundError:
        raise ValueError(
            f"{labels.path(name)} is missing: there are no labels of epoch {epoch} for {shard}; {mend}"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{labels.path(name)} is damaged ({str(error).splitlines()[0]}); remove it, {mend}") from error
    if not np.array_equal(table["image_id"].to_numpy(), np.arange(offset, offset + images)):
        raise ValueError(
            f"{labels.path(name)} holds labels of {table.num_rows} images, and not those of images {offset} to "
            f"{offset + images - 1} in their order; remove it, {mend}"
        )
    return binary_rows(table["label"], "u1")
