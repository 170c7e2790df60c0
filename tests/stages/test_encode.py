"""The encode stage on shards with every kind of damage: what is good is encoded, what is not is listed."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ddoq_ray.artifacts import Folder
from ddoq_ray.config import RunConfig
from ddoq_ray.config.compose import load_config
from ddoq_ray.models.prior import Prior, load_prior
from ddoq_ray.records import binary_rows
from ddoq_ray.runtime import Events
from ddoq_ray.samples import decode_rgb, to_square, write_tar
from ddoq_ray.stages import encode, prepare
from ddoq_ray.stages.latent_log import LatentLog
from ddoq_ray.stages.networks import Networks

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
    config = load_config(["dataset=webdataset", f"dataset.path={corpus.folder}", "stages=[prepare,encode]"])
    return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, chunk_samples=CHUNK, **encoder))


def run_encode(config: RunConfig, run: Path, prior: Prior) -> tuple[dict, list[int]]:
    """Prepare and encode; returns the manifest and the shards in the order in which they were reported."""
    folder = Folder(str(run))
    events = Events(folder)
    facts = Networks(prior.id, tuple(prior.latent_shape), prior.image_size, None, 10, None, None, None, 0, 0, {})
    reported: list[int] = []
    data = prepare.run(config, folder, events)
    return encode.run(config, folder, data, events, facts, reported.append), reported


@pytest.fixture(scope="module")
def encoded(corpus: Corpus, prior: Prior, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Refused at first, with the default max_bad_fraction; then the same run with a larger one."""
    run = tmp_path_factory.mktemp("one") / "run"
    config = settings(corpus)
    with pytest.raises(ValueError, match=r"more than max_bad_fraction=0\.01") as error:
        run_encode(config, run, prior)
    for words in ("samples refused", str(run / "quarantine"), "mend the shards", "run again"):
        assert words in str(error.value)
    assert not (run / "latents" / "manifest.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in run.glob("latents/shard-*/done.json")}
    assert kept  # what is encoded stays
    manifest, reported = run_encode(dataclasses.replace(config, max_bad_fraction=0.2), run, prior)
    assert sorted(reported) == list(range(6))
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
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
        assert class_ids == sorted(class_ids) and table.num_rows <= CHUNK
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
    assert {s: log.done(s).refused for s in lists} == {s: len(rows) for s, rows in lists.items()}
    manifest = json.loads((encoded / "latents" / "manifest.json").read_text())
    assert manifest["refused"] == sum(map(len, lists.values()))


def test_latents_are_what_the_prior_gives(encoded: Path, corpus: Corpus, prior: Prior) -> None:
    keys = sorted(corpus.good)
    pixels = np.stack([to_square(decode_rgb(corpus.good[k][1]), prior.image_size) for k in keys])
    expected = prior.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).flatten(1).numpy()
    found = latents_of(encoded)
    # fp16 rounding, and another batch size
    np.testing.assert_allclose(np.stack([found[k][1] for k in keys]), expected, rtol=2e-3, atol=2e-3)


def test_two_encoders_write_the_same_bytes(encoded: Path, corpus: Corpus, prior: Prior, tmp_path: Path) -> None:
    config = dataclasses.replace(settings(corpus, workers=2), max_bad_fraction=0.2)
    run_encode(config, tmp_path, prior)

    def content(run: Path) -> dict[str, bytes]:
        return {str(p.relative_to(run)): p.read_bytes() for p in run.glob("latents/shard-*/*")}

    assert content(tmp_path) == content(encoded)
    assert sorted(p.name for p in tmp_path.glob("quarantine/*")) == sorted(p.name for p in encoded.glob("quarantine/*"))
    digests = [json.loads((run / "latents/manifest.json").read_text())["digest"] for run in (tmp_path, encoded)]
    assert digests[0] == digests[1]


def test_a_finished_log_is_reused(encoded: Path, corpus: Corpus, prior: Prior) -> None:
    before = {p: p.stat().st_mtime_ns for p in encoded.glob("latents/**/*")}
    config = dataclasses.replace(settings(corpus, workers=2), max_bad_fraction=0.2)  # workers change nothing
    _, reported = run_encode(config, encoded, prior)
    assert reported == list(range(6))
    assert {p: p.stat().st_mtime_ns for p in encoded.glob("latents/**/*")} == before
    with pytest.raises(ValueError, match=r"encoder\.batch: 64 there, 8 now"):
        run_encode(settings(corpus, batch=8), encoded, prior)
