"""The pages under docs/: their links lead somewhere, and the site builds with all keys in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.published import SHAPES, planned

from ddoq_ray.commands.table import COMMANDS

CHECKOUT = Path(__file__).resolve().parent.parent
PAGES = sorted([*(CHECKOUT / "docs").rglob("*.md"), *CHECKOUT.glob("*.md"), CHECKOUT / "cluster/README.md"])
FOLDERS = ("ddoq_ray", "tests", "benchmarks", "studies", "docs")
SOURCES = [path for folder in FOLDERS for path in (CHECKOUT / folder).rglob("*.py")]
MADE = {"keys.md"}  # by docs/site_hooks.py


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(CHECKOUT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target and target not in MADE:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(CHECKOUT).as_posix())
def test_modules_that_pages_name_are_there(page: Path) -> None:
    """By the end of their path, such as `storage/layout.py`; capitals stand for a name (`commands/NAME.py`)."""
    named = set(re.findall(r"`((?:\w+/)+[a-z_0-9]+\.py)\b", page.read_text()))
    if page.name == "0012-the-rooms.md":
        named -= {"models/prior.py"}  # of what the rooms replaced
    assert {name for name in named if not any(path.match(name) for path in SOURCES)} == set()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_site_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a warning; the keys of every command are a page."""
    build, config = pytest.importorskip("mkdocs.commands.build"), pytest.importorskip("mkdocs.config")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    made = config.load_config(str(CHECKOUT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build.build(made)
    keys = (tmp_path / "site/keys/index.html").read_text()
    assert all(word in keys for word in ("synthesizer.guide_until", "training.autoencoder_share", "dataset.heldout"))
    assert all(command.name in keys for command in COMMANDS)
    assert (tmp_path / "site/studies/results/theory-weights.svg").exists()


def test_the_bytes_of_the_published_runs_are_those_of_a_plan() -> None:
    """To two digits."""
    text = (CHECKOUT / "docs/reproduce.md").read_text().split("<!-- sizes -->")[1].split("<!-- /sizes -->")[0]
    lines = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.strip().splitlines()[2:]]
    assert [(line[0], line[1]) for line in lines] == [(name, ipc) for name in SHAPES for ipc in ("10", "50")]
    for name, ipc, *told in lines:
        made, logits = planned(name, int(ipc))
        images = made["synthesize"] + made["select"]
        is_ = [made["encode"], made["quantize"], images, made["label"], logits]
        said = [float(cell.removesuffix(" GB").replace(",", "")) for cell in told]
        assert said == pytest.approx(is_, rel=0.05), (name, ipc, is_)


def test_the_tutorial_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Its blocks, one after another; they hold assertions of their own."""
    blocks = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs/tutorial.md").read_text(), re.S)
    threads = torch.get_num_threads()
    names: dict[str, Any] = {"__name__": "tutorial"}
    try:
        for block in blocks:
            exec(compile(block, "docs/tutorial.md", "exec"), names)
    finally:
        torch.set_num_threads(threads)
    assert len(blocks) >= 4 and "real digits, from fifty images" in capsys.readouterr().out
