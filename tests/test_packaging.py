"""The command from a wheel, from an editable install and from a checkout that is not installed."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PREPARE = ["stages=[prepare]", "run_dir=out", "ipc=1"]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def layered_venv(folder: Path) -> Path:
    """A venv that sees this one's packages, but not the project as this one has it installed.

    A directory named in a .pth file is searched after the venv's own packages, and .pth files inside it are not read,
    so this venv's editable install stays out of sight.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    library = next((folder / "lib").glob("python3*")) / "site-packages"
    packages = [p for p in (*site.getsitepackages(), *sys.path) if p.endswith("site-packages")]
    (library / "layer.pth").write_text("\n".join(dict.fromkeys(packages)) + "\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked parts of the checkout, so that building leaves nothing behind here."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("ddoq_ray", "configs"):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, copy / name)
    return copy


def assert_prepared(folder: Path) -> None:
    assert (folder / "out/data/manifest.json").is_file()
    assert (folder / "out/config.yaml").is_file()


@pytest.mark.processes
def test_wheel(tmp_path: Path, checkout: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, checkout, cwd=tmp_path)
    wheel = next(tmp_path.glob("*.whl"))
    bin_ = layered_venv(tmp_path / "venv")
    run(bin_ / "python", "-m", "pip", "install", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    where = run(bin_ / "python", "-c", "import ddoq_ray; print(ddoq_ray.__file__)", cwd=empty).stdout
    assert str(tmp_path / "venv") in where
    assert "distil" in run(bin_ / "ddoq-ray", "--help", cwd=empty).stdout
    run(bin_ / "ddoq-ray", *PREPARE, cwd=empty)  # which loads the shipped networks before anything else
    assert_prepared(empty)
    assert sorted(p.name for p in empty.iterdir()) == ["out"], "the command leaves nothing but its run directory"


@pytest.mark.slow  # what `make` itself installs
def test_editable_install(tmp_path: Path, checkout: Path) -> None:
    bin_ = layered_venv(tmp_path / "venv")
    run(bin_ / "python", "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", checkout,
        cwd=tmp_path)  # fmt: skip
    empty = tmp_path / "empty"
    empty.mkdir()
    where = run(bin_ / "python", "-c", "import ddoq_ray; print(ddoq_ray.__file__)", cwd=empty).stdout
    assert str(checkout) in where
    run(bin_ / "ddoq-ray", *PREPARE, cwd=empty)
    assert_prepared(empty)


@pytest.mark.slow  # what `ray job submit --working-dir .` ships: tests/test_job_submit.py runs one
def test_checkout_that_is_not_installed(tmp_path: Path, checkout: Path) -> None:
    bin_ = layered_venv(tmp_path / "venv")
    run(bin_ / "python", "-m", "ddoq_ray", *PREPARE[:1], PREPARE[2], f"run_dir={tmp_path}/out", cwd=checkout)
    assert_prepared(tmp_path)
