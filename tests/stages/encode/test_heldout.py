"""Held-out latents, and the codebooks measured on them: against the prior and core in this process."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.stale_listing import stale_listings

from ddoq_ray.config import RunConfig
from ddoq_ray.config.compose import load_config
from ddoq_ray.core.distortion import assign, distortion, scheme_weights, voronoi_counts, w2_squared
from ddoq_ray.data.samples import decode_rgb, to_square
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Events
from ddoq_ray.models.priors.load import load_prior
from ddoq_ray.pipeline import check_run_dir, steps
from ddoq_ray.stages.encode import step as encode
from ddoq_ray.stages.encode.heldout import Heldout, shares
from ddoq_ray.stages.prepare import step as prepare
from ddoq_ray.stages.prepare.step import Data
from ddoq_ray.stages.report.step import class_distances
from ddoq_ray.storage.artifact import Artifact, with_check
from ddoq_ray.storage.class_latents import class_latents
from ddoq_ray.storage.codebook import Account, write_part
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import Place
from ddoq_ray.storage.records import ClassCounts, Codebook, ShardDone

pytestmark = pytest.mark.usefixtures("ray_here")

SHARDS, PER_SHARD, LIMIT, CHUNK = 3, 30, 6, 7
Samples = list[list[tuple[str, bytes]]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A prepared run of three validation shards, the second one with a bad picture, and one training shard."""

    config: RunConfig
    run: Folder
    data: Data
    networks: Networks
    latents: Folder

    def start(self, **report: int) -> Heldout:
        config = dataclasses.replace(self.config, report=dataclasses.replace(self.config.report, **report))
        heldout = Heldout(self.of(config))
        heldout.start()
        return heldout

    def of(self, config: RunConfig) -> Run:
        log = dataclasses.replace(config.latents, path=self.latents.uri)
        return Run(dataclasses.replace(config, latents=log), self.run, self.data, self.networks, Events(self.run))


@pytest.fixture(scope="module")
def expected(digit_members: Samples) -> dict[int, np.ndarray]:
    """class_id -> latents of its first LIMIT usable images, from the prior in this process."""
    first: dict[int, list[np.ndarray]] = {c: [] for c in range(10)}
    for i, (png, label) in enumerate(digit_members[: SHARDS * PER_SHARD]):
        if i != PER_SHARD + 2 and len(first[int(label[1])]) < LIMIT:
            first[int(label[1])].append(to_square(decode_rgb(png[1]), 16))
    prior = load_prior(load_config().prior.path)
    found = {}
    for c, images in first.items():
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        found[c] = prior.encode(pixels).flatten(1).numpy()
    return found


@pytest.fixture(scope="module")
def case(
    tmp_path_factory: pytest.TempPathFactory, write_corpus: Callable[..., Path], digit_members: Samples
) -> tuple[Case, dict]:
    base = tmp_path_factory.mktemp("heldout")
    shards = write_corpus(base / "shards", SHARDS, PER_SHARD)
    broken = [list(sample) for sample in digit_members[PER_SHARD : 2 * PER_SHARD]]
    broken[2][0] = (broken[2][0][0], b"\x89PNG no picture")
    (shards / "digits-001.tar").write_bytes(write_tar([m for sample in broken for m in sample]))
    train = base / "train.tar"
    train.write_bytes(write_tar([m for sample in digit_members[200:230] for m in sample]))
    overrides = [
        "experiment=digits",
        "dataset=webdataset",
        f"dataset.path={train}",
        f"dataset.val_path={shards}",
        "encoder.workers=2",
    ]
    overrides.append(f"dataset.classes={shards}/classes.json")
    config = load_config([*overrides, f"encoder.chunk_samples={CHUNK}", f"report.heldout_images={LIMIT}"])
    run = Folder(str(base / "run"))
    prior = load_prior(config.prior.path)
    networks = Networks(prior.id, tuple(prior.latent_shape), prior.image_size, None, 10, None, None, None, 0, 0, {})
    data = prepare.run(config, run, Events(run))
    latents = run / "latents"
    identity = encode.Encode().identity(Run(config, run, data, networks, Events(run)))
    Artifact(latents, "encode").finish(identity, kept=True)
    made = Case(config, run, data, networks, latents)
    return made, made.start().wait()


