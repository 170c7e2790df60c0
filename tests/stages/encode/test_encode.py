"""The encode stage on shards with every kind of damage: what is good is encoded, what is not is listed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL

from ddoq_ray.config import RunConfig
from ddoq_ray.config.compose import load_config
from ddoq_ray.data.samples import decode_rgb, to_square
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.execution.errors import user_error
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Events
from ddoq_ray.models.priors.base import Prior
from ddoq_ray.models.priors.load import load_prior
from ddoq_ray.stages.encode import step as encode
from ddoq_ray.stages.encode.reader import CHUNK_BYTES, chunk_rows
from ddoq_ray.stages.encode.stream import chunk_stream, inner_batch
from ddoq_ray.stages.encode.stream import encoded as through_encoders
from ddoq_ray.stages.prepare import step as prepare
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_log import LatentLog
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.records import binary_rows

pytestmark = pytest.mark.usefixtures("ray_here")

Samples = list[list[tuple[str, bytes]]]
CHUNK = 4


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Shards on disk, and what the test knows about them."""

    folder: Path
    good: dict[str, tuple[int, bytes]]  # key -> (class_id, PNG), in no order
    bad: dict[str, tuple[int, str]]  # shard and key -> (offset of its first member, a word of the reason)


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, write_corpus: Callable[..., Path], digit_members: Samples
) -> Corpus:
    """Six shards: bad picture, no label and two labels, cut off, clean, no tar at all, clean."""
    folder = write_corpus(tmp_path_factory.mktemp("damaged") / "shards", 6, 10)
    shards = [[list(sample) for sample in digit_members[10 * s : 10 * s + 10]] for s in range(6)]
    shards[0][3][0] = (shards[0][3][0][0], b"\x89PNG no picture")
    del shards[1][2][1]
    shards[1][7].append((shards[1][7][1][0], b"1"))
    for s in (0, 1):
        (folder / f"digits-{s:03d}.tar").write_bytes(write_tar([m for sample in shards[s] for m in sample]))
    cut = folder / "digits-002.tar"
    with tarfile.open(cut) as tar:
        cut_at = tar.getmember("d0026.png").offset_data + 20  # inside the seventh picture
    cut.write_bytes(cut.read_bytes()[:cut_at])
    (folder / "digits-004.tar").write_bytes(b"<html>not found</html>" * 100)

    offsets = {}
    for s in (0, 1):
        with tarfile.open(folder / f"digits-{s:03d}.tar") as tar:
            offsets |= {name: tar.getmember(name).offset for name in tar.getnames()}
    bad = {
        "0/d0003": (offsets["d0003.png"], "undecodable image"),
        "1/d0012": (offsets["d0012.png"], "no label"),
        "1/d0017": (offsets["d0017.png"], "two members named .cls"),
    }
    lost = {"d0003", "d0012", "d0017", *(f"d{i:04d}" for i in (*range(26, 30), *range(40, 50)))}
    good = {}
    for i in range(60):
        png, label = digit_members[i]
        if f"d{i:04d}" not in lost:
            good[f"d{i:04d}"] = (int(label[1]), png[1])
    return Corpus(folder, good, bad)


@pytest.fixture(scope="module")
def prior() -> Prior:
    return load_prior(load_config().prior.path)


def settings(corpus: Corpus, **encoder: int) -> RunConfig:
    source = ["experiment=digits", "dataset=webdataset", f"dataset.path={corpus.folder}"]
    config = load_config([*source, "stages=[prepare,encode]"])
    return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, chunk_samples=CHUNK, **encoder))


def run_encode(config: RunConfig, run: Path, prior: Prior) -> tuple[dict, list[int]]:
    """Prepare and encode; returns the manifest and the shards in the order in which they were reported."""
    folder = Folder(str(run))
    events = Events(folder)
    facts = Networks(prior.id, tuple(prior.latent_shape), prior.image_size, None, 10, None, None, None, 0, 0, {})
    reported: list[int] = []
    data = prepare.run(config, folder, events)
    return encode.run(Run(config, folder, data, facts, events), reported.append), reported


