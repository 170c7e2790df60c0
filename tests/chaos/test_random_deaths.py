"""Deaths of every kind, at random moments, while encoders and quantizers work: the codebook is the same bytes."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ddoq_ray import pipeline
from ddoq_ray.config.compose import load_config
from tests.chaos.cells import Lab
from tests.support.deaths import InThread

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

SHARDS, PER_SHARD = 10, 100


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, write_corpus: Callable[..., Path]) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "shards", SHARDS, PER_SHARD)


def run(corpus: Path, place: Path) -> None:
    pipeline.run(
        load_config(
            [
                f"run_dir={place}", "experiment=digits", "dataset=webdataset", f"dataset.path={corpus}",
                "ipc=3", "baselines=[]",
                "stages=[prepare,encode,quantize]", "encoder.chunk_samples=1", "encoder.workers=2",
                "quantizer.snapshot_every=1", "quantizer.num_shards=3", "cluster.quantizer.num_cpus=0.2",
            ]
        )
    )  # fmt: skip


def encoded_samples(place: Path) -> int:
    parts = sum(1 for _ in place.glob("latents/parts/shard-*/chunk-*.parquet"))
    done = [json.loads(p.read_text())["classes"] for p in place.glob("latents/shard-*/done.json")]
    return parts + sum(sum(classes.values()) for classes in done)


def content(place: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(place.glob("codebook/part-*.parquet"))}


@pytest.fixture(scope="module")
def calm(corpus: Path, here: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The codebook of a run without deaths."""
    place = tmp_path_factory.mktemp("calm") / "run"
    run(corpus, place)
    return content(place)


@pytest.mark.parametrize("seed", range(5))
def test_any_death_at_any_moment(corpus: Path, here: Lab, calm: dict[str, bytes], tmp_path: Path, seed: int) -> None:
    """A quantizer, an encoder, a quantizer again, then a node with a quantizer on it."""
    assert calm
    rng = np.random.default_rng(seed)
    place = tmp_path / "run"
    work = InThread(functools.partial(run, corpus, place))
    moments = np.sort(rng.choice(np.arange(1, SHARDS * PER_SHARD // 3), size=4, replace=False)).tolist()
    words = [*rng.permutation(["Quantizer", "Encoder", "Quantizer"]).tolist(), "node"]
    for moment, word in zip(moments, words, strict=True):
        work.wait_for(lambda moment=moment: encoded_samples(place) >= moment)
        there = work.wait_for(lambda word=word: here.at_work("Quantizer" if word == "node" else word))
        node, process = there[int(rng.integers(len(there)))]
        here.replace(node) if word == "node" else os.kill(process, signal.SIGKILL)
    work.join(240)
    assert content(place) == calm
    encoded = json.loads((place / "latents/manifest.json").read_text())["items"]
    assert encoded == SHARDS * PER_SHARD
    counted = sum(
        pq.read_table(p, columns=["count"])["count"].to_numpy().sum() for p in place.glob("codebook/*.parquet")
    )
    assert counted == encoded
    assert not list(place.rglob("*.tmp"))