def found(case: Case) -> dict[int, np.ndarray]:
    return dict(class_latents(case.run / "heldout", SHARDS, range(10)))


def test_shares_take_the_first_images_of_each_class(case: tuple[Case, dict]) -> None:
    parts = shares(case[0].data, LIMIT)
    assert [shard for shard, _, _ in parts] == [0, 1, 2]
    total: Counter[int] = Counter()
    for (_, _, mine), info in zip(parts, case[0].data.val, strict=True):
        for c, n in mine.items():
            assert n == min(info.images[c], LIMIT - total[c])
            total[c] += n
    assert set(total.values()) == {LIMIT}


def test_latents_are_those_of_the_prior_and_at_most_the_limit(
    case: tuple[Case, dict], expected: dict[int, np.ndarray]
) -> None:
    latents = found(case[0])
    assert sorted(latents) == list(range(10))
    lost = 0
    for c, x in latents.items():
        # The bad picture is not replaced: its class may have one less.
        lost += LIMIT - len(x)
        wanted = expected[c][: len(x)]
        np.testing.assert_allclose(x, wanted, rtol=2e-3, atol=2e-3)  # fp16 rounding, and another batch size
    assert lost <= 1
    assert case[1] == {"images_per_class": LIMIT, "images": 10 * LIMIT - lost, "missing": ""}
    assert max(len(pq.read_table(p)) for p in Path((case[0].run / "heldout").uri).glob("*/*.parquet")) <= CHUNK


def test_a_second_report_encodes_nothing_and_a_cut_off_one_goes_on(case: tuple[Case, dict]) -> None:
    made, facts = case
    before = {p: p.stat().st_mtime_ns for p in Path((made.run / "heldout").uri).rglob("*.*")}
    assert made.start().wait() == facts
    assert {p: p.stat().st_mtime_ns for p in before} == before
    heldout = made.run / "heldout"
    kept = (heldout / "shard-000000").read("done.json")
    for name in ("manifest.json", "shard-000001/done.json"):
        heldout.remove(name)
    assert made.start().wait() == facts
    assert (heldout / "shard-000000").read("done.json") == kept
    times = {p.name: p.stat().st_mtime_ns for p in Path(heldout.uri).glob("shard-000002/*")}
    assert times == {p.name: t for p, t in before.items() if p.parent.name == "shard-000002"}


