"""Joining, leaving and being stopped: real processes, real ports, exit codes and the words on the terminal."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ddoq_ray import pipeline
from ddoq_ray.config.compose import load_config
from ddoq_ray.config.run import STAGES
from ddoq_ray.execution.cluster_address import Where, find, probe
from ddoq_ray.execution.places import check_apart, check_lasting, complaint, named_paths, unseen
from ddoq_ray.execution.session import short_temporary
from ddoq_ray.storage.folder import Folder


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "ddoq_ray", *arguments],
        env=env,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_what_is_said_wins_over_the_environment() -> None:
    here = {"RAY_ADDRESS": "10.1.2.3:6379"}
    assert find(load_config().cluster.address, here) == Where("10.1.2.3:6379", "RAY_ADDRESS")
    assert find(load_config(["cluster=gpu"]).cluster.address, here) == Where("10.1.2.3:6379", "RAY_ADDRESS")
    assert find(load_config(["cluster.address=local"]).cluster.address, here) is None
    assert find("head:6379", here) == Where("head:6379", "cluster.address")
    assert find(load_config().cluster.address, {}) is None


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://head:10001", ["Ray Client", "http://head:8265", "RAY_ADDRESS=head:6379"]),
        ("http://head:8265", ["ray job submit --address http://head:8265"]),
        ("head", ["expected HOST:PORT"]),
    ],
)
def test_addresses_of_other_kinds_say_what_to_set(address: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        find(None, {"RAY_ADDRESS": address})
    assert all(w in str(error.value) for w in [f"RAY_ADDRESS={address}", *words])


@pytest.mark.parametrize("answers", [True, False])
def test_a_port_that_is_no_ray_is_told_within_its_time(answers: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        if answers:
            threading.Thread(
                target=lambda: server.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n"), daemon=True
            ).start()
        where = Where(f"127.0.0.1:{server.getsockname()[1]}", "RAY_ADDRESS")
        words = "is no Ray head" if answers else "no answer in 1 s"
        with pytest.raises(ValueError, match=words):
            probe(where, 1.0)


@pytest.mark.processes
def test_a_dead_port_is_told_at_once(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    start = time.monotonic()
    process = command(f"run_dir={tmp_path}/run", "stages=[prepare]", RAY_ADDRESS=address)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and time.monotonic() - start < 30
    assert f"joins the cluster at {address} (RAY_ADDRESS)" in err
    assert f"no Ray cluster at {address} (RAY_ADDRESS)" in err and "Traceback" not in err
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.processes
def test_sigterm_ends_a_run_in_words_and_frees_what_it_held(tmp_path: Path) -> None:
    process = command(f"run_dir={tmp_path}/run", "ipc=1", "stages=[prepare,encode,quantize]", "baselines=[]")
    lines: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)  # type: ignore[arg-type]
    reader.start()
    deadline = time.monotonic() + 240
    while not (tmp_path / "run/data/manifest.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, lines
        time.sleep(0.1)
    assert (tmp_path / "run/lease.json").exists()
    second = command(f"run_dir={tmp_path}/run", "ipc=1", "stages=[prepare]")
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2 and f"process {process.pid} on" in err
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # as Slurm does to a whole job: not cut off while it puts things away
    assert process.wait(timeout=60) == 143
    reader.join(timeout=10)
    text = "".join(lines)
    assert "stopped by SIGTERM; the same command again goes on" in text
    assert "Traceback" not in text and "finished   " not in text and "*** SIG" not in text
    assert not (tmp_path / "run/lease.json").exists()


NOTEBOOK = """
import sys, threading, ray, ddoq_ray

heard = threading.Event()

class Ear:
    def write(self, text):
        if "of the user's own task" in text:
            heard.set()

    def flush(self):
        pass

ray.init(address="local", num_cpus=2, include_dashboard=False)  # a user's own, with Ray's own defaults

@ray.remote
def loud():
    print("of the user's own task")

print("begins", file=sys.stderr, flush=True)
ddoq_ray.distill("ipc=1", "stages=[prepare,encode,quantize]", "baselines=[]", run_dir=sys.argv[1])
print("ends", file=sys.stderr, flush=True)
sys.stdout = Ear()
ray.get(loud.remote())
assert heard.wait(60), "what the user's own tasks print is kept back after the run"
ray.shutdown()
"""


@pytest.mark.slow
def test_in_a_session_that_is_up_a_run_says_its_own_lines_alone(tmp_path: Path) -> None:
    """As in a notebook; and afterwards the user's own tasks are heard as before."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    words = [sys.executable, "-c", NOTEBOOK, str(tmp_path / "run")]
    done = subprocess.run(words, env=environment, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    ours = lines[lines.index("begins") + 1 : lines.index("ends")]
    assert ours and [line for line in ours if line.split(" ")[0] not in (*STAGES, "finished")] == []


def test_a_job_s_working_copy_is_no_place_for_results(tmp_path: Path) -> None:
    copy = tmp_path / "session_x/runtime_resources/working_dir_files/_ray_pkg_1"
    copy.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"working copy of a Ray job, which Ray deletes.*run_dir=/shared/digits"):
        check_lasting(str(copy / "runs/digits"), "run_dir")
    check_lasting(str(tmp_path), "run_dir")
    with pytest.raises(ValueError, match=r"run_dir=memory://a is the memory of this process, which no worker sees"):
        check_lasting("memory://a", "run_dir")
    check_lasting("s3://bucket/runtime_resources/working_dir_files", "run_dir")


