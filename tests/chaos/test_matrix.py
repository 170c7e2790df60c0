"""Every stage with every kind of death makes what it makes undisturbed: one seed of `python -m tests.chaos.matrix`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from ddoq_ray import pipeline
from ddoq_ray.config.compose import load_config
from ddoq_ray.config.run import STAGES
from tests.chaos import matrix
from tests.chaos.cells import DEATHS, HANGS_S, KEYS, WORKS, Lab, cell, content, write_photos
from tests.support.deaths import InThread, kill_when, stamps

pytestmark = pytest.mark.chaos
SEED = 100  # the matrix that is committed has 0, 1, 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("death", DEATHS)
def test_a_death_changes_nothing(here: Lab, stage: str, death: str, tmp_path: Path) -> None:
    row = cell(here, stage, death, SEED, tmp_path / "run")
    assert row["equal"] and row["killed"], row


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["label", "train"])
def test_a_death_is_told(here: Lab, stage: str, tmp_path: Path) -> None:
    """In the run's events; a teacher dies with most label files to come, and a trainer with most students."""
    place, works = tmp_path / "run", WORKS[stage]
    shutil.copytree(here.base / stage, place)
    work = InThread(lambda: here.run(place, stage))
    work.wait_for(lambda: list(place.glob(works.units[0])))
    _, process = work.wait_for(lambda: here.at_work(*(works.tasks or works.actors)))[0]
    os.kill(process, signal.SIGKILL)
    work.join(HANGS_S)
    told = [json.loads(line) for line in (place / "events.jsonl").read_text().splitlines()]
    words = {row["event"] for row in told if row.get("stage") == stage}
    assert words >= ({"worker lost", "unit requeued"} if stage == "label" else {"worker lost"})
    assert content(place, stage) == content(here.after(stage), stage)


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("driver", [False, pytest.param(True, marks=pytest.mark.slow)])  # which starts a Ray of its own
def test_actors_of_three_stages_die_in_one_run(tmp_path: Path, driver: bool) -> None:
    """An encoder, a quantizer while encoders write, a decoder; before them the command, which is given again."""
    import ray

    node, rng = ray._private.worker._global_node, np.random.default_rng(0)
    calm, place = tmp_path / "calm", tmp_path / "run"
    write_photos(tmp_path / "photos")
    done, tars = "latents/*/done.json", "images/images-*.tar"

    def keys(place: Path) -> list[str]:
        # One worker of each kind, which loads torch for seconds: the matrix above has two.
        few = ["baselines=[]", "quantizer.num_shards=1", "synthesizer.max_workers=1", "dataset.shard_samples=25"]
        stages = "stages=[prepare,encode,quantize,synthesize]"
        return [*KEYS, *few, f"dataset.path={tmp_path / 'photos'}", f"run_dir={place}", stages]

    def run(place: Path) -> None:
        pipeline.run(load_config(keys(place)))

    here = [*keys(place), "cluster.encoder.num_gpus=0", "cluster.decoder.num_gpus=0"]  # a Ray of its own has no GPU
    if driver:
        kill_when(lambda: any(place.glob(done)), here, tmp_path / "log")
    kept = stamps(place, done)
    assert driver <= len(kept) < 16  # of 40
    work = InThread(lambda: run(place))
    for word, units, least, most in (("Encoder", done, 1, 16), ("Quantizer", done, 18, 32), ("Decoder", tars, 1, 10)):
        number = len(kept) + int(rng.integers(1, 3)) if word == "Encoder" else int(rng.integers(least, most))
        work.wait_for(lambda units=units, number=number: len(list(place.glob(units))) >= number)
        work.kill(node, word, lambda there: int(rng.choice(there)))
    work.join(120)
    assert {name: stamp for name, stamp in stamps(place, done).items() if name in kept} == kept
    run(calm)
    for stage in ("encode", "quantize", "synthesize"):
        made = content(place, stage)
        assert made and made == content(calm, stage)
    assert b'"worker lost", "stage": "synthesize"' in (place / "events.jsonl").read_bytes()


def test_a_row_that_is_in_the_file_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    row = {"stage": "encode", "death": "node", "seed": 0, "equal": True}
    for equal, code in ((True, 0), (False, 1)):
        file.write_text(json.dumps([row | {"equal": equal}]))
        command = ["matrix", "--json", str(file), "--stage", "encode", "--death", "node", "--seeds", "1"]
        monkeypatch.setattr(sys, "argv", command)
        assert matrix.main() == code
        assert json.loads(file.read_text()) == [row | {"equal": equal}]