def test_none_is_left_out_where_listings_are_old(
    case: tuple[Case, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other machines have made the folders of the shards, of which NFS may tell the driver half a minute later."""
    made = dataclasses.replace(case[0], run=Folder(str(tmp_path)))
    stale_listings(monkeypatch)
    assert made.start().wait() == case[1]
    digest = (made.run / "heldout").read_json("manifest.json")["digest"]
    assert digest == (case[0].run / "heldout").read_json("manifest.json")["digest"]


def test_latents_that_were_not_kept_are_made_again(case: tuple[Case, dict]) -> None:
    made, facts = case
    before = found(made)
    encode.discard(made.run / "heldout", Events(made.run))
    assert not (made.run / "heldout").names("*/*.parquet")
    assert made.start().wait() == facts
    assert all((x == before[c]).all() for c, x in found(made).items())


def test_another_limit_is_refused_by_name(case: tuple[Case, dict]) -> None:
    made = case[0]
    with pytest.raises(ValueError, match="heldout_images: 6 there, 5 now"):
        made.start(heldout_images=5)
    asked = load_config([f"run_dir={made.run.uri}", "report.heldout_images=5", "stages=[report]"])
    with pytest.raises(ValueError, match="heldout_images: 6 there, 5 now"):  # before Ray starts
        asked = dataclasses.replace(asked, dataset=made.config.dataset)
        check_run_dir(asked, made.run, steps(asked))


def test_what_is_missing_is_said(case: tuple[Case, dict], tmp_path: Path) -> None:
    made = dataclasses.replace(case[0], run=Folder(str(tmp_path)))
    assert "heldout_images is 0" in made.start(heldout_images=0).wait()["missing"]
    assert "no held-out split" in dataclasses.replace(made, data=dataclasses.replace(made.data, val=())).start().missing
    assert "not stored" in dataclasses.replace(made, latents=Folder(str(tmp_path / "none"))).start().missing
    other = dataclasses.replace(made.networks, prior_id="other")
    assert "another prior" in dataclasses.replace(made, networks=other).start().missing
    assert not made.run.exists("heldout")


def test_held_out_images_are_encoded_as_the_log_was(case: tuple[Case, dict], tmp_path: Path) -> None:
    """Whatever this run's own settings are: `latents.path` may be of a run with others."""
    made = dataclasses.replace(case[0], run=Folder(str(tmp_path / "run")), latents=Folder(str(tmp_path / "log")))
    manifest = case[0].latents.read_json("manifest.json")
    there = manifest["identity"]["encoder"] | {"posterior": "sample", "batch": 3}
    made.latents.publish_json(
        "manifest.json", with_check(manifest | {"identity": manifest["identity"] | {"encoder": there}})
    )
    assert made.config.encoder.posterior == "mode"
    made.start().wait()
    assert (made.run / "heldout").read_json("manifest.json")["identity"]["encoder"] == there
    drawn, means = found(made), found(case[0])
    assert all(len(drawn[c]) == len(means[c]) and (drawn[c] != means[c]).any() for c in means)

    other = manifest["identity"] | {"encoder": there | {"path": "another"}}
    made.latents.publish_json("manifest.json", with_check(manifest | {"identity": other}))
    assert "another autoencoder" in made.start().missing


def test_distances_seen_and_unseen_are_those_of_core(case: tuple[Case, dict]) -> None:
    """One codebook, fitted to nothing, with an empty cell and stale streaming counts."""
    made = case[0]
    made.start().wait()
    seen = found(made)  # in the place of the training latents
    shape = made.networks.latent_shape
    place = made.run / "some"
    rng = np.random.default_rng(0)
    books = {}
    for c in (2, 3):
        centroids = np.concatenate([seen[c][:3] + 0.1, np.full((1, seen[c].shape[1]), 50)]).astype(np.float32)
        books[c] = (centroids, voronoi_counts(seen[c], centroids), rng.integers(1, 9, 4))
    assert all(counts[3] == 0 for _, counts, _ in books.values())
    facts = {"latent_shape": shape, "prior_id": "prior"}
    made_of = [
        Codebook(c, centroids, counts, float(assign(seen[c], centroids)[1].mean()), stream)
        for c, (centroids, counts, stream) in books.items()
    ]
    write_part(place / "codebook", 0, made_of, Account([], {}, []), **facts)

    shards = dataclasses.replace(made.data, train=made.data.val)
    run = dataclasses.replace(made, latents=made.run / "heldout", data=shards).of(made.config)
    codebooks = {"ddoq": Place("some")}
    first = (made.run / "heldout", 1)  # of the held-out log only the first shard
    unseen = dict(class_latents(*first, range(10)))
    rows = class_distances(run, codebooks, first)
    assert [r["class_id"] for r in rows] == [2, 3]
    for row in rows:
        c = row["class_id"]
        centroids, counts, stream = books[c]
        assert row["name"] == made.data.classes[c].name and row["n"] == len(seen[c]) and row["k"] == 4
        assert row["w2_voronoi"] ** 2 == pytest.approx(row["distortion"], rel=1e-6)
        for key, weights in {
            "w2_uniform": np.full(4, 0.25),
            "w2_sqrt": np.sqrt(counts) / np.sqrt(counts).sum(),
            "w2_stream": stream / stream.sum(),
        }.items():
            assert row[key] ** 2 == pytest.approx(w2_squared(seen[c], centroids, weights), rel=1e-9), key
            assert row[key] > row["w2_voronoi"]
        assert row["heldout_n"] == len(unseen[c])
        assert row["heldout_distortion"] == pytest.approx(distortion(unseen[c], centroids), rel=1e-9)
        own = w2_squared(unseen[c], centroids, scheme_weights(counts))
        assert row["heldout_w2_voronoi"] ** 2 == pytest.approx(own, rel=1e-9)
        assert row["heldout_w2_voronoi"] ** 2 >= row["heldout_distortion"] * (1 - 1e-9)
    bare = class_distances(run, codebooks, None)
    assert bare == [{k: v for k, v in row.items() if not k.startswith("heldout")} for row in rows]
    (place / "nothing").publish("shard-000000/done.json", ShardDone(0, (), ClassCounts({}), 0).dumps())
    assert class_distances(run, codebooks, (place / "nothing", 1)) == bare
