"""A disk that fills while a stage publishes: nothing half-written is read; with more room the same command goes on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddoq_ray.commands import verify
from ddoq_ray.storage.at_rest import Seen
from ddoq_ray.storage.folder import Folder
from tests.chaos.cells import Lab, content

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
PAGE = 4096
# A Ray of its own, which sees the disk and has no GPUs, not even in name.
ALONE = ["cluster.address=local", *(f"cluster.{who}.num_gpus=0" for who in ("encoder", "decoder", "teacher"))]
# A disk of its own for the run, in a mount namespace of its own: as it was left, and as it is after more room.
SCRIPT = """
set -e
mount -t tmpfs -o size=$1 none "$2/disk"
cp -a "$2/before" "$2/disk/run"
set +e
"${@:3}" > "$2/full.log" 2>&1; echo $? > "$2/full.code"
cp -a "$2/disk/run" "$2/left"
mount -o remount,size=1g "$2/disk"
"${@:3}" > "$2/room.log" 2>&1; echo $? > "$2/room.code"
cp -a "$2/disk/run" "$2/made"
"""


def pages(place: Path) -> int:
    """What a tree takes of a disk in memory, where folders take nothing."""
    return sum(-(-p.stat().st_size // PAGE) for p in place.rglob("*") if p.is_file())


@pytest.mark.parametrize("stage", ["prepare", "encode", "synthesize", "label", "train"])
def test_a_disk_that_fills_in_a_stage(here: Lab, stage: str, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    (tmp_path / "disk").mkdir()
    shutil.copytree(here.base / stage, tmp_path / "before")
    has, will = pages(here.base / stage), pages(here.after(stage))
    command = [sys.executable, "-m", "ddoq_ray", *here.keys(tmp_path / "disk/run", stage), *ALONE]
    size = PAGE * (has + max(20, (will - has) // 2))  # 16 are written to see whether anything can be; students take 24
    words = ["unshare", "-rm", "bash", "-c", SCRIPT, "script", str(size), str(tmp_path), *command]
    subprocess.run(words, check=True, timeout=300)
    told = (tmp_path / "full.log").read_text()
    assert (tmp_path / "full.code").read_text() == "2\n", told
    assert "No space left on device" in told.splitlines()[-1] and "Traceback" not in told
    assert verify.look(Folder(str(tmp_path / "left")), Seen())[1] == []
    assert (tmp_path / "room.code").read_text() == "0\n", (tmp_path / "room.log").read_text()
    assert content(tmp_path / "made", stage) == content(here.after(stage), stage)
    assert not list((tmp_path / "made").rglob("*.tmp"))
