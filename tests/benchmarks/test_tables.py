"""Every table of measured figures is what its result file makes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tables

CHECKOUT = Path(__file__).resolve().parents[2]


def test_no_table_is_stale() -> None:
    assert tables.stale(tables.written()) == []


def test_every_marked_table_has_a_file() -> None:
    """No page holds a mark that nothing fills, or an end without a start."""
    pages = [CHECKOUT / "README.md", *(CHECKOUT / "docs").rglob("*.md")]
    marked = {
        (p.relative_to(CHECKOUT).as_posix(), n)
        for p in pages
        for n in re.findall("<!-- table: (.+?) -->", p.read_text())
    }
    filled = {(page, block[2]) for page, text in tables.written().items() for block in tables.BLOCK.finditer(text)}
    assert marked == filled and len(filled) >= 14
    ends = sum(p.read_text().count("<!-- end -->") for p in pages)
    assert ends == len(filled)


@pytest.mark.processes
def test_a_changed_figure_is_found_and_written_again(tmp_path: Path) -> None:
    for folder in ("benchmarks", "studies", "docs"):
        shutil.copytree(CHECKOUT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    page = tmp_path / "README.md"
    right = (CHECKOUT / "README.md").read_text()
    page.write_text(right.replace("| `full` | 96.9 +- 0.7 |", "| `full` | 99.9 +- 0.0 |"))
    assert page.read_text() != right

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "benchmarks.tables", *words]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)

    checked = run("--check")
    assert (checked.returncode, checked.stdout) == (1, "README.md: digits\n") and page.read_text() != right
    assert run().returncode == 0 and page.read_text() == right
    assert run("--check").returncode == 0


def test_a_table_without_a_place_is_refused() -> None:
    page = "<!-- table: one -->\nold\n<!-- end -->\n<!-- table: two -->\nkept\n<!-- end -->\n"
    assert tables.fill(page, {"one": "new"}) == page.replace("old", "new")
    with pytest.raises(ValueError, match=r"table: three .* 0 times"):
        tables.fill(page, {"three": "new"})
    with pytest.raises(ValueError, match=r"table: one .* 2 times"):
        tables.fill(page * 2, {"one": "new"})
