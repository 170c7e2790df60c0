import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.provenance import provenance as of_rows
from ddoq_ray import provenance

HERE = Path(provenance.__file__).resolve()


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    return subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def commit_of(module: Path) -> str | None:
    return runpy.run_path(str(module))["commit"]()


def test_the_commit_is_that_of_its_own_checkout(tmp_path: Path) -> None:
    """None outside a checkout, and in one that does not track it; dirty when a tracked file has changed."""
    module = tmp_path / "package" / "provenance.py"
    module.parent.mkdir()
    module.write_bytes(HERE.read_bytes())
    assert commit_of(module) is None
    git(tmp_path, "init", "-q")
    (tmp_path / "other.py").touch()
    git(tmp_path, "add", "other.py")
    git(tmp_path, "commit", "-qm", "theirs")
    assert commit_of(module) is None
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "ours")
    git(tmp_path, "tag", "-am", "a release", "v1")  # a tag's name would be no commit
    head = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert commit_of(module) == head
    (tmp_path / "other.py").write_text("changed = True\n")
    assert commit_of(module) == f"{head}-dirty"


def test_rows_say_what_the_package_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/quantize.py", "--k", "10", "--json", "out.json"])
    assert of_rows() == {
        "hardware": provenance.hardware(),
        "commit": provenance.commit() or "unknown",
        "command": "python -m benchmarks.quantize --k 10",
    }
    assert provenance.hardware().endswith(" cores")


@pytest.mark.processes
def test_nothing_heavy_is_loaded() -> None:
    heavy = {"torch", "ray", "numpy"}
    code = f"import sys, ddoq_ray.provenance as p; p.commit(), p.hardware(); print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parents[1])
    assert out.stdout.strip() == "set()"
