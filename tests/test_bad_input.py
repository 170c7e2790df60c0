"""What users can get wrong, through the real pipeline: the words that help, and nothing lost of what was made.

Three digits with the shipped prior and teacher; one Ray for the whole file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import ddoq_ray
from ddoq_ray import pipeline
from ddoq_ray.config.compose import load_config
from ddoq_ray.data.collections import digits
from ddoq_ray.data.samples import encode_png
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.stages.encode.step import quarantine_reasons
from ddoq_ray.stages.prepare.step import Data
from ddoq_ray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")
NAMES = ["zero", "one", "two"]
GOOD = {0: 8, 1: 8, 2: 4}  # usable images a class; ipc=5, so that the last class is small
FEW = [  # workers
    "quantizer.num_shards=1", "synthesizer.max_workers=1", "labels.workers=1", "report.heldout_images=0",
    "cluster.reader.num_cpus=1",
]  # fmt: skip
UP_TO_IMAGES = "stages=[prepare,encode,quantize,synthesize]"


def members(key: str, image: np.ndarray, label: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", encode_png(image)), (f"{key}.cls", str(label).encode())]


def write_set(folder: Path, split: str, counts: dict[int, int], shift: int = 0) -> None:
    """Digits in two mixed shards; `shift` writes wrong labels."""
    images, class_ids = digits()[split]
    rows = [i for c, n in counts.items() for i in np.flatnonzero(class_ids == c)[:n]]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    folder.mkdir(parents=True)
    for s in range(2):
        body = [m for i in rows[s::2] for m in members(f"d{i}", images[i], (int(class_ids[i]) + shift) % 3)]
        (folder / f"s-{s}.tar").write_bytes(write_tar(body))
    (folder / "classes.json").write_text(json.dumps(NAMES))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train: GOOD, one undecodable and one unlabelled sample; clean: GOOD alone; val: every label wrong."""
    root = tmp_path_factory.mktemp("corpus")
    write_set(root / "clean", "train", GOOD)
    write_set(root / "train", "train", GOOD)
    bad = [("bad.png", b"not a picture"), ("bad.cls", b"0"), ("orphan.png", encode_png(np.zeros((8, 8), np.uint8)))]
    (root / "train/s-2.tar").write_bytes(write_tar([*bad, *members("last", digits()["train"][0][0], 0)[:1]]))
    write_set(root / "val", "selection", {0: 4, 1: 4, 2: 4}, shift=1)
    return root


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run directory for the file: each test finds there what the ones before it made."""
    return tmp_path_factory.mktemp("runs") / "main"


def go(run: Path, corpus: Path, *overrides: str, data: str = "train") -> None:
    given = ["experiment=digits", f"run_dir={run}", "ipc=5", "baselines=[]", "num_seeds=1", *FEW]
    for key, value in (("dataset.path", corpus / data), ("dataset.val_path", corpus / "val")):
        if not any(o.startswith(f"{key}=") for o in overrides):
            given.append(f"{key}={value}")
    pipeline.run(load_config([*given, *overrides]))


def files(run: Path) -> dict[str, bytes]:
    """Everything made so far, but for the log and what is always that of the latest command."""
    logs = ("events.jsonl", "config.yaml", "classes.json", "source-classes.json")
    made = {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in logs}
    if "data/manifest.json" in made:  # it holds digests of the class lists
        manifest = json.loads(made["data/manifest.json"])
        made["data/manifest.json"] = json.dumps(
            {k: v for k, v in manifest.items() if k not in ("files", "check")}
        ).encode()
    return made


@contextmanager
def refused(run: Path, *words: str) -> Iterator[None]:
    """A ValueError with these words, after which every file that was there is still there, the same."""
    before = files(run)
    with pytest.raises(ValueError) as error:
        yield
    assert type(error.value) is ValueError or type(error.value).__name__.startswith("RayTaskError"), type(error.value)
    from ddoq_ray.execution.errors import user_error

    message = user_error(error.value)
    assert message is not None
    assert all(w in message for w in words), message
    after = files(run)
    assert {name: after.get(name) for name in before} == before


# Before anything is made: a mistake leaves nothing behind that would refuse the right command.


def test_data_that_is_not_there(corpus: Path, run_dir: Path) -> None:
    (corpus / "empty").mkdir()
    for path, word in ((corpus / "nowhere", "does not exist"), (corpus / "empty", "holds no *.tar")):
        with refused(run_dir, f"dataset.path={path}", word, "WebDataset"):
            go(run_dir, corpus, f"dataset.path={path}", "stages=[prepare]")
    with refused(run_dir, "dataset.val_path=/nowhere", "does not exist"):
        go(run_dir, corpus, "dataset.val_path=/nowhere", "stages=[prepare]")
    with refused(run_dir, "hold the same shards (s-0.tar, s-1.tar)", "share none"):
        go(run_dir, corpus, f"dataset.val_path={corpus}/train/../train/s-{{0..1}}.tar", "stages=[prepare]")
    (corpus / "junk").mkdir()
    (corpus / "junk/a.tar").write_bytes(b"junk" * 500)
    (corpus / "junk/classes.json").write_text(json.dumps(NAMES))
    with refused(run_dir, "junk: no sample with an image and a label in 1 shards", ".cls"):
        go(run_dir, corpus, "stages=[prepare]", data="junk")
    assert not (run_dir / "data").exists()


def test_labels_outside_the_class_list(corpus: Path, run_dir: Path) -> None:
    short = corpus / "two.json"
    short.write_text(json.dumps(NAMES[:2]))
    with refused(run_dir, "labels are outside the class list (0 to 1)", "from 0 to 2", "s-0.tar", "dataset.classes"):
        go(run_dir, corpus, f"dataset.classes={short}", "stages=[prepare]")
    write_set(corpus / "from-one", "train", {1: 5, 2: 5})
    with refused(run_dir, "labels go from 1 to 2", "begin at 1", "subtract one"):
        go(run_dir, corpus, f"dataset.classes={short}", "stages=[prepare]", data="from-one")
    with refused(run_dir, "no class list at", "dataset.classes"):
        go(run_dir, corpus, f"dataset.classes={corpus}/none.json", "stages=[prepare]")


def test_a_mapping_that_the_networks_do_not_cover_can_be_mended(corpus: Path, tmp_path: Path) -> None:
    classes = tmp_path / "classes.json"
    run = tmp_path / "run"
    # All stages: of these networks the comparison's and the main job's tests ask the same, and the answer is kept.
    command = [f"dataset.classes={classes}", "small_class=cap"]

    def give(**last: object) -> None:
        known = [{"name": n, "prior_label": i, "teacher_index": i} for i, n in enumerate(NAMES[:2])]
        classes.write_text(json.dumps([*known, last]))

    give(name="cat")
    with refused(run, "class 2 (cat)", "prior_label", "the prior has no output of that name", "zero, one"):
        go(run, corpus, *command)
    give(name="cat", prior_label=99)
    with refused(run, "class 2 (cat)", "prior_label=99", "0 to 9"):
        go(run, corpus, *command)
    give(name="cat", prior_label=2)
    with refused(run, "class 2 (cat)", "teacher_index", "the teacher has no output of that name"):
        go(run, corpus, *command)
    give(name="cat", prior_label=2, teacher_index=2)
    go(run, corpus, *command, "stages=[prepare]")
    resolved = json.loads((run / "data/classes.json").read_text())
    assert [(c["prior_label"], c["name"]) for c in resolved] == [(0, "zero"), (1, "one"), (2, "cat")]
    give(name="dog", prior_label=2, teacher_index=2)
    with refused(run, "another class list", "cat", "dog", "overwrite=true"):
        go(run, corpus, *command, "stages=[prepare]")


def test_a_run_directory_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here before")
    with refused(tmp_path, f"cannot write {tmp_path}/file/run", "a file, not a folder", "run_dir"):
        go(tmp_path / "file/run", corpus)
    with refused(tmp_path, "cannot write /proc/ddoq", "run_dir"):
        go(Path("/proc/ddoq"), corpus)


def test_unknown_and_ineffective_keys_make_nothing(corpus: Path, tmp_path: Path) -> None:
    for key, word in (("ipcs=3", "did you mean ipc?"), ("protocol.step_factor=1", "no effect")):
        with refused(tmp_path, key.split("=")[0], word):
            go(tmp_path / "run", corpus, key)
    assert not (tmp_path / "run").exists()


def test_one_folder_of_both_splits_is_told_apart_by_names(corpus: Path, tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    for split, name in (("clean", "train"), ("val", "validation")):
        for i in range(2):
            shutil.copy(corpus / split / f"s-{i}.tar", folder / f"{name}-{i:04d}.tar")
    shutil.copy(corpus / "clean/classes.json", folder)
    command = [f"run_dir={tmp_path}/run", "experiment=digits", "ipc=2", f"dataset.path={folder}"]
    pipeline.run(load_config([*command, "stages=[prepare]"]))
    assert "2 shards are taken for validation by their names (validation-0000.tar" in capfd.readouterr().err
    data = Data.load(Folder(str(tmp_path / "run")))
    assert [Path(s.path).name for s in data.train] == ["train-0000.tar", "train-0001.tar"]
    assert sum(s.samples for s in data.val) == 12
    for i in range(2):
        (folder / f"validation-{i:04d}.tar").unlink()
    with refused(tmp_path, "no validation images", "dataset.val_path"):
        pipeline.run(load_config([*command[1:], f"run_dir={tmp_path}/other", "stages=[prepare,label]"]))
    shutil.copy(corpus / "clean/s-0.tar", folder / "validation-0000.tar")
    pipeline.run(load_config([*command[1:], f"run_dir={tmp_path}/third", "stages=[prepare]"]))
    assert "10 of 20 training images are among the 10 validation images" in capfd.readouterr().err


# One run directory, made step by step.


def test_a_small_class_is_refused_before_encoding(corpus: Path, run_dir: Path) -> None:
    with refused(run_dir, "1 of 3 classes", "ipc=5", "2 (two): 4", "small_class=cap", "small_class=drop"):
        go(run_dir, corpus, UP_TO_IMAGES)
    assert (run_dir / "data/manifest.json").exists() and not (run_dir / "latents").exists()


def test_too_many_bad_samples_stop_the_run_and_what_is_encoded_stays(corpus: Path, run_dir: Path) -> None:
    # Of 13 or of 23: whether a good shard is done before the bad one is for Ray to say.
    words = ["3 of ", "3 samples refused", "max_bad_fraction=0.01", "undecodable image: 1", "no label (.cls): 2"]
    with refused(run_dir, *words, str(run_dir / "quarantine"), "mend the shards", "run again"):
        go(run_dir, corpus, "small_class=cap", "stages=[prepare,encode]")
    assert list(run_dir.glob("latents/shard-*/done.json"))
    assert not (run_dir / "latents/manifest.json").exists()


def test_bad_samples_are_quarantined_and_the_good_ones_all_used(corpus: Path, run_dir: Path) -> None:
    before = files(run_dir)
    kept = {p: p.stat().st_mtime_ns for p in run_dir.glob("latents/shard-*/done.json")}
    go(run_dir, corpus, "small_class=cap", "max_bad_fraction=0.2", "stages=[encode,quantize,synthesize,report]")
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert {n: b for n, b in files(run_dir).items() if n in before and "/shard-" in n} == {
        n: b for n, b in before.items() if "/shard-" in n
    }  # what the stopped run had encoded was not made again
    lines = [json.loads(x) for x in (run_dir / "quarantine/shard-000002.jsonl").read_text().splitlines()]
    assert [(x["key"], x["reason"].split(":")[0]) for x in lines] == [
        ("bad", "undecodable image"), ("orphan", "no label (.cls)"), ("last", "no label (.cls)")
    ]  # fmt: skip
    manifest = json.loads((run_dir / "latents/manifest.json").read_text())
    assert (manifest["items"], manifest["refused"]) == (sum(GOOD.values()), 3)
    tables = [pq.read_table(p) for p in run_dir.glob("latents/shard-*/chunk-*.parquet")]
    keys = {k for t in tables for k in t["key"].to_pylist()}
    assert len(keys) == sum(GOOD.values()) and not keys & {"bad", "orphan", "last"}
    results = json.loads((run_dir / "report/results.json").read_text())
    assert results["quarantine"] == {"samples": 3, "reasons": {"undecodable image": 1, "no label (.cls)": 2}}


def test_cap_gives_as_many_centroids_as_images(run_dir: Path) -> None:
    counted = {}
    for part in run_dir.glob("codebook/part-*.parquet"):
        for row in pq.read_table(part, columns=["class_id", "count"]).to_pylist():
            counted.setdefault(row["class_id"], []).append(row["count"])
    assert {c: (len(n), sum(n)) for c, n in counted.items()} == {0: (5, 8), 1: (5, 8), 2: (4, 4)}
    data = ddoq_ray.load(str(run_dir))
    assert data.ipc == {0: 5, 1: 5, 2: 4}
    assert np.isclose(data.weights.sum(), 3)


def test_drop_leaves_the_class_out(corpus: Path, run_dir: Path, tmp_path: Path) -> None:
    """From the latents of the run above: nothing is encoded again."""
    given = [f"latents.path={run_dir}/latents", "small_class=drop", "stages=[prepare,quantize]"]
    go(tmp_path / "run", corpus, *given)
    parts = [pq.read_table(p, columns=["class_id"]) for p in (tmp_path / "run").glob("codebook/part-*.parquet")]
    assert Counter(c for part in parts for c in part["class_id"].to_pylist()) == {0: 5, 1: 5}
    assert json.loads((tmp_path / "run/codebook/manifest.json").read_text())["dropped_classes"] == [2]
    assert not (tmp_path / "run/latents").exists()
    with refused(run_dir, "encoded from another data", str(run_dir)):
        go(tmp_path / "other", corpus, *given, data="clean")
    with refused(run_dir, "nowhere is not finished", "encode"):
        go(tmp_path / "third", corpus, f"latents.path={tmp_path}/nowhere", *given[1:])


@pytest.mark.slow
def test_a_class_that_is_left_out_has_no_images(corpus: Path, run_dir: Path, tmp_path: Path) -> None:
    go(tmp_path / "run", corpus, f"latents.path={run_dir}/latents", "small_class=drop", UP_TO_IMAGES)
    assert ddoq_ray.load(str(tmp_path / "run")).ipc == {0: 5, 1: 5}


def test_another_configuration_is_refused_by_both_values(corpus: Path, run_dir: Path) -> None:
    for key, words in (
        ("quantizer=gram", ['quantizer.name: "clvq" there, "gram" now', "codebook"]),
        ("ipc=4", ["ipc: 5 there, 4 now"]),
        ("seed=3", ["seed: 0 there, 3 now"]),
        ("synthesizer.strength=0.4", ["synthesizer.strength: 0.1 there, 0.4 now", "images"]),
        (f"dataset.path={corpus}/clean", [f'dataset.path: "{corpus}/train" there, "{corpus}/clean" now', "data"]),
    ):
        with refused(run_dir, str(run_dir), *words, "overwrite=true"):
            go(run_dir, corpus, "small_class=cap", "max_bad_fraction=0.2", key, UP_TO_IMAGES)


def test_a_teacher_of_other_classes_labels_nothing(corpus: Path, run_dir: Path) -> None:
    with refused(run_dir, "3 of 3 classes by another name", "'zero' are called 'two' in 100 %", "teacher_index"):
        go(run_dir, corpus, "small_class=cap", "teacher.min_top1=90", "stages=[label]")
    assert not list(run_dir.glob("labels/*/labels-*"))


def test_overwrite_makes_it_anew_from_the_other_data(corpus: Path, run_dir: Path) -> None:
    with refused(run_dir, "dataset.path=/nowhere", "does not exist"):  # not even then is anything removed for a typo
        go(run_dir, corpus, "dataset.path=/nowhere", "overwrite=true", "small_class=cap", UP_TO_IMAGES)
    stages = "stages=[prepare,encode,quantize]"
    go(run_dir, corpus, "overwrite=true", "small_class=cap", "quantizer=gram", stages, data="clean")
    assert json.loads((run_dir / "data/manifest.json").read_text())["items"] == sum(GOOD.values())
    assert json.loads((run_dir / "latents/manifest.json").read_text())["refused"] == 0
    codebook = json.loads((run_dir / "codebook/manifest.json").read_text())
    assert codebook["identity"]["quantizer"]["name"] == "gram"


def test_quarantine_is_that_of_the_latents_that_are_there(run_dir: Path) -> None:
    assert not quarantine_reasons(Folder(str(run_dir)))


@pytest.mark.slow
def test_through_the_command(corpus: Path, tmp_path: Path) -> None:
    """A worker's words reach the terminal as one line, exit code 2."""
    (tmp_path / "classes.json").write_text(json.dumps(NAMES[:1]))
    data = [f"dataset.path={corpus}/train/s-{{0..1}}.tar", f"dataset.classes={tmp_path}/classes.json"]
    command = [sys.executable, "-m", "ddoq_ray", f"run_dir={tmp_path}/run", *data, "stages=[prepare]"]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 2, out.stderr
    last = out.stderr.strip().splitlines()[-1]
    assert last.startswith("ddoq-ray: error: ") and "are outside the class list (0 to 0)" in last
    assert "Traceback" not in out.stderr and "Unhandled" not in out.stderr
    assert out.stdout == ""
