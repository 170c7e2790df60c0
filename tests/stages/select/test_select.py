"""Baselines made of real images: drawn at random anew for every seed, or chosen once in latent space."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddoq_ray.config import RunConfig
from ddoq_ray.config.compose import load_config
from ddoq_ray.config.methods import SPECS
from ddoq_ray.core.baselines import herding, medoids
from ddoq_ray.data.image_set import DistilledImage, read_images
from ddoq_ray.data.samples import decode_rgb
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Events
from ddoq_ray.stages.cells import cells, methods
from ddoq_ray.stages.prepare import step as prepare
from ddoq_ray.stages.prepare.step import Data
from ddoq_ray.stages.select import step as select
from ddoq_ray.stages.select.choice import wanted_images
from ddoq_ray.stages.select.random import draw
from ddoq_ray.stages.select.step import Select
from ddoq_ray.storage.artifact import Artifact, digest_of, with_check
from ddoq_ray.storage.codebook import Account, write_part
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import Place
from ddoq_ray.storage.records import ChunkRecord, ClassCounts, Codebook, ShardDone, fixed_binary, latent_schema

pytestmark = pytest.mark.usefixtures("ray_here")

SHARDS, PER_SHARD, IPC = 4, 30, 4
SHAPE = (1, 8, 8)
Made = dict[str, tuple[list[DistilledImage], dict]]
Samples = list[list[tuple[str, bytes]]]


def latent(png: bytes) -> np.ndarray:
    """The picture itself, as a latent that the log's fp16 holds exactly."""
    return (np.asarray(decode_rgb(png))[..., 0].reshape(-1) / 16).astype(np.float16)


@pytest.fixture(scope="module")
def stream(digit_members: Samples) -> dict[int, tuple[list[str], np.ndarray]]:
    """class_id -> (keys, latents float32 [n, 64]) in the log's order: that of the shards."""
    found: dict[int, list[tuple[str, np.ndarray]]] = {c: [] for c in range(10)}
    for png, label in digit_members[: SHARDS * PER_SHARD]:
        found[int(label[1])].append((png[0], latent(png[1])))
    return {c: ([k for k, _ in rows], np.stack([x for _, x in rows]).astype(np.float32)) for c, rows in found.items()}


def write_log(latents: Folder, samples: Samples) -> None:
    """The latent log of the corpus, in two chunks a shard."""
    for shard in range(SHARDS):
        chunks = []
        for chunk, part in enumerate(np.array_split(np.arange(PER_SHARD) + shard * PER_SHARD, 2)):
            ids = np.asarray([int(samples[i][1][1]) for i in part], np.int32)
            order = part[np.argsort(ids, kind="stable")]
            x = np.stack([latent(samples[i][0][1]) for i in order])
            columns = [pa.array([f"{i}" for i in order]), pa.array(np.sort(ids)), fixed_binary(x)]
            out = io.BytesIO()
            pq.write_table(pa.Table.from_arrays(columns, schema=latent_schema(SHAPE, "prior")), out)
            name = f"shard-{shard:06d}/chunk-{chunk:05d}.parquet"
            latents.publish(name, out.getvalue())
            counts = ClassCounts(Counter(ids.tolist()))
            chunks.append(ChunkRecord(name, len(ids), counts, digest_of(out.getvalue())))
        total = sum((Counter(dict(c.classes)) for c in chunks), Counter())
        latents.publish(f"shard-{shard:06d}/done.json", ShardDone(shard, tuple(chunks), ClassCounts(total), 0).dumps())
    Artifact(latents, "encode").finish({"prior": "prior"}, digest="log", latent_shape=SHAPE)


def write_codebook(run: Folder, centroids: np.ndarray) -> None:
    """A codebook of two parts with the same centroids for every class."""
    k = len(centroids)
    flat, ones = centroids.reshape(k, -1).astype(np.float32), np.ones(k, np.int64)
    facts = {"latent_shape": SHAPE, "prior_id": "prior"}
    for part, classes in enumerate((range(5), range(5, 10))):
        write_part(
            run / "codebook", part, [Codebook(c, flat, ones, 1.0, ones) for c in classes], Account([], {}, []), **facts
        )
    Artifact(run / "codebook", "quantize").finish({}, digest="codebook")


