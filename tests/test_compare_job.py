"""A comparison in small: what it makes and says, and that a killed one goes on to the same rows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ddoq_ray import pipeline
from ddoq_ray.commands.table import BY_NAME
from ddoq_ray.core.metrics import mean_std, paired_difference
from ddoq_ray.models.classifiers import build_classifier, save_classifier
from ddoq_ray.storage import layout

TINY = [
    "methods=[ddoq,random,full]", "ipcs=[1,2]", "students=[convnet3-w8@16]", "num_seeds=2", "protocol.steps=4",
    "protocol.eval_every=4", "hard_labels=true", "synthesizer.shard_images=8", "cluster.trainer.groups=2",
    "cluster.trainer.num_cpus=0.5", "quantizer.num_shards=1", "synthesizer.max_workers=1", "labels.workers=1",
    "cluster.reader.num_cpus=1",
]  # fmt: skip


def compare(run: Path, *words: str) -> None:
    pipeline.run(BY_NAME["compare"].compose([*TINY, f"run_dir={run}", *words]))


def students(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob(layout.WEIGHTS))}


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "report/results.json").read_text())


def figures(run: Path) -> list[dict[str, Any]]:
    """The lines of a comparison without what they took."""
    return [{k: v for k, v in li.items() if not k.endswith("_s")} for li in results(run)["comparison"]["lines"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    run = tmp_path_factory.mktemp("compare") / "run"
    compare(run, "tracking=tensorboard")
    return run


def test_each_line_is_the_figures_of_its_students(whole: Path) -> None:
    found = results(whole)
    lines = found["comparison"]["lines"]
    assert [(li["labels"], li["ipc"], li["method"]) for li in lines] == [
        (labels, ipc, method)
        for labels in ("soft", "hard")
        for ipc, methods in ((1, ("ddoq", "random")), (2, ("ddoq", "random")), (None, ("full",)))
        for method in methods
    ]
    assert len(found["students"]) == 2 * (2 * 2 * 2 + 2)
    for line in lines:
        rows = [r for r in found["students"] if (r["labels"], r["method"]) == (line["labels"], line["method"])]
        rows = [r for r in rows if line["ipc"] in (r["ipc"], None)]
        assert line["top1_pct"] == [r["top1_pct"] for r in sorted(rows, key=lambda r: r["seed"])]
        assert (line["mean_pct"], line["std_pct"]) == mean_std(line["top1_pct"])
        assert line["images_bytes"] > 0 and line["train_s"] > 0 and line["device"] == "cpu"
        assert (line["labels_bytes"] > 0) == (line["labels"] == "soft" and line["method"] != "full")
        assert (line["hlr_pct"] is None) == (line["method"] == "full")
    ddoq, random = lines[0], lines[1]
    d = paired_difference(ddoq["top1_pct"], random["top1_pct"])
    assert (ddoq["against"]["mean_pct"], ddoq["against"]["low_pct"]) == pytest.approx((d.mean, d.low))
    for name in (layout.PAGE, layout.TABLE, layout.TABLE_CSV):
        assert (whole / "report" / name).stat().st_size > 500
    tracked = {p.parent.name for p in (whole / "report" / layout.TENSORBOARD).rglob("events.*")} - {"results"}
    assert len(tracked) == len(found["students"]) and any(name.startswith("random-ipc2-") for name in tracked)
    events = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    made = [e["stage"] for e in events if e["event"] == "stage finished"]
    assert {stage: made.count(stage) for stage in ("encode", "quantize", "label", "train", "evaluate")} == {
        "encode": 1, "quantize": 2, "label": 2, "train": 1, "evaluate": 1,
    }  # fmt: skip
    joined = [e["stage"] for e in events if e["event"] == "worker joined"]
    assert joined.count("synthesize") == 1, "one decoder made the images of both IPCs"


@pytest.mark.slow
def test_a_comparison_that_goes_on_redoes_no_finished_row_and_ends_in_the_same_rows(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    folders = sorted({p.parent for p in run.rglob(layout.WEIGHTS)})
    lost = folders[::3]
    for folder in lost:
        shutil.rmtree(folder)
    shutil.rmtree(run / "report")
    kept = {p: p.stat().st_mtime_ns for folder in folders for p in folder.glob("*")}
    compare(run)
    assert students(run) == students(whole) and figures(run) == figures(whole)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    said = capsys.readouterr().err
    assert f"{len(lost)} of {len(lost)} students" in said and "students that are left, by those that are" in said


@pytest.mark.slow
def test_a_killed_comparison(whole: Path, tmp_path: Path) -> None:
    """By SIGKILL, with its Ray, while students are trained; the same command ends in the same rows."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = [*TINY, f"run_dir={run}", "cluster.address=local", "cluster.num_cpus=2"]
    command = [sys.executable, "-m", "ddoq_ray", "compare", *words]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        until = time.monotonic() + 400
        while len(list(run.rglob(f"students/*/{layout.MANIFEST}"))) < 3:
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finished = {p: p.stat().st_mtime_ns for p in run.rglob(f"students/*/{layout.MANIFEST}")}
    assert 3 <= len(finished) < len(students(whole)), "it was killed too late to say anything"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert students(run) == students(whole) and figures(run) == figures(whole)
    assert {p: p.stat().st_mtime_ns for p in finished} == finished


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ipcs=[1,200]"], "classes have fewer images than ipc=200"),
        (["teachers=[digits,OTHER]"], "has no teacher_index, and the teacher has no output of that name"),
        pytest.param(["students=[no-such-net]"], "no-such-net", marks=pytest.mark.slow),
    ],
)
def test_wrong_inputs_are_told_before_anything_is_spent(
    whole: Path, tmp_path: Path, words: list[str], told: str
) -> None:
    run = tmp_path / "run"
    names = [f"animal {i}" for i in range(10)]
    save_classifier(build_classifier("convnet3-w4", 10, 16, classes=names), tmp_path / "other")
    words = [word.replace("OTHER", str(tmp_path / "other")) for word in words]
    given = [w for w in TINY if w.partition("=")[0] not in {word.partition("=")[0] for word in words}]
    with pytest.raises(ValueError, match=told):
        pipeline.run(BY_NAME["compare"].compose([*given, f"run_dir={run}", *words]))
    assert not (run / layout.LATENTS).exists() and not (run / layout.COMPARE).exists()


def test_status_and_verify_know_a_comparison(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BY_NAME["status"].run(BY_NAME["status"].compose([str(whole)]))
    said = capsys.readouterr().out
    assert "ipc 1, 2, ddoq, random, full" in said and "train      done, 20 of 20" in said
    BY_NAME["verify"].run(BY_NAME["verify"].compose([str(whole)]))
    assert "is as it was written" in capsys.readouterr().err
