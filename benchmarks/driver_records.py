"""The records that a run of ImageNet-21K's size leaves behind, by the project's own types: the stub under `driver`."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from ddoq_ray.config import RunConfig
from ddoq_ray.config.compose import load_config
from ddoq_ray.config.quantizer import QuantizerConfig
from ddoq_ray.core.sizing import GIB
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Events
from ddoq_ray.stages.cells import label_key
from ddoq_ray.stages.label.step import Label
from ddoq_ray.stages.quantize.step import Quantizers
from ddoq_ray.stages.synthesize.step import Synthesize
from ddoq_ray.storage.artifact import Artifact, digest_of, with_check
from ddoq_ray.storage.codebook import Account, part_classes, write_part
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.label_log import LabelRecord
from ddoq_ray.storage.latent_index import LatentIndex
from ddoq_ray.storage.layout import Place
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.records import ChunkRecord, ClassCounts, ClassInfo, Codebook, ShardDone, ShardInfo

SHAPE = (4, 32, 32)  # of a latent at 256 px: 4,096 values, so that a codebook has 270 parts
ACTORS = 8
NODES = [64.0 * GIB] * 8
LABELLED = 2  # label files that are there when the label stage resumes


@dataclasses.dataclass
class World:
    """A run directory of records, and what the loops hand on to one another as the stages do."""

    run: Folder
    config: RunConfig
    classes: list[ClassInfo]
    train: list[ShardInfo]
    val: list[ShardInfo]
    networks: Networks
    exact: QuantizerConfig
    data: Data = dataclasses.field(init=False)
    quantizers: Quantizers = dataclasses.field(init=False)
    index: LatentIndex = dataclasses.field(init=False)

    @property
    def latents(self) -> Folder:
        return self.run / "latents"

    @property
    def dim(self) -> int:
        return int(np.prod(self.networks.latent_shape))


def class_counts(order: str, shards: int, classes: int, samples: int) -> Iterator[ClassCounts]:
    """What each shard holds."""
    rng = np.random.default_rng(0)
    for shard in range(shards):
        if order == "sorted":
            ids = np.arange(shard * samples, (shard + 1) * samples, dtype=np.int64) * classes // (shards * samples)
        else:
            ids = rng.integers(classes, size=samples)
        found, counts = np.unique(ids, return_counts=True)
        yield ClassCounts(dict(zip(found.tolist(), counts.tolist(), strict=True)))


def put(folder: Folder, name: str, data: bytes = b"") -> None:
    """A file as `Folder.publish` leaves it, without its wait for the disk: what is measured reads them."""
    path = Path(folder.path(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@functools.cache
def settings(ipc: int) -> tuple[RunConfig, QuantizerConfig]:
    """The run's settings, and an algorithm that reads no latents while it keeps its books."""
    chosen = ("baselines=[]", "small_class=cap", "protocol.steps=null", "protocol.epochs=300", "num_seeds=5")
    config = load_config([f"ipc={ipc}", f"quantizer.num_shards={ACTORS}", *chosen])
    return config, load_config(["quantizer=gram", "baselines=[]"]).quantizer


def make_world(run: Folder, order: str, shards: int, classes: int, samples: int, ipc: int) -> World:
    """The records that stages leave behind: shards, quarantine, done records, codebook parts, manifests, labels."""
    config, exact = settings(ipc)
    infos = []
    for shard, counts in enumerate(class_counts(order, shards, classes, samples)):
        put(run, f"shards/{shard:06d}.tar")
        infos.append(ShardInfo(run.path(f"shards/{shard:06d}.tar"), samples, 0, counts, digest_of(shard)[:16]))
        name = f"shard-{shard:06d}"
        chunk = ChunkRecord(f"{name}/chunk-00000.parquet", samples, counts, digest_of(name))
        put(run / "latents", f"{name}/done.json", ShardDone(shard, (chunk,), counts, 1).dumps())
        put(run / "quarantine", f"{name}.jsonl", b'{"key": "a", "offset": 0, "reason": "cannot be decoded: b"}\n')
        put(run / "quarantine", f"{name}.latents-00000.jsonl", b'{"key": "c", "offset": 0, "reason": "d"}\n')
    names = tuple(f"n{c:08d}, class number {c}, name {c}" for c in range(classes))
    listed = [ClassInfo(c, f"n{c:08d}", f"class number {c}") for c in range(classes)]
    networks = Networks("prior", SHAPE, 256, names, classes, "teacher", "resnet18", names, classes, 512, {})
    data = run / "data"
    data.publish_json("source-classes.json", [c.to_json() for c in listed])
    Artifact(data, "prepare").finish({})
    write_codebook(run / "codebook", classes, ipc, int(np.prod(SHAPE)))
    units = -(-classes * ipc // config.synthesizer.shard_images)
    shown = [{"name": f"images-{i:06d}", "images": config.synthesizer.shard_images} for i in range(units)]
    Artifact(run / "images", "synthesize").finish({}, digest="images", shards=shown)
    labels = run / Place().labels(label_key(config))
    Artifact(labels, "label").finish({}, digest="labels", items=classes * ipc)
    step = Label(Synthesize(Place()), Place(), label_key(config))
    told = Run(config, run, Data(run, (), (), ()), networks, Events(run))
    record = dataclasses.asdict(LabelRecord(digest_of(step.identity(told)), 0, [], [], [], []))
    for file in islice(step.grid(told).all(), LABELLED):
        put(labels, file.name)
        put(labels, file.record, json.dumps(with_check(record)).encode())
    return World(run, config, listed, infos, infos[: -(-shards // 20)], networks, exact)


def write_codebook(codebook: Folder, classes: int, ipc: int, dim: int) -> None:
    """As many parts as centroids of `dim` values need, with centroids of one."""
    counts = np.ones(ipc, np.int64)
    account = Account(dropped=[], algorithms={"clvq": 1}, warnings=[])
    for part, mine in enumerate(part_classes(classes, ipc, dim)):
        books = [Codebook(c, np.zeros((ipc, 1), np.float32), counts, 0.0, counts) for c in mine]
        write_part(codebook, part, books, account, latent_shape=(1,), prior_id="prior")
