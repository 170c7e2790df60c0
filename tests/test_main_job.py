"""The main job in small: all eight stages once, and what they promise about their outputs."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.damage import KINDS, WAYS, damage
from support.identities import left_out
from support.planned import on_disk
from support.recording import recording

from ddoq_ray import pipeline
from ddoq_ray.cli import main
from ddoq_ray.commands import plan, verify
from ddoq_ray.config.compose import load_config
from ddoq_ray.core.labels import LogitsCodec
from ddoq_ray.core.views.render import batch_views
from ddoq_ray.data.image_set import load_image_arrays
from ddoq_ray.execution import lease
from ddoq_ray.models.classifiers import load_classifier
from ddoq_ray.models.protocol_views import view_spec
from ddoq_ray.storage.at_rest import Seen
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.label_log import LabelStore

LABELS = "labels/digits-teacher-digits-16px"  # teacher, protocol, what a student sees
STUDENT = "students/convnet3-w8-digits-teacher-digits-16px"
SMALL = [
    "ipc=2",
    "num_seeds=2",
    "protocol.steps=12",
    "protocol.eval_every=12",
    "synthesizer.shard_images=8",
    "labels.file_labels=100",
    # A worker loads torch and diffusers in six seconds, and how many there are changes nothing: `tests/stages` show it.
    "synthesizer.max_workers=1",
    "labels.workers=1",
    "cluster.trainer.groups=1",
    "cluster.reader.num_cpus=1",
]


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run below writes down which keys of its configuration are read."""
    return tmp_path_factory.mktemp("reads")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ray_here: None, reads: Path) -> Path:
    folder = tmp_path_factory.mktemp("main") / "run"
    pipeline.run(recording(load_config([*SMALL, f"run_dir={folder}"]), reads))
    return folder


@pytest.fixture(scope="module")
def results(run: Path) -> dict:
    return json.loads((run / "report/results.json").read_text())


def test_rows_hold_every_method_and_seed(results: dict) -> None:
    keys = {(r["method"], r["seed"]) for r in results["rows"]}
    assert keys == {(m, s) for m in ("ddoq", "ddoq-sqrt", "d4m", "random", "full") for s in (0, 1)}
    for row in results["rows"]:
        assert {"method", "ipc", "student", "seed", "top1_pct", "top5_pct", "epochs"} <= set(row)
        assert 0 <= row["top1_pct"] <= row["top5_pct"] <= 100
        assert row["epochs"] == (1 if row["method"] == "full" else 12)  # 12 steps: of 20 batches of 50, or of 1 of 20


def test_what_a_stage_reads_is_in_its_identity(run: Path, reads: Path) -> None:
    """A key that changes bytes and is in no identity would leave them stale when it changes."""
    assert left_out(load_config([*SMALL, f"run_dir={run}"]), reads) == []


def test_w2_with_voronoi_weights_is_the_distortion_and_the_least(results: dict) -> None:
    """Proposition 2: W2^2 = distortion under Voronoi weights, and no other weights do better."""
    assert {(r["method"], r["class_id"]) for r in results["classes"]} == {
        (m, c) for m in ("ddoq", "d4m") for c in range(10)
    }
    for row in results["classes"]:
        assert row["w2_voronoi"] ** 2 == pytest.approx(row["distortion"], rel=1e-6)
        assert row["w2_uniform"] >= row["w2_voronoi"] * (1 - 1e-9)
        assert row["k"] == 2


def test_codebooks_are_measured_on_held_out_latents_too(results: dict) -> None:
    """The validation digits, at most 50 a class; and other weights than the Voronoi ones are never better."""
    assert results["heldout"] == {"images_per_class": 50, "images": 497, "missing": ""}  # one class has 47
    assert sum(r["heldout_n"] for r in results["classes"]) == 2 * 497
    for row in results["classes"]:
        assert row["heldout_w2_voronoi"] ** 2 >= row["heldout_distortion"] * (1 - 1e-9)
        assert min(row["w2_sqrt"], row["w2_stream"]) >= row["w2_voronoi"] * (1 - 1e-9)


def test_each_stage_reports_seconds_items_and_bytes(results: dict) -> None:
    stages = {s["stage"]: s for s in results["stages"]}
    assert {"prepare", "encode", "quantize", "synthesize", "label", "train", "evaluate", "report"} <= set(stages)
    assert stages["encode"]["items"] == 1000 and stages["encode"]["bytes"] == 1000 * 64 * 2
    assert stages["synthesize"]["items"] == 40  # two codebooks
    assert all(s["seconds"] >= 0 for s in stages.values())


