"""How large files and functions may be. `python tests/test_shape.py` lists those that are larger."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
FOLDERS = ("ddoq_ray", "benchmarks", "studies", "tests")
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 6


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many a caller sees: `self` and `cls` do not count, `*args` and `**kwargs` are one each."""
    asked = function.args
    named = [a.arg for a in (*asked.posonlyargs, *asked.args, *asked.kwonlyargs)]
    return len([n for n in named if n not in ("self", "cls")]) + sum(a is not None for a in (asked.vararg, asked.kwarg))


def larger_functions(source: str) -> Iterator[str]:
    """Functions of more lines or parameters than allowed; a comment right above one is the reason for the latter."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > FUNCTION_LINES:
            yield f"{node.name} has {length} lines"
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        if parameters(node) > PARAMETERS and not lines[first - 2].lstrip().startswith("#"):
            yield f"{node.name} has {parameters(node)} parameters"


def larger() -> Iterator[str]:
    for path in (p for folder in FOLDERS for p in sorted((CHECKOUT / folder).rglob("*.py"))):
        name, source = path.relative_to(CHECKOUT).as_posix(), path.read_text()
        if (count := len(source.splitlines())) > FILE_LINES:
            yield f"{name} has {count} lines"
        if name.startswith("ddoq_ray/"):
            yield from (f"{name}: {found}" for found in larger_functions(source))


def test_files_and_functions_are_small() -> None:
    assert not sorted(set(larger()))


def test_what_counts() -> None:
    many = "def f(a, b, /, c, d, *, e, f, g):\n    pass\n"
    assert list(larger_functions(many)) == ["f has 7 parameters"]
    assert list(larger_functions("# They are one point.\n" + many)) == []
    assert list(larger_functions("# They are one point.\n@cache\n" + many)) == []
    assert list(larger_functions("def f(self, a, b, c, d, e, *args, **more):\n    pass\n")) == ["f has 7 parameters"]
    assert list(larger_functions("class A:\n    def f(self, a, b, c, d, e, f):\n        pass\n")) == []
    assert list(larger_functions("def f():\n" + "    x = 1\n" * 59)) == []
    assert list(larger_functions("async def f():\n" + "    x = 1\n" * 60)) == ["f has 61 lines"]


if __name__ == "__main__":
    print(*larger(), sep="\n")