def test_nodes_that_do_not_see_a_place_are_named(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    overrides = [f"dataset.path={tmp_path}/train-{{0..3}}.tar", f"dataset.val_path=file://{tmp_path}/val"]
    overrides += ["prior.path=org/hub-id", "teacher.path=torchvision:resnet18"]
    named = named_paths(load_config(["experiment=digits", *overrides]))
    assert named == [("dataset.path", str(tmp_path)), ("dataset.val_path", f"{tmp_path}/val")]
    run = Folder(str(tmp_path))
    (tmp_path / "token").touch()
    assert unseen(run, "token", named) == []
    (tmp_path / "val").rmdir()
    missing = unseen(run, "another", named)
    assert missing == [("run_dir", str(tmp_path)), ("dataset.val_path", f"{tmp_path}/val")]
    assert complaint([("a (1)", [])]) == ""
    words = complaint([("a (1)", []), ("b (2)", missing)])
    assert f"node b (2) does not see run_dir ({tmp_path}) and dataset.val_path" in words and "node a" not in words


def test_a_long_temporary_folder_is_left_to_others_than_ray(tmp_path: Path) -> None:
    assert short_temporary({}) is None and short_temporary({"TMPDIR": "/tmp"}) is None
    for none in (f"{tmp_path}/{'x' * 60}", "/tmp/größe"):  # Ray's core takes ASCII alone
        assert str(short_temporary({"TMPDIR": none})).startswith("/tmp/ray")


def test_file_urls_and_home_are_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (f"file://{tmp_path}/x", f"file:{tmp_path}/x", "~/x"):
        folder = Folder(given)
        assert folder.local and folder.uri == f"{tmp_path}/x"


def test_results_and_data_do_not_lie_in_one_another(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()

    def check(run: str, *more: str) -> None:
        check_apart(load_config(["stages=[prepare]", f"run_dir={tmp_path}/{run}", *more]))

    images = f"dataset.path={tmp_path}/set"
    for run in ("set", "set/run", "set/cat/run"):
        with pytest.raises(ValueError, match=r"lies inside dataset.path=.*choose a run_dir outside"):
            check(run, images)
    check("run", images)
    (tmp_path / "set/run/data").mkdir(parents=True)
    (tmp_path / "set/run/data/manifest.json").touch()
    check("set/run", images)  # it was prepared before anything was in the way
    shards = tmp_path / "run/data/train"
    shards.mkdir(parents=True)
    (shards / "train-0.tar").touch()
    check("other", f"dataset.path={shards}")
    with pytest.raises(ValueError, match=r"lies in data/ of run_dir"):
        check("run", f"dataset.path={shards}/train-*.tar")


@pytest.mark.processes
def test_nobody_reads_what_is_said() -> None:
    """A pipe whose reader has gone, and closed streams: the command ends as it would, without a traceback."""
    started = []
    for arguments, stream in ((["--help"], "stdout"), (["nonsense"], "stderr")):
        reader, writer = os.pipe()
        os.close(reader)
        other = "stderr" if stream == "stdout" else "stdout"
        streams = {stream: writer, other: subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, "-m", "ddoq_ray", *arguments], text=True, **streams))  # type: ignore[call-overload]
        os.close(writer)
    shell = f"{sys.executable} -m ddoq_ray nonsense 2>&-"
    started.append(subprocess.Popen(shell, shell=True, text=True, stdout=subprocess.PIPE))
    ends = [(p.communicate(timeout=120), p.returncode) for p in started]
    assert [code for _, code in ends] == [0, 2, 2]
    assert not any(filter(None, (text for told, _ in ends for text in told))), ends


@pytest.mark.processes
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_behind_the_streams(tmp_path: Path) -> None:
    """What was asked for and cannot be written is an error; what is said on the way is lost, and the work goes on."""
    pipeline._publish_config(load_config([f"run_dir={tmp_path}"]), Folder(str(tmp_path)), {})
    with open("/dev/full", "w") as full:
        for words in (["--help"], ["status", str(tmp_path)]):
            line = [sys.executable, "-m", "ddoq_ray", *words]
            ended = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
            assert ended.stderr == "ddoq-ray: error: cannot write standard output: No space left on device\n"
            assert ended.returncode == 2
        assert subprocess.run([sys.executable, "-m", "ddoq_ray", "nope"], stderr=full, check=False).returncode == 2
        code = "from ddoq_ray.execution.console import say; say('heard by nobody'); print('goes on')"
        went = subprocess.run([sys.executable, "-c", code], stderr=full, stdout=subprocess.PIPE, text=True, check=False)
    assert (went.returncode, went.stdout) == (0, "goes on\n")


@pytest.mark.processes
def test_by_force_ray_is_ended_last_and_the_exit_code_is_the_signal_s() -> None:
    """A lease's release takes time; were Ray gone before it, its core would end the process with exit code 1."""
    code = """
import os, threading
from ddoq_ray.execution.signals import last_resort, leave
with last_resort(lambda: print("lease", flush=True)), last_resort(lambda: os.write(1, b"ray")):
    threading.Thread(target=leave, args=(143,)).start()
    threading.Event().wait()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (143, "lease\nray")


@pytest.mark.slow
def test_a_ray_that_does_not_start_is_told_in_words(tmp_path: Path) -> None:
    """Its node waits half a minute for a raylet that has died, and raises a bare Exception."""
    code = f"""
import ray._private.services
ray._private.services.RAYLET_EXECUTABLE = "/bin/false"
from ddoq_ray.cli import main
raise SystemExit(main(["run", "ipc=1", "cluster.address=local", "run_dir={tmp_path}/run"]))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "Ray did not start on this machine" in ended.stderr and "session_latest/logs" in ended.stderr