@pytest.fixture(scope="module")
def encoded(corpus: Corpus, prior: Prior, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Refused at first by prepare, for the damaged shards; then with a larger fraction.

    `tests/test_bad_input.py` has one that encode refuses, and what goes on from there.
    """
    run = tmp_path_factory.mktemp("one") / "run"
    config = settings(corpus)
    with pytest.raises(
        ValueError, match=r"2 of 6 shards are damaged.*about 14 of 58 samples(.|\n)*digits-002"
    ) as error:
        run_encode(config, run, prior)
    assert "page of a web server" in str(error.value) and not run.exists()
    manifest, reported = run_encode(dataclasses.replace(config, max_bad_fraction=0.3), run, prior)
    assert manifest["refused"] == 60 - len(corpus.good)  # each of the 60 images is one or the other
    assert sorted(reported) == list(range(6))
    assert manifest["items"] == len(corpus.good)
    return run


def latents_of(run: Path) -> dict[str, tuple[int, np.ndarray]]:
    """key -> (class_id, latent fp16 [D]); each key at most once."""
    found: dict[str, tuple[int, np.ndarray]] = {}
    for file in sorted(run.glob("latents/*/*.parquet")):
        table = pq.read_table(file)
        if not table.num_rows:  # of the shard that is no tar
            continue
        class_ids = table["class_id"].to_pylist()
        assert class_ids == sorted(class_ids)
        for key, class_id, row in zip(
            table["key"].to_pylist(), class_ids, binary_rows(table["latent"], "<f2"), strict=True
        ):
            assert key not in found
            found[key] = (class_id, row)
    return found


def test_all_good_samples_are_in_the_log(encoded: Path, corpus: Corpus) -> None:
    found = latents_of(encoded)
    assert sorted(found) == sorted(corpus.good)
    assert all(found[key][0] == class_id for key, (class_id, _) in corpus.good.items())
    log = LatentLog(Folder(str(encoded / "latents")))
    for shard in range(6):
        done = log.done(shard)
        assert sum(done.classes.values()) == sum(chunk.rows for chunk in done.chunks)
    assert sum(sum(log.done(s).classes.values()) for s in range(6)) == len(corpus.good)
    assert log.done(4).classes == {}


def test_every_refused_sample_is_listed(encoded: Path, corpus: Corpus) -> None:
    lists = {
        int(p.stem.removeprefix("shard-")): [json.loads(line) for line in p.read_text().splitlines()]
        for p in encoded.glob("quarantine/*.jsonl")
    }
    assert sorted(lists) == [0, 1, 2, 4]
    for place, (offset, reason) in corpus.bad.items():
        shard, key = place.split("/")
        rows = [r for r in lists[int(shard)] if r["key"] == key]
        assert [r["offset"] for r in rows] == [offset] and rows[0]["reason"].startswith(reason), rows
    assert len(lists[0]) == 1 and len(lists[1]) == 2
    assert any("broken tar" in r["reason"] for r in lists[2])
    assert {r["key"] for r in lists[2]} <= {"", "d0026"}
    assert lists[4][0]["reason"].startswith("not a tar") and lists[4][0]["offset"] == 0
    log = LatentLog(Folder(str(encoded / "latents")))
    counted = {s: sum(r.get("samples", 1) for r in rows) for s, rows in lists.items()}
    assert {s: log.done(s).refused for s in lists} == counted == {0: 1, 1: 2, 2: 4, 4: 10}
    manifest = json.loads((encoded / "latents" / "manifest.json").read_text())
    assert manifest["refused"] == sum(counted.values())


def test_latents_are_what_the_prior_gives(encoded: Path, corpus: Corpus, prior: Prior) -> None:
    keys = sorted(corpus.good)
    pixels = np.stack([to_square(decode_rgb(corpus.good[k][1]), prior.image_size) for k in keys])
    expected = prior.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).flatten(1).numpy()
    found = latents_of(encoded)
    # fp16 rounding, and another batch size
    np.testing.assert_allclose(np.stack([found[k][1] for k in keys]), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_two_encoders_write_the_same_bytes(encoded: Path, corpus: Corpus, prior: Prior, tmp_path: Path) -> None:
    config = dataclasses.replace(settings(corpus, workers=2), max_bad_fraction=0.3)
    run_encode(config, tmp_path, prior)
    assert content(tmp_path) == content(encoded)
    assert sorted(p.name for p in tmp_path.glob("quarantine/*")) == sorted(p.name for p in encoded.glob("quarantine/*"))
    digests = [json.loads((run / "latents/manifest.json").read_text())["digest"] for run in (tmp_path, encoded)]
    assert digests[0] == digests[1]


def content(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.glob("latents/shard-*/*")}


def test_no_part_is_left_and_a_shard_is_one_small_file(encoded: Path) -> None:
    assert not (encoded / "latents" / "parts").exists()
    assert [len(list(encoded.glob(f"latents/shard-{s:06d}/*.parquet"))) for s in range(6)] == [1] * 6


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [0, 3])
def test_four_encoders_and_killed_ones_write_the_same_bytes(
    encoded: Path, corpus: Corpus, prior: Prior, tmp_path: Path, deaths: int
) -> None:
    """A pool that grows from two to four; a worker is killed whenever another part has appeared."""
    config = dataclasses.replace(settings(corpus, workers=2, max_workers=4), max_bad_fraction=0.2)
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        while len(killed) < deaths and not ended.wait(0.02):
            parts = list(tmp_path.glob("latents/**/chunk-*.parquet"))
            there = [pid for pid in encoder_processes() if pid not in killed]
            if len(parts) > len(killed) and there:
                os.kill(there[0], signal.SIGKILL)
                killed.append(there[0])

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        run_encode(config, tmp_path, prior)
    finally:
        ended.set()
        killer.join()
    assert len(killed) >= min(deaths, 1)
    assert content(tmp_path) == content(encoded)


def encoder_processes() -> list[int]:
    """The encoder actors of this process's own Ray."""
    import ray

    raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                title = (entry / "cmdline").read_text()
            except OSError:
                continue
            if parent == raylet and "MapBatches(Encoder)" in title:
                found.append(int(entry.name))
    return found


def test_the_reader_is_never_fused_into_the_encoder(corpus: Corpus, prior: Prior, tmp_path: Path) -> None:
    """With the same resources on both sides Ray Data would; each row tells the process that decoded it."""

    class WhichProcess:  # in place of the encoder: the operator that this actor runs
        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
            title = Path("/proc/self/cmdline").read_text()
            return {"name": [title.split("MapWorker(")[-1].split(").")[0]]}

    config = settings(corpus)
    same = dataclasses.replace(config.cluster, encoder=config.cluster.reader)
    todo = [{"shard": 3, "url": str(corpus.folder / "digits-003.tar"), "bytes": 1}]
    stream = chunk_stream(
        dataclasses.replace(config, cluster=same), todo, Folder(str(tmp_path)), 10, prior.image_size, 64
    )
    done = through_encoders(stream, same, (1, 1), WhichProcess, ()).take_all()
    assert len(done) == 3 and all(row["name"] == "MapBatches(WhichProcess)" for row in done)


def test_an_encoders_error_comes_in_its_own_words(corpus: Corpus, prior: Prior, tmp_path: Path) -> None:
    """Ray Data writes behind them how often it tried."""

    class Full:  # in place of the encoder: its disk is
        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
            raise ValueError("cannot write latents: No space left on device; choose another run_dir")

    todo = [{"shard": 3, "url": str(corpus.folder / "digits-003.tar"), "bytes": 1}]
    config = settings(corpus)
    stream = chunk_stream(config, todo, Folder(str(tmp_path)), 10, prior.image_size, 64)
    with pytest.raises(ValueError) as error:
        through_encoders(stream, config.cluster, (1, 1), Full, ()).take_all()
    assert user_error(error.value) == "cannot write latents: No space left on device; choose another run_dir"


@pytest.fixture(scope="module")
def autoencoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder") / "kl"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=8, scaling_factor=0.5,
            mid_block_add_attention=False,
        ).save_pretrained(folder)  # fmt: skip
    return folder


