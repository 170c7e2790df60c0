"""The encode stage on the corpus of malformed shards: good samples are encoded, bad ones listed, nothing is lost."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.corpus import NUM_CLASSES, Shard, malformed

from ddoq_ray.config.compose import load_config
from ddoq_ray.data.tar_samples import DAMAGE
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Events
from ddoq_ray.models.priors.load import load_prior
from ddoq_ray.stages.encode import reader as encode_reader
from ddoq_ray.stages.encode import step as encode
from ddoq_ray.stages.prepare import step as prepare
from ddoq_ray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")

# A label outside the class list stops `prepare`; how much of a cut gzip is readable is the compression's affair.
CORPUS = {name: shard for name, shard in malformed().items() if name not in ("labels", "packed-cut")}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The run of the whole corpus, a tar a shard in the order of their names; its manifest."""
    root = tmp_path_factory.mktemp("malformed")
    (root / "shards").mkdir()
    for name, shard in CORPUS.items():
        (root / f"shards/{name}.tar").write_bytes(shard.tar())
    (root / "shards/classes.json").write_text(json.dumps(["a", "b", "c"][:NUM_CLASSES]))
    source = ["experiment=digits", "dataset=webdataset", f"dataset.path={root / 'shards'}"]
    config = load_config([*source, "stages=[prepare,encode]"])
    config = dataclasses.replace(config, max_bad_fraction=1.0)
    folder = Folder(str(root / "run"))
    events = Events(folder)
    prior = load_prior(config.prior.path)
    facts = Networks(prior.id, tuple(prior.latent_shape), prior.image_size, None, 10, None, None, None, 0, 0, {})
    data = prepare.run(config, folder, events)
    return root / "run", encode.run(Run(config, folder, data, facts, events), lambda shard: None)


def numbered() -> list[tuple[int, Shard]]:
    return list(enumerate(CORPUS[name] for name in sorted(CORPUS, key="{}.tar".format)))


def test_every_good_sample_is_encoded_with_its_label(encoded: tuple[Path, dict]) -> None:
    run, manifest = encoded
    for index, shard in numbered():
        tables = [pq.read_table(p) for p in sorted((run / f"latents/shard-{index:06d}").glob("*.parquet"))]
        rows = [(k, c) for t in tables for k, c in zip(t["key"].to_pylist(), t["class_id"].to_pylist(), strict=True)]
        assert sorted(rows) == sorted((key, class_id) for key, (class_id, _, _) in shard.good.items())
    assert manifest["items"] == sum(len(shard.good) for shard in CORPUS.values())


def test_every_bad_sample_is_in_quarantine(encoded: tuple[Path, dict]) -> None:
    run, manifest = encoded
    listed = 0
    for index, shard in numbered():
        file = run / f"quarantine/shard-{index:06d}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        assert [row["offset"] for row in rows] == sorted(row["offset"] for row in rows)
        assert {(row["offset"], row["key"]) for row in rows} == {(offset, key) for offset, key, _ in shard.bad}
        reasons = {(offset, key): reason for offset, key, reason in shard.bad}
        assert all(row["reason"].startswith(reasons[row["offset"], row["key"]]) for row in rows)
        listed += sum(row.get("samples", 1) for row in rows)
    assert manifest["refused"] == listed >= sum(len(shard.bad) for shard in CORPUS.values())


def test_the_manifest_sums_up_by_reason(encoded: tuple[Path, dict]) -> None:
    _, manifest = encoded
    expected = Counter(reason.split(":")[0] for shard in CORPUS.values() for _, _, reason in shard.bad)
    found = manifest["refused_by_reason"]
    assert sum(found.values()) == manifest["refused"]
    for reason, n in expected.items():  # the corpus has the beginnings of some reasons only
        counted = sum(m for words, m in found.items() if words.startswith(reason))
        assert counted >= n if reason.startswith(DAMAGE) else counted == n  # damage counts for all that it took
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_squares_of_another_kind_are_other_latents() -> None:
    """What `encoder.resize` changes belongs to the identity of the latents."""
    squash, crop = (
        encode.Encode().settings(load_config([f"encoder.resize={mode}"])) for mode in ("squash", "center-crop")
    )
    assert squash["encoder"]["resize"] == "squash" and squash != crop


@pytest.mark.parametrize("mode", ["squash", "center-crop", "pad"])
def test_chunks_hold_the_squares_that_were_asked_for(tmp_path: Path, mode: str) -> None:
    from ddoq_ray.data.pictures import to_square
    from ddoq_ray.data.samples import read_samples

    path = tmp_path / "x.tar"
    path.write_bytes(CORPUS["formats"].tar())
    batch = {"shard": np.array([0]), "url": np.array([str(path)])}
    rows = encode_reader.read_chunks(
        batch, quarantine=Folder(str(tmp_path)), num_classes=3, image_size=16, chunk_samples=7, resize=mode
    )
    pixels = b"".join(row["pixels"][0] for row in rows)
    samples = read_samples(str(path), 3, lambda bad: pytest.fail(str(bad)))
    assert pixels == b"".join(to_square(s.image, 16, mode).tobytes() for s in samples)


def test_a_chunk_that_is_too_large_for_a_table_is_told_by_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(CORPUS["formats"].tar())
    batch = {"shard": np.array([0]), "url": np.array([str(path)])}
    how = {"quarantine": Folder(str(tmp_path)), "num_classes": 3, "image_size": 16}
    monkeypatch.setattr(encode_reader, "MOST_BYTES", 3 * 3 * 16**2)
    assert all(table.num_rows == 1 for table in encode_reader.read_tables(batch, chunk_samples=3, **how))
    with pytest.raises(ValueError, match=r"encoder\.chunk_samples: .* 4 images .* at most 2,304; give fewer"):
        list(encode_reader.read_tables(batch, chunk_samples=4, **how))
