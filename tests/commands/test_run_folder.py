"""Commands that look at a run directory: what they are given, and what is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddoq_ray import pipeline
from ddoq_ray.cli import main
from ddoq_ray.config.compose import load_config
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.folder import Folder

KEYS = ["ipc=3", "quantizer=gram", "protocol=d4m", "student=resnet18-small", "baselines=[d4m]", "dataset.name=é"]


def test_a_recorded_configuration_is_read_back_and_every_byte_of_it_counts(tmp_path: Path) -> None:
    run, config = Folder(str(tmp_path)), load_config([*KEYS, f"run_dir={tmp_path}"])
    pipeline._publish_config(config, run, {"torch": "1.2"})
    assert pipeline.recorded_config(run) == config
    data = (tmp_path / "config.yaml").read_bytes()
    for at in range(0, len(data) - 1, 97):
        (tmp_path / "config.yaml").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
            pipeline.recorded_config(run)
    (tmp_path / "config.yaml").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        pipeline.recorded_config(run)


@pytest.mark.parametrize("command", ["status", "verify"])
def test_what_is_no_run_is_said(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (([], "run_dir is not given"), ([str(tmp_path)], "config.yaml"), (["run=x"], "run_dir")):
        assert main([command, *words]) == 2
        assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_status_of_a_run_that_was_killed_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, config = Folder(str(tmp_path)), load_config([f"run_dir={tmp_path}", "stages=[prepare,encode,quantize]"])
    pipeline._publish_config(config, run, {})
    data, latents = Artifact(run / "data", "prepare"), Artifact(run / "latents", "encode")
    data.begin({})
    data.finish({}, seconds=2.0, items=1000, unit="images", shards=4)
    latents.begin({})
    run.publish("latents/shard-000002/done.json", b"{}")
    run.publish("events.jsonl", json.dumps({"time": 0, "event": "run started", "stages": ["encode"]}).encode())
    gone = {"token": "a", "host": "elsewhere", "machine": "m", "pid": 7, "process": "", "since": 0, "renewed": 0}
    run.publish("lease.json", json.dumps(gone).encode())
    assert main(["status", f"run_dir={tmp_path}"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1].startswith("held by process 7 on elsewhere") and "the same command goes on" in told[1]
    assert told[2:5] == [
        "prepare    done, 1,000 images in 2 s",
        "encode     0 of 1 done; at work: latents 1 of 4 shards",
        "quantize   not begun",
    ]
    assert not any(line.startswith("train") for line in told) and "run started: stages encode" in told[-1]
