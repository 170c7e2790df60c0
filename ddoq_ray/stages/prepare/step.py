"""prepare: labelled images become WebDataset shards with an index and a class list that both networks know.

Writes ``data/source-classes.json`` (the class list as given), ``data/classes.json`` (with each class's place in the
prior and the teacher), ``data/shards.json`` (what each training shard holds) and ``data/val-shards.json``. Shards of
the user's own are read where they are; any other collection is packed into ``data/train`` and ``data/val``, each
with a classes.json of its own, so that other runs can read them.
"""

from __future__ import annotations

import dataclasses
import posixpath
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddoq_ray.config import RunConfig
from ddoq_ray.core.rng import philox
from ddoq_ray.data.collections import DIGIT_NAMES, digits, kind_of, open_source, places_of
from ddoq_ray.data.samples import encode_png, list_shards, read_classes
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.execution.workers import Events, say
from ddoq_ray.stages.prepare.given_shards import check_unchanged, index_all, publish_damage, survey_shards
from ddoq_ray.stages.prepare.pack import make_plans, pack, survey_source
from ddoq_ray.stages.step import Ask, Step
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact, Status
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.prepared import Data, Packed, summary, summary_lines
from ddoq_ray.storage.records import ClassInfo, ShardInfo, shard_lines

DIGIT_SHARDS = {"train": 4, "selection": 1, "val": 1}


def digit_shards() -> dict[str, list[bytes]]:
    """The digits as tar shards: split -> shards; class-sorted, shuffled by a fixed key within each class."""
    shards: dict[str, list[bytes]] = {}
    for split, (images, class_ids) in digits().items():
        order = philox("digits", split).permutation(len(images))
        order = order[np.argsort(class_ids[order], kind="stable")]
        tars = []
        for part in np.array_split(order, DIGIT_SHARDS[split]):
            members = []
            for i in part:
                key = f"{split}-{i:06d}"
                members += [(f"{key}.png", encode_png(images[i])), (f"{key}.cls", str(class_ids[i]).encode())]
            tars.append(write_tar(members))
        shards[split] = tars
    return shards


@dataclass(frozen=True)
class Prepare(Step):
    """The shards, their index and the class list."""

    stage = name = "prepare"

    @property
    def place(self) -> str:
        return layout.DATA

    def settings(self, config: RunConfig) -> dict[str, Any]:
        """What the prepared data follows from.

        Raises:
            ValueError: When the kind of the collection is ambiguous.
        """
        d = config.dataset
        facts = {"source": d.source, "path": d.path, "val_path": d.val_path, "classes": d.classes}
        kind = kind_of(d)
        if kind in ("digits", "webdataset") and not d.resort:
            return {"dataset": facts | {"source": None if d.path else d.source}}
        packed = {"seed": config.seed, "shard_samples": d.shard_samples, "shard_mb": d.shard_mb}
        given = {"torchvision": d.torchvision, "label_column": d.label_column, "heldout": d.heldout, "resort": d.resort}
        given |= {"image_column": d.image_column}
        return {"dataset": facts | {"source": kind} | packed | {key: value for key, value in given.items() if value}}

    def asks(self, config: RunConfig) -> list[Ask]:
        return [Ask("task that reads the data", 1, 1.0)]

    def wanted(self, config: RunConfig) -> bool:
        return True  # every stage needs the index of the data; making it is cheap, and a finished one is reused


def run(config: RunConfig, run_dir: Folder, events: Events) -> Data:
    """Prepare, or reuse what is prepared. The classes' places in the networks are `mapping.resolve`'s to find.

    Raises:
        ValueError: For missing or empty data, or labels that do not fit the class list.
    """
    start = time.time()
    artifact, facts = Prepare().artifact(run_dir), Prepare().settings(config)
    data = artifact.folder
    if _status(config, artifact, facts) == "done":
        _take_class_list(config, data)
        data_there = Data.load(run_dir)
        check_unchanged(data_there)
        _check_validation(config, bool(data_there.val))
        return data_there
    # The user's data is looked through before anything is written or removed: a wrong path must leave no begun
    # stage behind, which would refuse the right one.
    source = open_source(config.dataset)
    packed, plans, survey = None, None, None
    if source is not None:
        survey = survey_source(source, places_of(config.dataset))
        for note in survey.notes:
            say(f"prepare    {note}")
        plans = make_plans(config, survey)
        _check_validation(config, len(plans) > 1)
    elif config.dataset.path is not None:
        packed = survey_shards(config, _class_list(config))
        _check_validation(config, bool(packed.val))
    artifact.begin(facts, overwrite=config.overwrite)
    if source is not None:
        assert survey is not None and plans is not None
        packed = pack(config, source, survey, plans, run_dir)
    elif packed is None:
        packed = _write_digits(run_dir)
    rows = [c.to_json() for c in packed.classes]
    if source is not None or config.dataset.path is None:
        for split, shards in (("train", packed.train), ("val", packed.val)):
            if shards:  # beside the shards, where another run's dataset.path looks for it
                data.publish_json(f"{split}/{layout.CLASSES}", rows)
    data.publish_json(layout.SOURCE_CLASSES, rows)
    for name, shards in ((layout.SHARDS, packed.train), (layout.VAL_SHARDS, packed.val)):
        with data.writing(name) as f:
            f.writelines(shard_lines(_relative(s, run_dir) for s in shards))
    counted = summary(packed)
    samples = counted["train"]["images"]
    artifact.finish(
        facts,
        seconds=round(time.time() - start, 3),
        items=samples,
        unit="images",
        bytes=counted["train"]["bytes"],
        shards=len(packed.train),
        classes=len(packed.classes),
        summary=counted,
    )
    events.add("stage finished", stage="prepare", images=samples)
    publish_damage(data, packed)
    for line in (*packed.told, *summary_lines(counted, data.path(layout.QUARANTINE))):
        say(line)
    return Data.load(run_dir)


