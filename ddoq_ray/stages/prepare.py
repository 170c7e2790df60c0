"""prepare: labelled images become WebDataset shards with an index and a class list that both networks know.

Writes ``data/source-classes.json`` (the class list as given), ``data/classes.json`` (with each class's place in the
prior and the teacher), ``data/shards.json`` (what each training shard holds) and ``data/val-shards.json``. Shards of
the person's own are read where they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import posixpath
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import ray

from ddoq_ray.artifacts import Artifact, Folder, Status, digest_of
from ddoq_ray.config import RunConfig
from ddoq_ray.core.rng import philox
from ddoq_ray.records import ClassInfo, ShardInfo, read_shards
from ddoq_ray.runtime import Events, Progress
from ddoq_ray.samples import encode_png, index_shard, list_shards, read_classes, write_tar
from ddoq_ray.sources import DIGIT_NAMES, digits
from ddoq_ray.stages.networks import Networks

DIGIT_SHARDS = {"train": 4, "selection": 1, "val": 1}


@dataclass(frozen=True)
class Data:
    """The prepared data of a run: its class list and its shards with what they hold.

    Shard paths inside the run directory are stored relative to it, so that a run can be moved.
    """

    run: Folder
    classes: tuple[ClassInfo, ...]
    train: tuple[ShardInfo, ...]
    val: tuple[ShardInfo, ...]

    def url(self, shard: ShardInfo) -> str:
        inside = "://" not in shard.path and not posixpath.isabs(shard.path)
        return self.run.path(shard.path) if inside else shard.path

    @property
    def train_urls(self) -> list[str]:
        return [self.url(s) for s in self.train]

    @property
    def val_urls(self) -> list[str]:
        return [self.url(s) for s in self.val]

    @property
    def counts(self) -> dict[int, int]:
        """class_id -> labelled training images."""
        total: Counter[int] = Counter()
        for shard in self.train:
            total.update(shard.images)
        return {c.class_id: total[c.class_id] for c in self.classes}

    @property
    def digest(self) -> str:
        """Changes when a training shard, its place in the order, or the class list does."""
        shards = [(posixpath.basename(s.path), s.digest) for s in self.train]
        return digest_of([shards, [c.name for c in self.classes]])[:32]

    @staticmethod
    def load(run: Folder) -> Data:
        """Read the prepared data of a run.

        Raises:
            ValueError: When prepare has not finished.
        """
        folder = run / "data"
        Artifact(folder, "prepare").require()
        classes = tuple(ClassInfo(**row) for row in folder.read_json("source-classes.json"))
        train = tuple(read_shards(folder.read("shards.json")))
        val = tuple(read_shards(folder.read("val-shards.json")))
        return Data(run, classes, train, val)


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


def resolve_mapping(
    classes: Sequence[ClassInfo], field: str, network: str, names: Sequence[str] | None, num_outputs: int
) -> list[ClassInfo]:
    """Fill `teacher_index` or `prior_label` of each class: as given, else by the class's name, never by position.

    Raises:
        ValueError: When an index is outside the network's outputs, when a class cannot be found by name, or when
            two classes share an output. A wrong mapping here is the field's most common silent mistake.
    """
    by_name: dict[str, list[int]] = {}
    for i, name in enumerate(names or []):
        by_name.setdefault(name.strip().lower(), []).append(i)
    filled = []
    for info in classes:
        index = getattr(info, field)
        if index is None:
            found = by_name.get(info.name.strip().lower()) or by_name.get(info.prompt.strip().lower()) or []
            if len(found) > 1:  # ImageNet has two cranes
                raise ValueError(
                    f"class {info.class_id} ({info.name}): the {network} has {len(found)} outputs of that name "
                    f"({', '.join(map(str, found))}); give {field} for it in classes.json"
                )
            index = found[0] if found else None
        if index is None:
            known = f"it knows {', '.join(list(names)[:12])}" if names else "it has no class names"
            raise ValueError(
                f"class {info.class_id} ({info.name}) has no {field}, and the {network} has no output of that name "
                f"({known}{', ...' if names and len(names) > 12 else ''}); give {field} for each class in "
                f"classes.json, or a {network} that knows these classes"
            )
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_outputs:
            raise ValueError(
                f"class {info.class_id} ({info.name}) has {field}={index}, but the {network} has outputs 0 to "
                f"{num_outputs - 1}; mend classes.json or choose another {network}"
            )
        place: dict[str, Any] = {field: index}
        filled.append(dataclasses.replace(info, **place))
    used = Counter(getattr(c, field) for c in filled)
    twice = [i for i, n in used.items() if n > 1]
    if twice:
        names_of = [c.name for c in filled if getattr(c, field) == twice[0]]
        raise ValueError(f"classes {', '.join(names_of)} share {field}={twice[0]}; each class needs its own")
    return filled


def _index(urls: Sequence[str], num_classes: int) -> list[ShardInfo]:
    if not urls:
        return []
    task = ray.remote(num_cpus=0.5)(index_shard)
    refs = [task.remote(url, num_classes) for url in urls]
    with Progress("prepare", len(refs), "shards") as progress:
        waiting = list(refs)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1)
            try:
                ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:
                for ref in waiting:  # one answer is enough; Ray would print the others' errors
                    ray.cancel(ref)
                    with contextlib.suppress(ray.exceptions.RayError, ValueError):
                        ray.get(ref)
                raise (error.cause if isinstance(error.cause, ValueError) else error) from None
            progress.advance()
    return ray.get(refs)


def identity(config: RunConfig) -> dict:
    d = config.dataset
    source = None if d.path else d.source
    return {"dataset": {"source": source, "path": d.path, "val_path": d.val_path, "classes": d.classes}}


def run(config: RunConfig, folder: Folder, events: Events) -> Data:
    """Prepare, or reuse what is prepared. The classes' places in the networks are `resolve`'s to find.

    Raises:
        ValueError: For missing or empty data, or labels that do not fit the class list.
    """
    start = time.time()
    data = folder / "data"
    artifact = Artifact(data, "prepare")
    facts = identity(config)
    if _status(config, artifact, facts) == "done":
        _take_class_list(config, data)
        _check_unchanged(Data.load(folder))
    else:
        # The person's data is looked through before anything is written or removed: a wrong path must leave no begun
        # stage behind, which would refuse the right one.
        given = _survey(config) if config.dataset.path is not None else None
        artifact.begin(facts, overwrite=config.overwrite)
        classes, train, val = given or _write_digits(folder)
        samples = sum(s.samples for s in train)
        data.publish_json("source-classes.json", [c.to_json() for c in classes])
        data.publish_json("shards.json", [_relative(s, folder).to_json() for s in train])
        data.publish_json("val-shards.json", [_relative(s, folder).to_json() for s in val])
        artifact.finish(
            facts,
            seconds=round(time.time() - start, 3),
            items=samples,
            unit="images",
            bytes=sum(s.bytes for s in train),
            shards=len(train),
            classes=len(classes),
        )
        events.add("stage finished", stage="prepare", images=samples)
    return Data.load(folder)


def resolve(data: Data, networks: Networks) -> Data:
    """Find each class's place in the prior and (when the run needs it) the teacher; publish ``classes.json``.

    Raises:
        ValueError: When a network does not cover the classes.
    """
    classes: Sequence[ClassInfo] = data.classes
    classes = resolve_mapping(classes, "prior_label", "prior", networks.prior_classes, networks.prior_labels)
    if networks.teacher_id is not None:
        names = networks.teacher_classes
        classes = resolve_mapping(classes, "teacher_index", "teacher", names, networks.teacher_outputs)
    if networks.teacher_id is not None or not (data.run / "data").exists("classes.json"):
        (data.run / "data").publish_json("classes.json", [c.to_json() for c in classes])
    return dataclasses.replace(data, classes=tuple(classes))


def check_small_classes(config: RunConfig, counts: dict[int, int], classes: Sequence[ClassInfo]) -> None:
    """Refuse classes below `ipc` before hours of encoding, unless `small_class` says what to do with them."""
    small = [(c, counts.get(c.class_id, 0)) for c in classes if counts.get(c.class_id, 0) < config.ipc]
    if small and config.small_class == "error":
        shown = ", ".join(f"{c.class_id} ({c.name}): {n}" for c, n in small[:5])
        raise ValueError(
            f"{len(small)} of {len(classes)} classes have fewer images than ipc={config.ipc}: {shown}"
            f"{', ...' if len(small) > 5 else ''}; choose a smaller ipc, small_class=cap (as many centroids as images) "
            "or small_class=drop (leave them out)"
        )
    if config.small_class == "drop" and len(small) == len(classes):
        raise ValueError(f"small_class=drop would leave no class: none has ipc={config.ipc} images")


def _status(config: RunConfig, artifact: Artifact, facts: dict) -> Status:
    """`done` when the prepared data is there and its class list is still the one given; write nothing."""
    try:
        status = artifact.check(facts)
        if status == "done" and config.dataset.path is not None:
            before = [row["name"] for row in artifact.folder.read_json("source-classes.json")]
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


def _check_unchanged(data: Data) -> None:
    """Refuse shards that have gone or grown since they were indexed: counts and positions would be wrong."""
    for shard in (*data.train, *data.val):
        url = data.url(shard)
        fs, root = fsspec.core.url_to_fs(url)
        size = fs.size(root) if fs.exists(root) else None
        if size != shard.bytes:
            now = "is gone" if size is None else f"has {size:,} bytes"
            raise ValueError(
                f"{url} {now}, but had {shard.bytes:,} when {data.run.path('data')} was prepared; bring it back, use "
                "another run_dir, or remove data/manifest.json of this one to index the shards again"
            )


def _shown(names: Sequence[str]) -> str:
    return f"{len(names)} classes: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"


def _take_class_list(config: RunConfig, data: Folder) -> None:
    """Places in the networks and prompts may be mended in classes.json after prepare: take them as they are now."""
    if config.dataset.path is not None:
        rows = [c.to_json() for c in _class_list(config)]
        if rows != data.read_json("source-classes.json"):
            data.publish_json("source-classes.json", rows)


def _relative(shard: ShardInfo, folder: Folder) -> ShardInfo:
    prefix = folder.uri + "/"
    return dataclasses.replace(shard, path=shard.path.removeprefix(prefix))


def _class_list(config: RunConfig) -> list[ClassInfo]:
    if config.dataset.classes is not None:
        return read_classes(config.dataset.classes)
    shards = list_shards(str(config.dataset.path), key="dataset.path")
    return read_classes(posixpath.join(posixpath.dirname(shards[0]), "classes.json"))


Prepared = tuple[list[ClassInfo], list[ShardInfo], list[ShardInfo]]


def _survey(config: RunConfig) -> Prepared:
    """Class list, training shards and validation shards of the person's own data, each with what it holds."""
    shards = list_shards(str(config.dataset.path), key="dataset.path")
    val_path = config.dataset.val_path
    val_shards = [] if val_path is None else list_shards(val_path, key="dataset.val_path")
    classes = _class_list(config)
    train, val = _index(shards, len(classes)), _index(val_shards, len(classes))
    for key, path, found in (("path", config.dataset.path, train), ("val_path", val_path, val)):
        if path is not None and not sum(s.samples for s in found):
            raise ValueError(
                f"dataset.{key}={path}: no sample with an image and a label in {len(found)} shards; expected members "
                "<key>.png (or jpg, ...) and <key>.cls with the label as a number"
            )
    return classes, train, val


def _write_digits(folder: Folder) -> Prepared:
    """Publish the built-in source's shards."""
    data = folder / "data"
    for split, tars in digit_shards().items():
        for i, tar in enumerate(tars):
            data.publish(f"{split}/{split}-{i:06d}.tar", tar)
    classes = [ClassInfo(i, name, f"a scanned handwritten digit {name}") for i, name in enumerate(DIGIT_NAMES)]
    train, val = (
        _index([data.path(n) for n in data.names(f"{split}/*.tar")], len(classes)) for split in ("train", "val")
    )
    return classes, train, val
