"""Latent logs that tests write, quantizers run on them, and what a codebook must be."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddoq_ray.config import RunConfig
from ddoq_ray.config.compose import load_config
from ddoq_ray.config.methods import SPECS
from ddoq_ray.core.clvq import Clvq
from ddoq_ray.core.distortion import assign
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Events
from ddoq_ray.stages.quantize.step import Quantize, Quantizers
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import Place
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.records import (
    ChunkRecord,
    ClassCounts,
    ShardDone,
    ShardInfo,
    binary_rows,
    fixed_binary,
    latent_schema,
)

SHAPE = (2, 3, 3)
DIM = 18
FACTS = Networks("prior-1", SHAPE, 16, None, 10, None, None, None, 0, 0, {})


def write_log(
    run: Path,
    classes: int,
    shards: Sequence[Sequence[Sequence[int]]],
    latent: Callable[[int, int, np.ndarray], np.ndarray] = lambda class_id, index, x: x,
) -> dict[int, np.ndarray]:
    """A run directory with prepared data and a finished latent log.

    Args:
        shards: For each shard its chunks, each the class of every sample in reading order.
        latent: Changes a sample's latent: class_id, index in the chunk, the latent as drawn.

    Returns:
        class_id -> its latents float32 [n, D] in the log's order.
    """
    folder = Folder(str(run))
    rng = np.random.default_rng(0)
    middle = rng.standard_normal((classes, DIM))
    stream: dict[int, list[np.ndarray]] = {c: [] for c in range(classes)}
    infos = []
    for shard, chunks in enumerate(shards):
        records = []
        for chunk, class_ids in enumerate(chunks):
            ids = np.asarray(class_ids, np.int32)
            latents = (middle[ids] + 0.5 * rng.standard_normal((len(ids), DIM))).astype(np.float16)
            for i, c in enumerate(ids.tolist()):
                latents[i] = latent(c, i, latents[i])
            order = np.argsort(ids, kind="stable")
            for i in order:
                stream[int(ids[i])].append(latents[i].astype(np.float32))
            keys = pa.array([f"s{shard}c{chunk}i{i}" for i in order], pa.string())
            columns = [keys, pa.array(ids[order]), fixed_binary(latents[order])]
            out = io.BytesIO()
            pq.write_table(pa.Table.from_arrays(columns, schema=latent_schema(SHAPE, "prior-1")), out)
            name = f"shard-{shard:06d}/chunk-{chunk:05d}.parquet"
            (folder / "latents").publish(name, out.getvalue())
            records.append(ChunkRecord(name, len(ids), ClassCounts(Counter(ids.tolist())), digest_of(out.getvalue())))
        counts = Counter(c for chunk in chunks for c in chunk)
        done = ShardDone(shard, tuple(records), ClassCounts(counts), 0)
        (folder / "latents").publish(f"shard-{shard:06d}/done.json", done.dumps())
        infos.append(ShardInfo(f"/data/{shard}.tar", sum(counts.values()), 1, done.classes, f"digest-{shard}"))
    data = folder / "data"
    names = [{"class_id": c, "name": f"n{c}", "prompt": f"n{c}"} for c in range(classes)]
    data.publish_json("source-classes.json", names)
    data.publish_json("shards.json", [i.to_json() for i in infos])
    data.publish_json("val-shards.json", [])
    Artifact(data, "prepare").finish({})
    return {c: np.stack(rows) if rows else np.empty((0, DIM), np.float32) for c, rows in stream.items()}


def settings(*overrides: str, **quantizer: Any) -> RunConfig:
    """A configuration with one quantizer actor unless the test asks for more."""
    config = load_config(["baselines=[]", "ipc=3", "quantizer.num_shards=1", *overrides])
    return dataclasses.replace(config, quantizer=dataclasses.replace(config.quantizer, **quantizer))


def planned(config: RunConfig, run_dir: Folder, place: str, networks: Networks = FACTS) -> Quantizers:
    """Quantizers of the run's own algorithm, whose codebook goes to `place`; planned, and not yet launched."""
    run = Run(config, run_dir, Data.load(run_dir), networks, Events(run_dir))
    handle = Quantizers(run, Quantize(SPECS["ddoq"], Place(place)))
    handle.plan()
    return handle


class Running:
    """Quantizers at work on the log of `run`, closed at the end of the block."""

    def __init__(self, run: Path, place: str, config: RunConfig) -> None:
        self.run = Folder(str(run))
        self.place = self.run / place / "codebook"
        self.handle = planned(config, self.run, place)

    def __enter__(self) -> Running:
        self.handle.launch()
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.close()

    def finish(self, order: Sequence[int]) -> dict[str, bytes]:
        for shard in order:
            self.handle.shard_done(shard)
        self.handle.finish()
        return {name: self.place.read(name) for name in self.place.names("part-*.parquet")}


def quantize(run: Path, place: str, config: RunConfig, order: Sequence[int] | None = None) -> dict[str, bytes]:
    with Running(run, place, config) as running:
        return running.finish(order if order is not None else range(len(running.handle.done)))


def rows_of(parts: dict[str, bytes]) -> dict[int, dict[str, np.ndarray]]:
    """class_id -> its columns, from the bytes of codebook parts."""
    table = pa.concat_tables(pq.read_table(io.BytesIO(parts[name])) for name in sorted(parts))
    columns = {name: table[name].to_numpy() for name in table.column_names if name != "centroid"}
    columns["centroid"] = binary_rows(table["centroid"], "<f4")
    ids = columns.pop("class_id")
    return {int(c): {name: column[ids == c] for name, column in columns.items()} for c in np.unique(ids)}


def check_class(row: dict[str, np.ndarray], x: np.ndarray, centroids: np.ndarray, stream_counts: np.ndarray) -> None:
    """A class of the codebook is exactly these centroids, with the exact Voronoi masses of `x`."""
    labels, squared = assign(x, centroids)
    assert row["centroid"].tobytes() == centroids.astype("<f4").tobytes()
    assert row["count"].tolist() == np.bincount(labels, minlength=len(centroids)).tolist()
    assert row["count"].sum() == len(x)
    assert row["stream_count"].tolist() == stream_counts.tolist()
    assert row["centroid_id"].tolist() == list(range(len(centroids)))
    assert (row["weight"] == row["count"] / len(x)).all() and row["weight"].sum() == pytest.approx(1, abs=1e-12)
    assert row["distortion"] == pytest.approx(np.full(len(centroids), squared.mean()), rel=1e-12)


def fold(stream: dict[int, np.ndarray], config: RunConfig, **clvq: Any) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The same log through core.clvq, one class after another, one update a class."""
    made = {}
    for c, x in stream.items():
        quantizer = Clvq(config.ipc, x.shape[1], seed=config.seed, class_id=c, **clvq)
        quantizer.update(x)
        made[c] = quantizer.result()
    return made