def _check_validation(config: RunConfig, there: bool) -> None:
    needing = [s for s in ("label", "train", "evaluate") if s in config.stages]
    if needing and not there:
        raise ValueError(
            f"the data has no validation images, and {', '.join(needing)} need some: hold some out of a collection "
            "that is packed (dataset.heldout=0.1), give dataset.val_path, or leave those stages out "
            "(stages=[prepare,encode,quantize,synthesize])"
        )


def check_small_classes(config: RunConfig, counts: dict[int, int], classes: Sequence[ClassInfo]) -> None:
    """Refuse classes below `ipc` before hours of encoding, unless `small_class` says what to do with them."""
    most = max((spec.tiles, spec.name) for spec in config.specs)  # whose image takes most real ones
    least = config.ipc * most[0]
    small = [(c, counts.get(c.class_id, 0)) for c in classes if counts.get(c.class_id, 0) < least]
    if small and config.small_class == "error":
        shown = ", ".join(f"{c.class_id} ({c.name}): {n}" for c, n in small[:5])
        raise ValueError(
            f"{len(small)} of {len(classes)} classes have fewer images than ipc={config.ipc}"
            + (f" times the {most[0]} centroids of an image of {most[1]}" if most[0] > 1 else "")
            + f": {shown}"
            f"{', ...' if len(small) > 5 else ''}; choose a smaller ipc, small_class=cap (as many centroids as images) "
            "or small_class=drop (leave them out)"
        )
    if config.small_class == "drop" and len(small) == len(classes):
        raise ValueError(f"small_class=drop would leave no class: none has {least} images")


def _status(config: RunConfig, artifact: Artifact, facts: dict) -> Status:
    """`done` when the prepared data is there and its class list is still the one given; write nothing."""
    try:
        status = artifact.check(facts)
        if status == "done" and _gives_class_list(config):
            before = [row["name"] for row in artifact.folder.read_json(layout.SOURCE_CLASSES)]
            now = [c.name for c in _class_list(config)]
            if before != now:
                raise ValueError(
                    f"{artifact.folder.uri} was prepared with another class list ({_shown(before)}; "
                    f"now {_shown(now)}); use another run_dir, or overwrite=true"
                )
    except ValueError:
        if not config.overwrite:
            raise
        return "new"
    return status


def _shown(names: Sequence[str]) -> str:
    return f"{len(names)} classes: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"


def _take_class_list(config: RunConfig, data: Folder) -> None:
    """Places in the networks and prompts may be mended in classes.json after prepare: take them as they are now."""
    if _gives_class_list(config):
        rows = [c.to_json() for c in _class_list(config)]
        if rows != data.read_json(layout.SOURCE_CLASSES):
            data.publish_json(layout.SOURCE_CLASSES, rows)
            Artifact(data, Prepare.name).amend(layout.SOURCE_CLASSES)


def _relative(shard: ShardInfo, run_dir: Folder) -> ShardInfo:
    prefix = run_dir.uri + "/"
    return dataclasses.replace(shard, path=shard.path.removeprefix(prefix))


def _gives_class_list(config: RunConfig) -> bool:
    """Whether the class list is a file of the user's own, which may change."""
    in_place = kind_of(config.dataset) == "webdataset" and not config.dataset.resort
    return in_place or config.dataset.classes is not None


def _class_list(config: RunConfig) -> list[ClassInfo]:
    if config.dataset.classes is not None:
        return read_classes(config.dataset.classes)
    shards = list_shards(str(config.dataset.path), key="dataset.path")
    return read_classes(posixpath.join(posixpath.dirname(shards[0]), "classes.json"))


def _write_digits(run_dir: Folder) -> Packed:
    """Publish the built-in source's shards."""
    data = run_dir / layout.DATA
    for split, tars in digit_shards().items():
        for i, tar in enumerate(tars):
            data.publish(f"{split}/{split}-{i:06d}.tar", tar)
    classes = [ClassInfo(i, name, f"a scanned handwritten digit {name}") for i, name in enumerate(DIGIT_NAMES)]
    train, val = (
        [
            dataclasses.replace(shard, sha256=data.digest(shard.path.removeprefix(f"{data.uri}/"))[0])
            for shard in index_all([data.path(n) for n in data.names(f"{split}/*.tar")], len(classes))
        ]
        for split in ("train", "val")
    )
    return Packed(classes, train, val)
