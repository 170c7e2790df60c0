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


def test_a_folder_whose_name_holds_a_sign_of_equality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "lr=1, b=2/ü"
    pipeline._publish_config(load_config([f"run_dir={place}"]), Folder(str(place)), {})
    assert main(["status", str(place)]) == 0
    assert capsys.readouterr().out.startswith(f"{place}: ")


@pytest.mark.parametrize("command", ["label", "train", "evaluate", "report"])
def test_a_mistyped_folder_is_not_filled_with_data(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole collection would be packed, to say then that the stage before is not finished."""
    assert main([command, f"run_dir={tmp_path}/typo"]) == 2
    assert f"{tmp_path}/typo/data is not finished: run the prepare stage first" in capsys.readouterr().err
    assert not any(p.is_file() for p in tmp_path.rglob("*"))


@pytest.mark.parametrize("command", ["status", "verify", "plan"])
def test_a_file_for_a_run_and_a_protocol_that_nobody_knows(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for place, told in ((tmp_path / "file", "file"), ("nope://run", "Protocol not known: nope")):
        assert main([command, f"run_dir={place}"]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("file", ["lease.json", "config.yaml", "events.jsonl", "data/manifest.json"])
@pytest.mark.parametrize("command", ["status", "verify"])
def test_a_folder_where_a_runs_file_should_be(
    command: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As another user's files, which a test that may be run by root cannot show: they are there, and cannot be read."""
    pipeline._publish_config(load_config([f"run_dir={tmp_path}"]), Folder(str(tmp_path)), {})
    (tmp_path / file).unlink(missing_ok=True)
    (tmp_path / file).mkdir(parents=True)
    code = main([command, str(tmp_path)])
    err = capsys.readouterr().err
    assert code == (0 if (command, file) == ("verify", "lease.json") else 2), err
    assert code == 0 or f"cannot read {tmp_path / file}: Is a directory" in err


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