def test_the_batch_is_found_once_and_recorded(autoencoder_folder: Path, tmp_path: Path) -> None:
    config = load_config(["encoder.batch=0", f"encoder.path={autoencoder_folder}", "encoder.chunk_samples=16"])
    networks = Networks("some", (4, 4, 4), 8, None, 10, None, None, None, 0, 0, {}, "this")
    log, other = Folder(str(tmp_path / "log")), Folder(str(tmp_path / "other"))
    found = inner_batch(config, networks, log)
    record = log.read_json("batch.json")
    tried = sorted(map(int, record["images_per_s"]))
    assert record["batch"] == found and found in tried and tried == [2**i for i in range(len(tried))]
    assert max(tried) <= 16 and all(rate > 0 for rate in record["images_per_s"].values())
    log.publish_json("batch.json", record | {"batch": 11})  # what was recorded counts, not a second search
    assert inner_batch(config, networks, log) == 11
    assert inner_batch(config, networks, other, log) == 11 and not other.exists()
    assert inner_batch(load_config(), networks, log) == 64


def test_chunks_are_whole_batches(corpus: Corpus) -> None:
    config = load_config()
    assert chunk_rows(config, 256) == 256 and chunk_rows(config, 256, 96) == 192
    assert chunk_rows(config, 512, 96) == 64
    assert chunk_rows(settings(corpus), 256, 64) == CHUNK


