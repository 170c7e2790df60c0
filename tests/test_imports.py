"""What imports what: one way through the rooms, without a circle, and without Ray below execution/."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ddoq_ray

ROOT = Path(ddoq_ray.__file__).parent
SOURCES = sorted(p for p in ROOT.rglob("*.py"))
# A module may import its own room and those below it.
ROOMS = {
    "provenance": 0, "core": 0, "config": 0, "storage": 1, "data": 2, "models": 3, "page": 3, "execution": 4,
    "stages": 5, "pipeline": 6, "commands": 7, "cli": 8, "__main__": 9,
}  # fmt: skip
WITHOUT_RAY = ("core", "config", "storage", "data", "models", "page", "provenance.py")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {str(node.module)} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def layer(module: str) -> int | None:
    parts = module.split(".")
    return ROOMS.get(parts[1]) if parts[0] == "ddoq_ray" and len(parts) > 1 else None


@pytest.mark.parametrize("path", [p for p in SOURCES if p != ROOT / "__init__.py"], ids=module_of)
def test_imports_go_one_way(path: Path) -> None:
    here = layer(module_of(path))
    assert here is not None, f"{path} is in no room: add it to ROOMS"
    wrong = sorted(m for m in imported(path) if (there := layer(m)) is not None and there > here)
    assert not wrong, f"{module_of(path)} (room {here}) imports {wrong}"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.relative_to(ROOT).parts[0] in WITHOUT_RAY], ids=module_of)
def test_rooms_below_execution_never_name_ray(path: Path) -> None:
    assert not {m for m in imported(path) if m.split(".")[0] == "ray"}


def test_no_circle() -> None:
    """Modules in an order in which each imports only those before it."""
    names = {module_of(p): p for p in SOURCES}
    needs = {name: {m for m in imported(path) if m in names and m != name} for name, path in names.items()}
    while ready := [name for name, wanted in needs.items() if not wanted & needs.keys()]:
        for name in ready:
            del needs[name]
    while unused := needs.keys() - set().union(*needs.values()):  # what only imports a circle is in none
        for name in unused:
            del needs[name]
    assert not needs, f"these import each other: {sorted(needs)}"


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=module_of)
def test_core_is_pure(path: Path) -> None:
    """No I/O modules, and of ddoq_ray nothing but core."""
    tops = {m.split(".")[0] for m in imported(path)}
    assert not tops & {"ray", "os", "io", "pathlib", "fsspec", "json", "tarfile", "pyarrow"}
    assert not {m for m in imported(path) if m.startswith("ddoq_ray") and not m.startswith("ddoq_ray.core")}


@pytest.mark.processes
def test_rooms_below_execution_run_where_there_is_no_ray() -> None:
    modules = [module_of(p) for p in SOURCES if p.relative_to(ROOT).parts[0] in WITHOUT_RAY]
    code = f"""
import importlib, sys
class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
sys.meta_path.insert(0, NoRay())
for name in {modules!r}:
    importlib.import_module(name)
import ddoq_ray
ddoq_ray.load, ddoq_ray.Codebook
try:
    ddoq_ray.distill
except ModuleNotFoundError as error:
    assert error.name == "ray"
else:
    raise SystemExit("distill came without ray")
print("fine")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.stdout.strip() == "fine", out.stderr[-2000:]


@pytest.mark.processes
def test_import_of_the_package_is_light() -> None:
    heavy = {"ray", "torch", "numpy", "diffusers", "PIL", "hydra"}
    code = f"import sys; import ddoq_ray; print(sorted({heavy!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_lazy_names() -> None:
    for name in ddoq_ray.__all__:
        assert getattr(ddoq_ray, name) is not None
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = ddoq_ray.nothing_here