def test_page_is_one_file_with_the_images(run: Path) -> None:
    page = (run / "report/index.html").read_text()
    assert page.count("data:image/png;base64,") >= 60
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="/' not in page


def test_weights_of_the_images_are_those_of_the_codebook(run: Path) -> None:
    parts = [pq.read_table(p) for p in sorted((run / "codebook").glob("part-*.parquet"))]
    table = pa.concat_tables(parts).to_pydict()
    assert sum(table["count"]) == 1000
    arrays = load_image_arrays([str(p) for p in sorted((run / "images").glob("*.tar"))], 16)
    assert arrays.weights.tolist() == table["weight"]
    assert arrays.class_ids.tolist() == table["class_id"]
    np.testing.assert_allclose(np.bincount(arrays.class_ids, arrays.weights), 1.0, rtol=1e-12)


def test_stored_labels_are_the_teachers_on_the_same_views(run: Path) -> None:
    """Any batch and order: the student's view of (image, epoch) is the one that was labelled."""
    config = load_config(SMALL)
    arrays = load_image_arrays([str(p) for p in sorted((run / "images").glob("*.tar"))], 16)
    images = torch.from_numpy(arrays.images)
    teacher = load_classifier("shipped:digits-teacher")
    for epoch in (0, 11):
        stored = LogitsCodec(10).decode(LabelStore(Folder(str(run / LABELS))).read(epoch))
        order = np.random.default_rng(epoch).permutation(20)
        pixels, _, _ = batch_views(images, order, view_spec(config.protocol, 16), config.seed, epoch)
        with torch.inference_mode():
            torch.testing.assert_close(stored[order], teacher(pixels), rtol=2e-3, atol=2e-3)  # fp16 storage


def test_labels_are_keyed_by_image_and_epoch_in_order(run: Path) -> None:
    """20 images in 12 epochs, five epochs a file at most: three files of four."""
    files = sorted((run / LABELS).glob("labels-*.parquet"))
    manifest = json.loads((run / LABELS / "manifest.json").read_text())
    assert manifest["label_files"] == len(files) == 3 and manifest["items"] == 240
    assert manifest["bytes"] == sum(f.stat().st_size for f in files)
    table = pq.read_table(io.BytesIO(files[1].read_bytes()))
    assert table["image_id"].to_pylist() == list(range(20)) * 4
    assert table["epoch"].to_numpy().tolist() == np.repeat(range(4, 8), 20).tolist()