def test_each_chunk_is_a_block_of_its_own(corpus: Corpus, tmp_path: Path) -> None:
    """It goes on to an encoder at once; Ray Data would collect rows until a block is full."""
    todo = [{"shard": 3, "url": str(corpus.folder / "digits-003.tar"), "bytes": 1}]
    config = settings(corpus)
    size = 1600  # a chunk is more than half of CHUNK_BYTES, as all are but the last of a shard
    assert CHUNK_BYTES // 2 < CHUNK * 3 * size**2 < CHUNK_BYTES
    stream = chunk_stream(config, todo, Folder(str(tmp_path)), 10, size, 64)
    blocks = [meta.num_rows for bundle in stream.iter_internal_ref_bundles() for meta in bundle.metadata]
    assert blocks == [1, 1, 1]


def test_what_changes_latents_is_in_their_identity(prior: Prior) -> None:
    def of(*overrides: str, encoder_id: str = "") -> dict:
        facts = Networks(prior.id, (8, 4, 4), 16, None, 10, None, None, None, 0, 0, {}, encoder_id)
        folder = Folder("runs/none")
        run = Run(load_config([*overrides]), folder, Data(folder, (), (), ()), facts, Events(folder))
        return encode.Encode().identity(run)

    plain = of()
    assert of("encoder.workers=3", "encoder.max_workers=5", "seed=5") == plain
    for change in ("posterior=sample", "dtype=bfloat16", "channels_last=true", "compile=true", "batch=3"):
        assert of(f"encoder.{change}") != plain
    assert of("encoder.posterior=sample", "seed=5") != of("encoder.posterior=sample")
    assert of("encoder.path=x", encoder_id="a") == of("encoder.path=y", encoder_id="a") != plain


def test_a_finished_log_is_reused(encoded: Path, corpus: Corpus, prior: Prior) -> None:
    before = {p: p.stat().st_mtime_ns for p in encoded.glob("latents/**/*")}
    config = dataclasses.replace(settings(corpus, workers=2), max_bad_fraction=0.2)  # workers change nothing
    _, reported = run_encode(config, encoded, prior)
    assert reported == list(range(6))
    assert {p: p.stat().st_mtime_ns for p in encoded.glob("latents/**/*")} == before
    with pytest.raises(ValueError, match=r"encoder\.batch: 64 there, 8 now"):
        run_encode(settings(corpus, batch=8), encoded, prior)
