"""The cluster entry: the same command by `ray job submit` against a local head, as the README says it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

CHECKOUT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head of this test's own: (its jobs address, the environment with its token)."""
    gcs, dashboard, agent, grpc, client = free_ports(5)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {
        "PATH": f"{BIN}{os.pathsep}{env['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_DISABLE_IMPORT_WARNING": "1",
    }
    # Ray's socket paths are limited to 107 bytes, which pytest's own folders exceed.
    with tempfile.TemporaryDirectory(prefix="ddoq", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}",
            "--node-ip-address=127.0.0.1",
            "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}",
            f"--ray-client-server-port={client}", f"--temp-dir={folder}", "--object-store-memory=200000000",
        ]  # fmt: skip
        with open(f"{folder}.log", "wb") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 90
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", dashboard), timeout=1):
                    break
                assert process.poll() is None and time.monotonic() < deadline, Path(f"{folder}.log").read_text()
                time.sleep(0.3)
            facts = {"DDOQ_TEST_HEAD": f"127.0.0.1:{gcs}", "DDOQ_TEST_PROCESS": str(process.pid)}
            yield f"http://127.0.0.1:{dashboard}", env | facts
        finally:
            # Its group only; never `ray stop`, which ends every Ray on the machine.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
            Path(f"{folder}.log").unlink(missing_ok=True)


def submit(head: tuple[str, dict[str, str]], *arguments: str) -> subprocess.CompletedProcess[str]:
    address, env = head
    return subprocess.run(
        [str(BIN / "ray"), "job", "submit", f"--address={address}", "--working-dir", ".",
         "--runtime-env", "cluster/runtime_env.yaml", "--", "python", "-m", "ddoq_ray", *arguments],
        cwd=CHECKOUT, env=env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_a_good_job_exits_0_and_leaves_its_results(head, tmp_path):
    done = submit(head, f"run_dir={tmp_path}/run", "ipc=1", "stages=[prepare]", "baselines=[]")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "run/data/manifest.json").is_file()


@pytest.mark.slow
def test_a_good_job_leaves_its_codebook(head, tmp_path):
    done = submit(head, f"run_dir={tmp_path}/run", "ipc=1", "stages=[prepare,encode,quantize]", "baselines=[]")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "run/codebook/manifest.json").is_file()
    assert len(list((tmp_path / "run/codebook").glob("part-*.parquet"))) == 10


def test_a_failing_job_exits_non_zero_and_says_why(head, tmp_path):
    done = submit(head, f"run_dir={tmp_path}/run", f"dataset.path={tmp_path}/nothing", "stages=[prepare]")
    assert done.returncode != 0
    assert "does not exist" in done.stdout + done.stderr


def test_results_are_not_left_where_ray_deletes_them(head):
    """Without run_dir they would be in the job's working copy: refused before anything starts."""
    done = submit(head, "stages=[prepare]")
    said = done.stdout + done.stderr
    assert done.returncode != 0 and "which Ray deletes when the job has ended" in said, said[-2000:]
    assert "joins the cluster" not in said and "succeeded" not in said


@pytest.mark.slow
def test_a_head_that_dies_is_told_before_ray_ends_the_driver(head, tmp_path):
    """The last test of this head: it is killed in the middle of a run."""
    _, env = head
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "ddoq_ray", f"run_dir={run}", "ipc=1", "stages=[prepare,encode]", "baselines=[]"],
        env=env | {"RAY_ADDRESS": env["DDOQ_TEST_HEAD"]}, cwd=CHECKOUT, text=True, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run / "data/manifest.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(int(env["DDOQ_TEST_PROCESS"]), signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "does not answer" in err and "this run waits 45 s" in err
    assert f"error: lost the cluster at {env['DDOQ_TEST_HEAD']}" in err and "the same command goes on" in err
    assert "Traceback" not in err and not (run / "lease.json").exists()
