"""Deaths of every kind, at random moments, while encoders and quantizers work: the codebook is the same bytes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from support.deaths import InThread, workers

from ddoq_ray import pipeline
from ddoq_ray.config.compose import load_config

pytestmark = pytest.mark.slow

SHARDS, PER_SHARD = 10, 30
NODE = {"num_cpus": 4, "object_store_memory": 100 << 20}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, write_corpus: Callable[..., Path]) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "shards", SHARDS, PER_SHARD)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs no work, so that one other node holds all quantizers and all encoders."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    made = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0, "include_dashboard": False})
    try:
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def run(corpus: Path, place: Path) -> None:
    pipeline.run(
        load_config(
            [
                f"run_dir={place}", "experiment=digits", "dataset=webdataset", f"dataset.path={corpus}",
                "ipc=3", "baselines=[]",
                "stages=[prepare,encode,quantize]", "encoder.chunk_samples=1", "encoder.workers=2",
                "quantizer.snapshot_every=1", "quantizer.num_shards=3", "cluster.quantizer.num_cpus=0.5",
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
def calm(corpus: Path, cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Any]:
    """The codebook of a run without deaths, and the node that ran it."""
    node = cluster.add_node(**NODE)
    place = tmp_path_factory.mktemp("calm") / "run"
    run(corpus, place)
    return content(place), node


def test_any_death_at_any_moment(
    corpus: Path, cluster: Any, calm: tuple[dict[str, bytes], Any], tmp_path: Path
) -> None:
    """Five seeds: a quantizer, an encoder, a quantizer again, then the node that holds them all."""
    expected, node = calm
    assert expected
    for seed in range(5):
        rng = np.random.default_rng(seed)
        place = tmp_path / f"run-{seed}"
        work = InThread(functools.partial(run, corpus, place))
        moments = np.sort(rng.choice(np.arange(1, SHARDS * PER_SHARD // 2), size=4, replace=False)).tolist()
        words = [*rng.permutation(["Quantizer", "Encoder", "Quantizer"]).tolist(), "node"]
        for moment, word in zip(moments, words, strict=True):
            work.wait_for(lambda place=place, moment=moment: encoded_samples(place) >= moment)
            if word == "node":
                spare = cluster.add_node(**NODE)  # nodes come and go in the main thread only
                assert not workers(spare, "Quantizer")
                cluster.remove_node(node, allow_graceful=False)
                node = spare
            else:
                work.kill(node, word, lambda there, rng=rng: int(rng.choice(there)))
        work.join(240)
        assert content(place) == expected
        encoded = json.loads((place / "latents/manifest.json").read_text())["items"]
        assert encoded == SHARDS * PER_SHARD
        counted = sum(
            pq.read_table(p, columns=["count"])["count"].to_numpy().sum() for p in place.glob("codebook/*.parquet")
        )
        assert counted == encoded
        assert not list(place.rglob("*.tmp"))