@pytest.fixture(scope="module")
def copy(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory, in links: a test that damages a file brings it back."""
    place = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(run, place, copy_function=os.link)
    return place


def test_verify_reads_every_file_of_an_undamaged_run(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy)]) == 0
    assert "is as it was written" in capsys.readouterr().err
    others = {"events.jsonl", "config.yaml"}  # lines that a death may cut; what is read first
    seen = Seen()
    assert verify.look(Folder(str(copy)), seen)[1] == []
    files = [p for p in copy.rglob("*") if p.is_file() and p.name not in others]
    assert seen.files == len(files), "a file of the run is in no record"


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in (1, 2))])
def test_damage_at_rest_is_told_by_name(copy: Path, turn: int) -> None:
    """Every kind of file, in one of three ways; tests/storage/test_at_rest.py turns single bits."""
    for number, name in enumerate(KINDS.values()):
        data = damage(copy / name, list(WAYS)[(number + turn) % len(WAYS)])
        try:
            _, found = verify.look(Folder(str(copy)), Seen())
        finally:
            (copy / name).write_bytes(data)
        assert [d.file for d in found] == [name]
        assert found[0].why and found[0].command


def test_damage_ends_with_exit_code_2_and_its_name(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / KINDS["image shard"]
    data = damage(file, "missing")
    try:
        assert main(["verify", f"run_dir={copy}"]) == 2
    finally:
        file.write_bytes(data)
    told = capsys.readouterr().err
    assert f"{file}: it is missing" in told and "`ddoq-ray synthesize` makes it anew" in told
    assert "repair=true" in told.splitlines()[-1]


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("labels", "flipped"),
        pytest.param("labels", "missing", marks=pytest.mark.slow),
        pytest.param("image shard", "flipped", marks=pytest.mark.slow),
    ],
)
def test_what_a_disk_changed_is_refused_by_name_before_a_student_trains(
    run: Path, tmp_path: Path, kind: str, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One more student is asked for: the others are there, and their labels and images were read before."""
    place = tmp_path / "run"
    shutil.copytree(run, place, copy_function=os.link)
    damage(place / "events.jsonl", "flipped")  # a file of its own, to which the run adds
    shutil.copy(run / "events.jsonl", place)
    damage(place / KINDS[kind], way)
    assert main([*SMALL, f"run_dir={place}", "baselines=[]", "num_seeds=3", "stages=[train]"]) == 2
    told = capsys.readouterr().err
    assert f"{place / KINDS[kind]} is {'missing' if way == 'missing' else 'damaged'}" in told
    assert not list(place.glob(f"{STUDENT}-seed2/model*")) and "Traceback" not in told


@pytest.mark.slow
def test_repair_makes_what_is_damaged_anew_and_leaves_the_rest(copy: Path) -> None:
    kinds = ("latents", "codebook part", "part's record", "image shard", "chosen images", "labels", "identity")
    before = {p: (p.stat().st_ino, p.read_bytes()) for p in copy.rglob("*") if p.is_file()}
    for number, kind in enumerate(kinds):
        damage(copy / KINDS[kind], list(WAYS)[number % len(WAYS)])
    assert main(["verify", str(copy), "repair=true"]) == 0
    assert main(["verify", str(copy)]) == 0
    for path, (inode, data) in before.items():
        name = str(path.relative_to(copy))
        if name in map(KINDS.get, kinds):
            assert path.read_bytes() == data
        elif path.suffix in (".parquet", ".tar", ".safetensors") and "draw-1" not in name:
            assert path.stat().st_ino == inode, f"{name} was whole and is made anew"


def test_status_tells_what_is_done_and_what_is_left(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hidden = [copy / "images/manifest.json", copy / "images/images-000001.tar"]
    held = {p: p.read_bytes() for p in hidden}
    for path in hidden:
        path.unlink()
    try:
        assert main(["status", str(copy)]) == 0
    finally:
        for path, data in held.items():
            path.write_bytes(data)
    told = capsys.readouterr().out
    lines = {line.split()[0]: line for line in told.splitlines() if line}
    assert "no run is at work; the last one's word was: run finished" in told
    assert "1,000 images" in lines["encode"] and " done" in lines["encode"]
    assert "1 of 2 done" in lines["synthesize"] and "images 2 image shards" in lines["synthesize"]
    assert lines["train"].startswith("train      done, 10 of 10") and lines["report"].endswith("done")


def test_a_report_of_a_run_at_work_tells_what_is_finished_and_touches_nothing_else(run: Path, tmp_path: Path) -> None:
    """As in the middle of training: one student is not there yet, and nothing was evaluated."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/report")
    (tmp_path / f"run/{STUDENT}-seed1/manifest.json").unlink()
    holder = lease.Lease(Folder(str(tmp_path / "run")))
    holder.acquire()

    def there() -> dict[str, int]:
        files = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and "report" not in p.parts]
        return {str(p): p.stat().st_mtime_ns for p in files if p.name != "lease.json"}

    before = there()
    try:
        pipeline.run(load_config([*SMALL, f"run_dir={tmp_path}/run", "stages=[report]", "tracking=tensorboard"]))
        assert there() == before and (tmp_path / "run/lease.json").exists()
    finally:
        holder.release()
    results = json.loads((tmp_path / "run/report/results.json").read_text())
    assert results["rows"] == [] and len(results["classes"]) == 20 and results["heldout"]["images"] == 497
    assert len(results["curves"]) == 9 and (tmp_path / "run/report/index.html").stat().st_size > 10_000
    assert len(list((tmp_path / "run/report/tensorboard").iterdir())) == 10  # nine students, and the results
    with pytest.raises(ValueError, match="another run holds"):
        holder.acquire()
        pipeline.run(load_config([*SMALL, f"run_dir={tmp_path}/run", "stages=[evaluate,report]"]))
    holder.release()


def test_plan_and_run_agree_on_bytes(run: Path) -> None:
    config = load_config([*SMALL, f"run_dir={run}"])
    made = plan.plan(config)
    assert made.problems == []
    there = on_disk(config)
    assert set(there) == {"prepare", "encode", "heldout", "quantize", "synthesize", "select", "label", "train"}
    assert made.written == {name: pytest.approx(size, rel=0.2) for name, size in there.items()}


def test_plan_tells_every_problem_before_anything_is_spent(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "data", tmp_path / "run/data")
    words = [*SMALL, f"run_dir={tmp_path}/run"]
    assert main(["plan", *words]) == 0
    assert "1,000 images of 10 classes" in capsys.readouterr().out
    assert main(["plan", *words, "ipc=98", "protocol.steps=1000000000000000", "quantizer.num_shards=4"]) == 2
    told = capsys.readouterr()
    assert "fewer images than ipc=98: 8 (eight): 97" in told.err and "are free; choose another run_dir" in told.err
    assert "quantizer  codebook: 4 actors" in told.out
    assert main(["plan", *words, f"prior.path={tmp_path}/nothing"]) == 2
    assert f"{tmp_path}/nothing" in capsys.readouterr().err
    assert main(["plan", f"run_dir={tmp_path}/empty"]) == 2
    assert "ddoq-ray prepare" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["data"], "a plan writes nothing"


@pytest.mark.slow
def test_one_student_trained_again_is_the_same_and_leaves_the_others(run: Path) -> None:
    lost, kept = run / f"{STUDENT}-seed1", run / f"{STUDENT}-seed0"
    before, other = (lost / "model.safetensors").read_bytes(), (kept / "model.safetensors").stat().st_mtime_ns
    for name in ("manifest.json", "model.safetensors"):
        (lost / name).unlink()
    pipeline.run(load_config([*SMALL, f"run_dir={run}", "stages=[train]"]))
    assert (lost / "model.safetensors").read_bytes() == before
    assert (kept / "model.safetensors").stat().st_mtime_ns == other


def test_random_draws_are_anew_for_each_seed(run: Path) -> None:
    draws = [
        load_image_arrays([str(p) for p in sorted((run / f"compare/random-ipc2/draw-{k}/images").glob("*.tar"))], 16)
        for k in (0, 1)
    ]
    assert all(np.bincount(d.class_ids).tolist() == [2] * 10 for d in draws)
    assert not np.array_equal(draws[0].images, draws[1].images)


@pytest.mark.slow
def test_two_workers_train_on_the_labels_of_features(run: Path) -> None:
    """The other codec, and DDP: two ranks see each image once an epoch between them."""
    own = [*SMALL, f"run_dir={run}-2", f"latents.path={run}/latents", "baselines=[]", "num_seeds=1"]
    pipeline.run(load_config([*own, "labels.mode=features", "cluster.trainer.workers=2"]))
    labels = json.loads(Path(f"{run}-2/{LABELS}/manifest.json").read_text())
    assert labels["codec"] == "features" and (Path(f"{run}-2") / LABELS / "head.safetensors").is_file()
    rows = json.loads(Path(f"{run}-2/report/results.json").read_text())["rows"]
    assert [(r["method"], r["train_images"]) for r in rows] == [("ddoq", 20)]
    assert [p.read_bytes() for p in sorted(Path(f"{run}-2/images").glob("*.tar"))] == [
        p.read_bytes() for p in sorted((run / "images").glob("*.tar"))
    ]


@pytest.mark.slow
def test_online_labels_store_nothing_and_latents_need_not_be_kept(run: Path) -> None:
    pipeline.run(
        load_config([*SMALL, f"run_dir={run}", "stages=[report]", "latents.keep=false"]),
    )
    assert not list((run / "latents").glob("shard-*/chunk-*"))
    assert json.loads((run / "report/results.json").read_text())["classes"], "W2 is measured before they go"
    with pytest.raises(ValueError, match=r"latents\.keep=false"):
        pipeline.run(load_config(["ipc=1", f"run_dir={run}-3", f"latents.path={run}/latents", "stages=[quantize]"]))
    online = [*SMALL, f"run_dir={run}-2", "labels.mode=online", "overwrite=true", "baselines=[]", "num_seeds=1"]
    online = [o for o in online if "file_labels" not in o]
    pipeline.run(load_config([*online, "stages=[label,train,evaluate]"]))
    assert not list(Path(f"{run}-2/labels").glob("*/labels-*"))
    assert json.loads(Path(f"{run}-2/{STUDENT}-seed0/manifest.json").read_text())["train_images"] == 20