CENTROIDS = np.random.default_rng(0).uniform(0, 16, (IPC, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, write_corpus: Callable[..., Path], digit_members: Samples
) -> tuple[RunConfig, Folder, Data]:
    base = tmp_path_factory.mktemp("random")
    shards = write_corpus(base / "shards", SHARDS, PER_SHARD)
    run = Folder(str(base / "run"))
    source = [
        "experiment=digits",
        "dataset=webdataset",
        f"dataset.path={shards}",
        "stages=[prepare,encode,quantize,synthesize]",
    ]
    config = load_config([*source, f"ipc={IPC}", "synthesizer.shard_images=7"])
    data = prepare.run(config, run, Events(run))
    write_log(run / "latents", digit_members)
    write_codebook(run, CENTROIDS)
    return config, run, data


def of(config: RunConfig, run: Folder, data: Data, latents: Folder | None = None) -> Run:
    log = dataclasses.replace(config.latents, path=latents.uri if latents is not None else None)
    networks = Networks("prior", SHAPE, 16, None, 10, None, None, None, 0, 0, {})
    return Run(dataclasses.replace(config, latents=log), run, data, networks, Events(run))


def choose(prepared: tuple[RunConfig, Folder, Data], place: str, draw_index: int, method: str = "random") -> Made:
    config, run, data = prepared
    step = Select(SPECS[method], Place(place), draw_index)
    select.run([(of(config, run, data), step)])
    manifest = step.artifact(run).require()
    images = run / place / "images"
    return {place: (list(read_images([images.path(n) for n in images.names("*.tar")])), manifest)}


@pytest.fixture(scope="module")
def draws(prepared: tuple[RunConfig, Folder, Data]) -> Made:
    return choose(prepared, "first", 0) | choose(prepared, "again", 0) | choose(prepared, "other", 1)


@pytest.fixture(scope="module")
def chosen(prepared: tuple[RunConfig, Folder, Data]) -> Made:
    return choose(prepared, "herding", 0, "herding") | choose(prepared, "medoids", 0, "medoids")


@pytest.fixture(scope="module")
def pool(digit_members: Samples) -> dict[bytes, tuple[str, int]]:
    """Pixels -> (key, class_id) of every image that could be chosen."""
    samples = digit_members[: SHARDS * PER_SHARD]
    return {np.asarray(decode_rgb(png[1])).tobytes(): (png[0], int(label[1])) for png, label in samples}


def keys_of(images: list[DistilledImage], pool: dict[bytes, tuple[str, int]]) -> list[str]:
    found = [pool[np.asarray(decode_rgb(item.data)).tobytes()] for item in images]  # KeyError: not a real image
    assert [class_id for _, class_id in found] == [item.class_id for item in images]
    return [key for key, _ in found]


def test_ipc_real_images_of_each_class_without_repeats(draws: Made, chosen: Made, pool: dict) -> None:
    for images, manifest in (draws | chosen).values():
        keys = keys_of(images, pool)
        assert len(set(keys)) == len(keys) == 10 * IPC == manifest["items"]
        assert [s["images"] for s in manifest["shards"]] == [7, 7, 7, 7, 7, 5]
        assert Counter(item.class_id for item in images) == dict.fromkeys(range(10), IPC)
        assert all(item.weight == 1 / IPC for item in images)
        assert [item.key for item in images] == [f"{c:05d}-{k:04d}" for c in range(10) for k in range(IPC)]
        assert all(item.prompt for item in images)


def test_a_draw_can_be_repeated_and_another_differs(draws: Made, pool: dict) -> None:
    assert draws["first"][1]["digest"] == draws["again"][1]["digest"]
    first, other = (set(keys_of(draws[name][0], pool)) for name in ("first", "other"))
    assert len(first & other) < len(first) * 0.7  # by chance about a third


def test_herding_and_medoids_choose_what_core_chooses(
    chosen: Made, pool: dict, stream: dict[int, tuple[list[str], np.ndarray]]
) -> None:
    herded = [keys[i] for keys, x in stream.values() for i in herding(x, IPC)]
    nearest = [keys[i] for keys, x in stream.values() for i in medoids(x, CENTROIDS)]
    assert keys_of(chosen["herding"][0], pool) == herded
    assert keys_of(chosen["medoids"][0], pool) == nearest  # rank k is the image of centroid k
    assert herded != nearest


def test_a_finished_choice_is_reused_until_what_it_follows_changes(
    chosen: Made, prepared: tuple[RunConfig, Folder, Data]
) -> None:
    run = prepared[1]
    before = {p: Path(run.path(p)).stat().st_mtime_ns for p in run.names("medoids/images/*.tar")}
    choose(prepared, "medoids", 0, "medoids")
    assert {p: Path(run.path(p)).stat().st_mtime_ns for p in before} == before
    manifest = (run / "codebook").read_json("manifest.json")
    (run / "codebook").publish_json("manifest.json", with_check(manifest | {"digest": "another"}))
    try:
        with pytest.raises(ValueError, match=r"codebook: .*codebook.* there, .*another.* now"):
            choose(prepared, "medoids", 0, "medoids")
        choose(prepared, "herding", 0, "herding")  # does not follow the codebook
    finally:
        (run / "codebook").publish_json("manifest.json", manifest)


def test_sets_made_together_are_those_made_alone(
    prepared: tuple[RunConfig, Folder, Data], draws: Made, chosen: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run, data = prepared
    alone = {("random", 0): draws["first"], ("random", 1): draws["other"], ("medoids", 0): chosen["medoids"]}
    monkeypatch.setattr(select, "AT_ONCE", 1)  # each random one by itself, in another way
    for way in ("apart", "together"):
        steps = {key: Select(SPECS[key[0]], Place(f"{way}-{key[0]}-{key[1]}"), key[1]) for key in alone}
        select.run([(of(config, run, data), step) for step in steps.values()])
        for key, step in steps.items():
            assert step.artifact(run).require()["digest"] == alone[key][1]["digest"], (way, key)
            assert not (run / step.place).names("excerpts/*")
        monkeypatch.undo()


def test_what_a_choice_needs_is_named(prepared: tuple[RunConfig, Folder, Data], tmp_path: Path) -> None:
    config, run, data = prepared
    empty = Folder(str(tmp_path))
    with pytest.raises(ValueError, match="run the encode stage first"):
        select.run([(of(config, run, data, empty), Select(SPECS["herding"], Place("x")))])
    with pytest.raises(ValueError, match="run the quantize stage first"):
        select.run([(of(config, empty, data, run / "latents"), Select(SPECS["medoids"], Place("x")))])


def test_every_image_of_a_class_can_be_drawn() -> None:
    config = load_config([f"ipc={IPC}"])
    drawn = Counter(int(i) for k in range(200) for i in draw(config, {0: 9}, k)[0])
    assert sorted(drawn) == list(range(9))
    expected = 200 * IPC / 9
    assert max(abs(n - expected) for n in drawn.values()) < 5 * np.sqrt(expected)


def test_small_classes() -> None:
    counts = {0: 9, 1: 2, 2: 0}
    cap = load_config([f"ipc={IPC}", "small_class=cap"])
    drop = load_config([f"ipc={IPC}", "small_class=drop"])
    assert wanted_images(cap, counts) == {0: 4, 1: 2}
    assert wanted_images(drop, counts) == {0: 4}
    drawn = draw(cap, counts, 0)
    assert {c: len(p) for c, p in drawn.items()} == {0: 4, 1: 2}
    assert drawn[1].tolist() == [0, 1]


def test_the_plan_gives_each_choice_one_set_and_random_one_a_seed() -> None:
    config = load_config(["ipc=3", "num_seeds=2", "baselines=[random,herding,medoids]"])
    planned = {m.name: m for m in methods(config)}
    assert planned["herding"].sets == (Place("compare/herding-ipc3"),)
    assert planned["medoids"].sets == (Place("compare/medoids-ipc3"),)
    assert len(planned["random"].sets) == 2
    assert {m.spec.scheme for m in planned.values() if m.spec.images == "select"} == {"uniform"}
    rows = [(c.method, c.images, c.seed) for c in cells(config)]
    assert ("medoids", "compare/medoids-ipc3/images", 1) in rows
    assert ("random", "compare/random-ipc3/draw-1/images", 1) in rows
    assert json.dumps(rows).count("herding-ipc3/images") == 2
