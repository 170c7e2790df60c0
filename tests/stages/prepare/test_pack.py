"""Packing: which sample goes where, the same bytes however it is worked on, and nothing lost without a word."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddoq_ray.config.compose import load_config
from ddoq_ray.data.collections import DIGIT_NAMES, digits
from ddoq_ray.data.collections.listing import Listing
from ddoq_ray.data.pictures import encode_png
from ddoq_ray.data.samples import load_arrays
from ddoq_ray.data.shard_index import index_shard
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.execution.workers import Events
from ddoq_ray.stages.prepare import step as prepare
from ddoq_ray.stages.prepare.pack import class_order, cut, hold_out
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.records import ClassInfo, read_shards

Files = dict[str, bytes]


# Plans: pure.


def listing(counts: list[int]) -> Listing:
    ids = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    return Listing([f"{i:04d}" for i in range(len(ids))], ids, np.full(len(ids), 100, np.int64))


def test_order_is_class_sorted_and_shuffled_by_the_seed_within() -> None:
    there = listing([30, 0, 50])
    first, second = class_order(there, 0, "train")
    assert sorted(first.tolist()) == list(range(30)) != first.tolist()
    assert sorted(second.tolist()) == list(range(30, 80)) != second.tolist()
    again, other = class_order(there, 0, "train"), class_order(there, 1, "train")
    assert np.array_equal(first, again[0]) and not np.array_equal(first, other[0])
    assert not np.array_equal(first, class_order(there, 0, "val")[0])
    # One class's order does not depend on what else is there.
    assert np.array_equal(class_order(listing([30]), 0, "train")[0], first)


def test_held_out_images_are_stratified_and_leave_some_to_train_on() -> None:
    classes = [ClassInfo(i, f"c{i}", f"c{i}") for i in range(3)]
    order = class_order(listing([30, 7, 50]), 0, "train")
    train, held = hold_out(order, 0.1, classes, [0, 1, 2])
    assert [len(h) for h in held] == [3, 1, 5]
    assert [sorted([*t, *h]) for t, h in zip(train, held, strict=True)] == [sorted(o) for o in order]
    assert [len(h) for h in hold_out(order, 6, classes, [0, 1, 2])[1]] == [6, 6, 6]
    with pytest.raises(ValueError, match=r"heldout=7 leaves no training image in 1 classes: c1 \(7\)"):
        hold_out(order, 7, classes, [0, 1, 2])
    with pytest.raises(ValueError, match=r"heldout=0.001 holds out no image"):
        hold_out(order, 0.001, classes, [0, 1, 2])


def test_shards_hold_at_most_so_many_samples_and_bytes() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 5000, 200)
    sizes[17] = 100_000  # larger than a shard: alone in one
    order = [rng.permutation(200)]
    shards = cut(order, sizes, 30, 40_000)
    assert np.array_equal(np.concatenate(shards), order[0])
    weight = [int((sizes[s] + 1536).sum()) for s in shards]
    assert all(len(s) <= 30 and (w <= 40_000 or len(s) == 1) for s, w in zip(shards, weight, strict=True))
    for here, after, w in zip(shards, shards[1:], weight, strict=False):  # none could have taken one more
        assert len(here) == 30 or w + sizes[after[0]] + 1536 > 40_000
    assert cut([], sizes, 3, 10) == []


# Trees, through Ray.


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """The digits 0 to 3 of the selection split as a tree, a few broken files among them."""
    root = tmp_path_factory.mktemp("tree")
    for i, (pixels, c) in enumerate(zip(*digits()["selection"], strict=True)):
        if c < 4:
            path = root / DIGIT_NAMES[c] / f"scan {i % 3}" / f"{i}.{'PNG' if i % 2 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(pixels))
    (root / "one/text.jpg").write_text("no picture")
    (root / "two/empty.png").write_bytes(b"")
    (root / "two/notes.txt").write_text("no picture")
    return root


def go(run: Path, *overrides: str) -> prepare.Data:
    config = load_config([f"run_dir={run}", "stages=[prepare]", "max_bad_fraction=0.1", *overrides])
    return prepare.run(config, Folder(str(run)), Events(Folder(str(run))))


def tree_keys(tree: Path) -> list[str]:
    return [f"dataset.path={tree}", "dataset.shard_samples=20"]


def files(run: Path) -> Files:
    logs = ("events.jsonl", "manifest.json", "started.json")
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in logs}


def members(tar: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(tar) as t:
        return [(m.name, t.extractfile(m).read()) for m in t]  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def packed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("packed") / "run"
    go(run, *tree_keys(tree))
    return run


def test_every_image_is_there_once_with_its_bytes_and_label(tree: Path, packed: Path) -> None:
    names = sorted(DIGIT_NAMES[:4])
    written = {str(p.relative_to(tree)): p.read_bytes() for p in tree.rglob("*.[pP][nN][gG]") if p.stat().st_size}
    found: Files = {}
    class_ids = []
    for tar in sorted((packed / "data/train").glob("*.tar")):
        record = json.loads((packed / f"data/records/{tar.stem}.json").read_text())
        origins = dict(record["origins"])
        inside = members(tar)
        assert write_tar(inside) == tar.read_bytes()  # nothing of this machine or of now
        for (image, data), (label, text) in zip(inside[::2], inside[1::2], strict=True):
            key, _, extension = image.partition(".")
            assert (label, extension) == (f"{key}.cls", "png")
            found[origins[key]] = data
            class_ids.append(int(text))
            assert origins[key].split("/")[0] == names[int(text)]
    assert found == written
    assert class_ids == sorted(class_ids)
    shards = list(read_shards((packed / "data/shards.json").read_bytes()))
    assert sum(20 - s.samples for s in shards[:-1]) in (1, 2)  # the refused ones leave their places empty
    assert sum(s.samples for s in shards) == len(written)
    for shard in shards:
        assert index_shard(str(packed / shard.path), 4).digest == shard.digest


def test_what_is_refused_is_named_and_counted(packed: Path) -> None:
    lines = [
        json.loads(line) for p in sorted((packed / "data/quarantine").iterdir()) for line in p.read_text().splitlines()
    ]
    assert {(r["name"], r["reason"]) for r in lines} == {
        ("two/notes.txt", "no image extension"), ("one/text.jpg", "not an image in a known format"),
        ("two/empty.png", "empty file"),
    }  # fmt: skip
    facts = json.loads((packed / "data/manifest.json").read_text())["summary"]
    assert facts["refused"] == {"not an image in a known format": 1, "empty file": 1}
    assert facts["not_listed"] == {"no image extension": 1}
    assert facts["train"]["images"] == sum(Counter(digits()["selection"][1].tolist())[c] for c in range(4))


def test_any_number_of_workers_gives_the_same_files(tree: Path, packed: Path, tmp_path: Path) -> None:
    go(tmp_path / "one", *tree_keys(tree), "cluster.reader.num_cpus=2")
    assert files(tmp_path / "one") == files(packed)
    go(tmp_path / "seed", *tree_keys(tree), "seed=1")
    assert files(tmp_path / "seed").keys() == files(packed).keys()
    assert files(tmp_path / "seed")["data/train/train-000000.tar"] != files(packed)["data/train/train-000000.tar"]


def test_a_cut_off_run_goes_on(tree: Path, packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(run, *tree_keys(tree))
    data = run / "data"
    whole = files(run)
    (data / "manifest.json").unlink()
    (data / "records/train-000001.json").unlink()  # killed before its record
    (data / "train/train-000002.tar").write_bytes(b"cut")  # gone wrong since
    (data / "train/train-000099.tar").write_bytes(b"of a source that held more")
    before = {p.name: p.stat().st_mtime_ns for p in (data / "train").glob("*.tar")}
    go(run, *tree_keys(tree))
    assert files(run) == whole == files(packed)
    after = {p.name: p.stat().st_mtime_ns for p in (data / "train").glob("*.tar")}
    assert {n for n in after if after[n] != before[n]} == {"train-000001.tar", "train-000002.tar"}
    go(run, *tree_keys(tree))  # done: nothing at all is written
    assert {p.name: p.stat().st_mtime_ns for p in (data / "train").glob("*.tar")} == after
    with pytest.raises(ValueError, match=r"shard_samples: 20 there, 30 now"):
        go(run, f"dataset.path={tree}", "dataset.shard_samples=30")


def test_another_run_reads_the_shards_where_they_are(packed: Path, tmp_path: Path) -> None:
    first, second = prepare.Data.load(Folder(str(packed))), go(tmp_path / "run", f"dataset.path={packed}/data/train")
    assert second.counts == first.counts
    assert second.classes == first.classes
    assert [s.digest for s in second.train] == [s.digest for s in first.train]


def test_held_out_part(tree: Path, packed: Path, tmp_path: Path) -> None:
    data = go(tmp_path / "run", *tree_keys(tree), "dataset.heldout=5")
    everything = prepare.Data.load(Folder(str(packed))).counts
    assert {c: n - data.counts[c] for c, n in everything.items()} == dict.fromkeys(range(4), 5)
    pictures = {}
    for split, urls in (("train", data.train_urls), ("val", data.val_urls)):
        images, class_ids, keys = load_arrays(urls, 8, 4)
        assert all(k.startswith(f"{split}-") for k in keys)
        pictures[split] = {k.split("-")[1] for k in keys}
        if split == "val":
            assert Counter(class_ids.tolist()) == dict.fromkeys(range(4), 5)
            assert len(images) == 20
    assert not pictures["train"] & pictures["val"]
    assert (tmp_path / "run/data/val/classes.json").exists()
    with pytest.raises(ValueError, match=r"no validation images.*dataset.heldout=0.1"):
        config = [f"run_dir={tmp_path}/other", "experiment=digits", f"dataset.path={tree}", "dataset=imagefolder"]
        prepare.run(load_config(config), Folder(str(tmp_path / "other")), Events(Folder(str(tmp_path / "other"))))
    assert not (tmp_path / "other").exists()


def test_too_many_bad_files_stop_the_run_and_can_be_allowed(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 of 1\d\d images .*empty file: 1.*max_bad_fraction=0.01.*quarantine"):
        go(tmp_path / "run", *tree_keys(tree), "max_bad_fraction=0.01")
    go(tmp_path / "run", *tree_keys(tree))


def test_a_source_that_is_wrong_leaves_nothing_behind(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "tree/a").mkdir(parents=True)
    for overrides, words in (
        (["dataset=imagefolder", f"dataset.path={tmp_path}/none"], "does not exist"),
        (["dataset=imagefolder", f"dataset.path={tmp_path}/tree"], "no image file in 1 class folders"),
        ([f"dataset.path={tree}", "dataset.classes=/none.json"], "no class list at"),
    ):
        with pytest.raises(ValueError, match=words):
            go(tmp_path / "run", *overrides)
    assert not (tmp_path / "run/data").exists()


def test_shards_are_sorted_anew_only_when_asked(tmp_path: Path, ray_here: None) -> None:
    images, class_ids = (a[:90] for a in digits()["train"])
    shards = tmp_path / "mixed"
    shards.mkdir()
    for shard in range(3):
        inside = []
        for i in range(30 * shard, 30 * shard + 30):
            inside += [
                (f"same-{i % 30}.png", encode_png(images[i])),
                (f"same-{i % 30}.cls", str(class_ids[i]).encode()),
            ]
        (shards / f"any name {shard}.tar").write_bytes(write_tar([*inside, ("alone.png", b"")]))
    (shards / "classes.json").write_text(json.dumps(DIGIT_NAMES))
    as_they_are = go(tmp_path / "here", f"dataset.path={shards}")
    assert [Path(u).parent for u in as_they_are.train_urls] == [shards] * 3
    assert not list((tmp_path / "here/data").glob("*/*.tar"))
    data = go(tmp_path / "anew", "dataset=webdataset", f"dataset.path={shards}", "dataset.resort=true",
              "dataset.shard_samples=40", "dataset.heldout=1")  # fmt: skip
    got, labels, keys = load_arrays(data.train_urls, 8, 10)
    held, held_labels, _ = load_arrays(data.val_urls, 8, 10)
    assert labels.tolist() == sorted(labels.tolist()) and len(set(keys)) == len(keys) == 80
    assert sorted(held_labels.tolist()) == list(range(10))
    both = Counter((x[0].tobytes(), int(c)) for x, c in zip([*got, *held], [*labels, *held_labels], strict=True))
    assert both == Counter((x.tobytes(), int(c)) for x, c in zip(images, class_ids, strict=True))
    facts = json.loads((tmp_path / "anew/data/manifest.json").read_text())["summary"]
    assert facts["not_listed"] == {"no label (.cls)": 3}
    assert not (tmp_path / "anew/data/scratch").exists()


def test_parquet_through_ray(tmp_path: Path, ray_here: None) -> None:
    images, class_ids = (a[:60] for a in digits()["train"])
    feature = {"label": {"_type": "ClassLabel", "names": list(DIGIT_NAMES)}, "image": {"_type": "Image"}}
    for part in range(2):
        rows = [{"bytes": encode_png(x), "path": None} for x in images[part::2]]
        table = pa.table({"image": rows, "label": class_ids[part::2]})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
        pq.write_table(table, tmp_path / f"train-{part}.parquet", row_group_size=7)
    data = go(tmp_path / "run", f"dataset.path={tmp_path}", "dataset.shard_samples=25")
    assert [c.name for c in data.classes] == list(DIGIT_NAMES)
    got, labels, _ = load_arrays(data.train_urls, 8, 10)
    assert Counter((x[0].tobytes(), int(c)) for x, c in zip(got, labels, strict=True)) == Counter(
        (x.tobytes(), int(c)) for x, c in zip(images, class_ids, strict=True)
    )
    first = members(Path(data.train_urls[0]))[0][1]
    assert first in {encode_png(x) for x in images}  # the row's own bytes
    assert io.BytesIO(first).read(4) == b"\x89PNG"


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    """The command itself, killed while its workers write; then given again."""
    keys = [f"dataset.path={tree}", "dataset.shard_samples=2", "max_bad_fraction=0.1"]
    command = [sys.executable, "-m", "ddoq_ray", "prepare", *keys, f"run_dir={tmp_path}/killed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = tmp_path / "killed/data/records"
    try:
        while process.poll() is None and len(list(records.glob("*.json"))) < 3:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "killed/data/manifest.json").exists(), "it was done before it was killed"
    subprocess.run(command, check=True, capture_output=True)
    go(tmp_path / "whole", *keys)
    whole, killed = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert {n: killed[n] for n in whole} == whole
    assert not [n for n in killed if n.endswith(".tmp")]
