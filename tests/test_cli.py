"""The command line: exit codes and what a person reads."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import getbase

import ddoq_ray
from ddoq_ray import cli
from ddoq_ray.commands.help import command_help, keys_of
from ddoq_ray.commands.sweep import configurations
from ddoq_ray.commands.table import BY_NAME, COMMANDS, RUN
from ddoq_ray.config import STAGES, RunConfig
from ddoq_ray.config.compose import load_config
from ddoq_ray.config.run import configured
from ddoq_ray.execution.errors import NoWorkers, user_error


def test_a_cluster_without_room_is_exit_code_3_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(line: cli.Line) -> None:
        raise NoWorkers("synthesize: no worker could be placed for 120 s")

    monkeypatch.setattr(cli, "_dispatch", run)
    assert cli.main(["synthesize"]) == 3
    assert capsys.readouterr().err == "ddoq-ray: error: synthesize: no worker could be placed for 120 s\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ddoq-ray {ddoq_ray.__version__}\n"


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
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
        assert user_error(error) == "mend this"
    assert user_error(KeyError("a bug")) is None

    class Remote(Exception):
        cause = ValueError("from a worker")

    assert user_error(Remote()) == "from a worker"

    class OutOfMemoryError(RuntimeError):  # torch's, by its name: torch takes a second to import
        __module__ = "torch"

    class Filled(Exception):
        cause = OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    told = user_error(Filled())
    assert told is not None and "Tried to allocate 2.00 GiB" in told and "encoder.batch; teacher.batch" in told


@pytest.mark.processes
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


def test_a_commands_help_names_each_of_its_keys_with_words() -> None:
    every = set()
    for command in COMMANDS:
        text = command_help(command)
        keys = keys_of(command.keys)
        read = [k for k, _, _ in keys if not command.reads or any(
            k == r or (r.endswith(".") and k.startswith(r)) for r in command.reads)]  # fmt: skip
        assert all(words for _, words, _ in keys)
        for key in read:
            assert any(line.startswith(f"  {key} ") and line[len(key) + 2 :].strip() for line in text.splitlines()), key
        if command.means:
            every |= set(read)
            for r in command.reads:
                assert any(k == r or (r.endswith(".") and k.startswith(r)) for k, _, _ in keys), (command.name, r)
    # Every key of a run is read by a stage, but for those that choose stages or are for a plan.
    assert {k for k, _, _ in keys_of(RUN.keys)} - every == {"stages", "cluster.calibration", "cluster.gpu_gb"}
    assert "soft labels" in command_help(BY_NAME["label"]) and "\n  synthesizer." not in command_help(BY_NAME["label"])


def test_help_says_every_word_that_a_key_may_be_and_the_size_that_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"digits at {RunConfig().ipc} images per class" in out
    for group in dataclasses.fields(RunConfig):
        kind = get_type_hints(RunConfig)[group.name]
        for key, hint in get_type_hints(kind).items() if dataclasses.is_dataclass(kind) else ():
            about = out.split(f" {group.name}.{key} ")[-1].split(f" {group.name}.")[0]
            for part in (hint, *get_args(hint)):
                assert all(word in about for word in get_args(part) if get_origin(part) is Literal), (group.name, key)


def test_cfg_job_prints_the_composed_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--cfg", "job", "ipc=3"]) == 0
    assert configured(RunConfig, yaml.safe_load(capsys.readouterr().out)) == load_config(["ipc=3"])
    assert cli.main(["train-prior", "out=x", "--cfg=job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["training"]["denoiser_steps"] == 3500
    assert cli.main(["--cfg", "hydra"]) == 2
    assert "expected --cfg job" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "folders"),
    [
        (["ipc=1,5,10"], ["runs/digits-ipc1", "runs/digits-ipc5", "runs/digits-ipc10"]),
        (["ipc=1,5", "run_dir=x/"], ["x-ipc-1", "x-ipc-5"]),
        (["quantizer=gram,kmeans"], ["runs/digits-ipc5-quantizer-gram", "runs/digits-ipc5-quantizer-kmeans"]),
        (["baselines=[d4m],[random]", "run_dir=a,b", "ipc=2"], None),
        (["baselines=d4m,random"], ["runs/digits-ipc5"]),
    ],
)
def test_a_sweep_gives_each_run_a_folder(words: list[str], folders: list[str] | None) -> None:
    found = [config.folder for _, config in configurations(RUN, words)]
    assert found == folders if folders else len(set(found)) == 4


def test_a_sweep_is_checked_whole_before_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-m", "ipc=1,0"]) == 2
    assert "ipc=0" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--shell-completion", f"install={shell}"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("train-prior", "quantizer=gram", "training.ema=", "complete "))
    if shell == "bash":
        asked = 'COMP_LINE="ddoq-ray quantizer=gr"; COMP_POINT=${#COMP_LINE}; _ddoq_ray; echo "${COMPREPLY[@]}"'
        out = subprocess.run(["bash", "-c", text + asked], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "gram", out.stderr
    assert cli.main(["-sc", "install=tcsh"]) == 2


@pytest.mark.processes
def test_help_loads_neither_torch_nor_ray_nor_hydra() -> None:
    code = (
        "import sys; from ddoq_ray import cli; cli.main(['--help']); cli.main(['train-prior', '--help']); "
        "print(sorted({'ray', 'torch', 'hydra', 'diffusers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"


def test_a_callers_own_hydra_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("x: 3\n")
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        load_config(["quantizer=gram"])
        with pytest.raises(ValueError):
            load_config(["run_dir=${nope}"])
        assert compose("mine").x == 3 and str(getbase()) == "1.2"
    load_config()
    assert not GlobalHydra.instance().is_initialized()


def test_a_current_directory_that_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.main(["plan", f"run_dir={tmp_path}"]) == 2
    assert "cd to one that is there" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
