"""quantizer.noise_level: one clean log, read as it is or noised, with the same bytes from any number of actors."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from support.latent_logs import planned

from ddoq_ray.config.compose import load_config
from ddoq_ray.core.clvq import Clvq
from ddoq_ray.core.noising import NoiseLevel, noised
from ddoq_ray.execution.networks import Networks
from ddoq_ray.stages.encode.worker import write_file
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.class_latents import class_latents
from ddoq_ray.storage.codebook import read_part
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_log import LatentLog, noise_of
from ddoq_ray.storage.records import ClassCounts, ShardDone, ShardInfo, binary_rows, latent_schema

pytestmark = pytest.mark.usefixtures("ray_here")

SHAPE, CLASSES, SHARDS, ROWS, SEED = (2, 4, 4), 3, 2, 30, 7
LEVEL = NoiseLevel(0.8, 0.6, SEED)
FACTS = Networks("prior-1", SHAPE, 16, None, 10, None, None, None, 0, 0, {}, noise_scales=(0.8, 0.6))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, dict[int, np.ndarray]]:
    """A log of mixed classes, and for each class its noised latents in the log's order."""
    run = Folder(str(tmp_path_factory.mktemp("noise") / "run"))
    rng = np.random.default_rng(0)
    expected: dict[int, list[np.ndarray]] = {c: [] for c in range(CLASSES)}
    infos = []
    for shard in range(SHARDS):
        class_ids = rng.integers(0, CLASSES, ROWS).astype(np.int32)
        latents = rng.standard_normal((ROWS, 32)).astype(np.float16)
        keys = [f"s{shard}i{i}" for i in range(ROWS)]
        name = f"shard-{shard:06d}/chunk-00000.parquet"
        record = write_file(run / "latents", name, keys, class_ids, latents, latent_schema(SHAPE, "prior-1"))
        done = ShardDone(shard, (record,), record.classes, 0)
        (run / "latents").publish(f"shard-{shard:06d}/done.json", done.dumps())
        infos.append(ShardInfo(f"/data/{shard}.tar", ROWS, 1, ClassCounts(Counter(class_ids.tolist())), str(shard)))
        for i, c in enumerate(class_ids.tolist()):
            expected[c].append(noised(latents[i : i + 1], keys[i : i + 1], LEVEL)[0])
    data = run / "data"
    data.publish_json("source-classes.json", [{"class_id": c, "name": f"n{c}", "prompt": f"n{c}"} for c in range(3)])
    data.publish_json("shards.json", [i.to_json() for i in infos])
    data.publish_json("val-shards.json", [])
    Artifact(data, "prepare").finish({})
    return run, {c: np.stack(rows) for c, rows in expected.items()}


def test_the_log_is_read_clean_or_noised(log: tuple[Folder, dict[int, np.ndarray]]) -> None:
    run, expected = log
    for c, x in class_latents(run / "latents", SHARDS, range(CLASSES), LEVEL):
        np.testing.assert_array_equal(x, expected[c].astype(np.float32))
    clean = LatentLog(run / "latents")
    first = clean.done(0).chunks[0]
    for c, x in clean.read(first, range(CLASSES)):
        assert not np.array_equal(x, expected[c][: len(x)])


def test_a_codebook_of_noised_latents(log: tuple[Folder, dict[int, np.ndarray]]) -> None:
    run, expected = log
    made = []
    for place, actors, level in (("one", 1, 0.1), ("two", 2, 0.1), ("clean", 1, 0.0)):
        config = load_config(["baselines=[]", "ipc=3", f"seed={SEED}", f"quantizer.num_shards={actors}"])
        config = dataclasses.replace(config, quantizer=dataclasses.replace(config.quantizer, noise_level=level))
        handle = planned(config, run, place, FACTS)
        handle.launch()
        for shard in range(SHARDS):
            handle.shard_done(shard)
        handle.finish()
        codebook = run / place / "codebook"
        assert noise_of(codebook) == (LEVEL if level else None)
        made.append({n: codebook.read(n) for n in codebook.names("part-*.parquet")})
    assert made[0] == made[1] != made[2]
    for name in made[0]:
        table = read_part(run / "one" / "codebook", name)
        class_ids, centroids = table["class_id"].to_numpy(), binary_rows(table["centroid"], "<f4")
        for c in set(class_ids.tolist()):
            fold = Clvq(3, 32, seed=SEED, class_id=c)
            fold.update(expected[c])
            np.testing.assert_array_equal(centroids[class_ids == c], fold.result()[0])


def test_the_level_is_where_synthesis_starts() -> None:
    for wrong in (["synthesizer.strength=0.2"], ["synthesizer.strength=0.4", "synthesizer.start=inversion"]):
        with pytest.raises(ValueError, match=r"expected synthesizer\.start=noised and synthesizer\.strength=0\.4"):
            load_config(["quantizer.noise_level=0.4", *wrong])
    with pytest.raises(ValueError, match=r"quantizer\.noise_level=1\.5"):
        load_config(["quantizer.noise_level=1.5"])
    load_config(["quantizer.noise_level=0.4", "synthesizer.strength=0.4"])
