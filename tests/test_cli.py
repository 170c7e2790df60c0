"""The command line: exit codes and what a person reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ddoq_ray
from ddoq_ray import cli
from ddoq_ray.config import STAGES


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ddoq-ray {ddoq_ray.__version__}\n"


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"], ["label", "--help"]])
def test_help_goes_to_stdout(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert all(stage in out for stage in STAGES)
    assert "train-prior" in out and "run_dir" in out
    assert max(map(len, out.splitlines())) <= 150


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["destil"], ["unknown command 'destil'", "run, prepare, encode", "train-teacher"]),
        (["--ipc", "3"], ["unknown command '--ipc'", "key=value"]),
        (["ipcc=3"], ["unknown configuration key ipcc", "did you mean ipc?"]),
        (["run", "ipc=0"], ["ipc=0", "1 or more"]),
        (["ipc=3", "label"], ["'label' is not key=value", "a command comes first"]),
        (["label", "stages=[train]"], ["one stage", "stages="]),
        (["train-prior", "outt=x"], ["unknown configuration key outt", "did you mean out?"]),
        (["train-prior", "dataset=nothing"], ["dataset=nothing", "digits, idx, imagefolder"]),
        (
            ["train-prior", "dataset.path=/nowhere/at/all"],
            ["dataset.path=/nowhere/at/all", "does not exist", "ddoq-ray prepare"],
        ),
        (["train-teacher", "image_size=2"], ["image_size=2", "8 or more"]),
        (["train-teacher", "training.epochs=[1"], ["training.epochs='[1'", "whole number"]),
    ],
)
def test_a_mistake_is_exit_code_2_and_one_line(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ddoq-ray: error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_user_error_finds_the_words_at_the_bottom() -> None:
    try:
        try:
            raise ValueError("mend this")
        except ValueError as bottom:
            raise RuntimeError("wrapped") from bottom
    except RuntimeError as error:
        assert cli.user_error(error) == "mend this"
    assert cli.user_error(KeyError("a bug")) is None

    class Remote(Exception):
        cause = ValueError("from a worker")

    assert cli.user_error(Remote()) == "from a worker"


def test_the_module_is_the_command(tmp_path: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-m", "ddoq_ray", "ipcc=3"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (out.returncode, out.stdout) == (2, "")
    assert "ipcc" in out.stderr and "Traceback" not in out.stderr
    assert not list(tmp_path.iterdir())


def test_an_argument_that_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stages=[prepare]", "dataset.path=/caf\udce9"]) == 2
    err = capsys.readouterr().err
    assert "dataset.path=/caf\\udce9 is no UTF-8" in err and "LC_ALL=C.UTF-8" in err
