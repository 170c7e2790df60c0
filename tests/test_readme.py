"""README: its tree is the tree on disk, and the figures in its text are those of the committed result files."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from ddoq_ray.cli import read_line
from ddoq_ray.commands.sweep import configurations
from ddoq_ray.commands.table import named
from ddoq_ray.config import RunConfig

CHECKOUT = Path(__file__).resolve().parent.parent
README = (CHECKOUT / "README.md").read_text()


def block(name: str) -> str:
    match = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.S)
    assert match, f"README has no block {name}"
    return match.group(1)


def listed(text: str) -> set[str]:
    """Paths of an indented tree whose folders end with a slash."""
    paths: set[str] = set()
    parents: list[str] = []
    for line in text.splitlines():
        entry = re.match(r"^( *)([\w.\-]+/?)(?:  .*)?$", line)
        if not entry:
            continue
        depth = len(entry.group(1)) // 2
        parents = [*parents[:depth], entry.group(2)]
        paths.add("".join(parents))
    return paths


def test_top_level_is_what_readme_lists() -> None:
    text = README.split("## Where everything is")[1].split("<!-- tree -->")[0]
    hidden = {".git", ".ci", ".gitignore"}
    made_here = {".venv", "runs", "dist", "site"}
    on_disk = {p.name + "/" * p.is_dir() for p in CHECKOUT.iterdir() if p.name not in hidden | made_here}
    on_disk = {p for p in on_disk if not (p.startswith(".") or p.endswith(".egg-info/"))}
    assert listed(text) == on_disk


def test_package_tree_is_what_readme_lists() -> None:
    package = CHECKOUT / "ddoq_ray"
    on_disk = {"ddoq_ray/"}
    for path in package.rglob("*"):
        relative = path.relative_to(CHECKOUT).as_posix()
        if "__pycache__" in relative or relative.startswith("ddoq_ray/models/weights/"):
            continue
        on_disk.add(relative + "/" * path.is_dir())
    assert listed(block("tree")) == on_disk


def test_files_that_readme_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (CHECKOUT / target).exists(), target


def test_strength_figures_are_the_measured_ones() -> None:
    rows = json.loads((CHECKOUT / "studies/results/strength.json").read_text())
    text = " ".join(README.split())
    for strength, words in ((0.1, "0.1 gave"), (0.0, "no noise at all"), (0.2, "0.2 gave"), (0.4, "0.4 gave")):
        means = [r["top1_pct_mean"] for r in rows if r.get("strength") == strength]
        told = [float(x) for x in re.findall(r"\d+\.\d", text.split(words)[1])[:3]]
        assert len(means) == 3 and all(abs(a - b) < 0.06 for a, b in zip(means, told, strict=True)), (strength, means)


# Every command that a page shows is composed, and what it would do is looked at.

PAGES = [CHECKOUT / "README.md", CHECKOUT / "cluster/README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The words behind `ddoq-ray` or `python -m ddoq_ray` of each command in a page's blocks and code spans."""
    text = page.read_text()
    blocks = [b.replace("\\\n", " ") for b in re.findall(r"```bash\n(.*?)```", text, re.S)]
    lines = [line for b in blocks for line in b.splitlines()]
    lines += re.findall(r"`(ddoq-ray [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
    found = []
    for line in lines:
        match = re.search(r"(?:ddoq-ray|python -m ddoq_ray) +([^#]*)", line)
        if match and "pip" not in line:
            found.append(shlex.split(match.group(1)))
    return found


COMMANDS = [(page.name if page.parent == CHECKOUT else f"{page.parent.name}/{page.name}", words)
            for page in PAGES for words in commands(page)]  # fmt: skip

COMMANDS_BY_TEXT = {" ".join(words): words for page, words in COMMANDS if page == "README.md"}


def compose(words: list[str]) -> Any:
    line = read_line([w for w in words if w != "..."])
    command = named(line.command)
    return configurations(command, line.words)[0][1] if line.several else command.compose(line.words)


@pytest.mark.parametrize("page", [*PAGES, CHECKOUT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_every_block_of_commands_is_run_by_a_test_or_says_what_it_needs(page: Path) -> None:
    text = page.read_text()
    marks = re.findall(r"(?:<!-- (needs|run by): ([^>]+) -->\n)?```bash\n", text)
    for how, what in marks:
        assert how, f"{page}: a block of commands without <!-- needs: ... --> or <!-- run by: FILE -->"
        if how == "run by":
            assert all((CHECKOUT / file.strip()).is_file() for file in what.split(",")), what


@pytest.mark.parametrize("page", [*PAGES, CHECKOUT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_modules_and_targets_that_pages_name_are_there(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"python -m ((?:benchmarks|studies)\.\w+)", text):
        assert (CHECKOUT / module.replace(".", "/")).with_suffix(".py").is_file(), module
    makefile = (CHECKOUT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", (CHECKOUT / "pyproject.toml").read_text(), re.S)
    for extra in re.findall(r'pip install "ddoq_ray\[(\w+)\]"', text):
        assert extras and re.search(rf"^{extra} =", extras[1], re.M), extra


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{p}: {' '.join(w)[:60]}" for p, w in COMMANDS])
def test_every_command_shown_composes(page: str, words: list[str]) -> None:
    if {"--help", "--shell-completion"} & set(words):
        return  # test_cli.py looks at these
    if words in (["train-prior"], ["train-teacher"]) or (words[0] == "prepare" and len(words) < 3):
        return
    config = compose(words)
    if isinstance(config, RunConfig) and config.dataset.path is not None and "experiment=digits" not in words:
        assert config.prior.path != "shipped:digits-prior" and config.teacher.path != "shipped:digits-teacher"
        assert "full" not in config.baselines and (config.synthesizer.strength, config.synthesizer.steps) != (0.1, 25)


def test_the_imagenet_commands_are_what_they_say() -> None:
    found = [(page, compose(w)) for page, w in COMMANDS if "experiment=imagenet-1k-dit" in w]
    assert len(found) == 6  # a run in README, one in docs/; in cluster/ what prepares, measures, plans and submits one
    for page, c in found:
        s = c.synthesizer
        prior = "/shared/weights/DiT-XL-2-256" if page.startswith("docs/") else "facebook/DiT-XL-2-256"
        assert (c.prior.path, c.teacher.path) == (prior, "torchvision:resnet18")
        assert (s.guidance, s.steps) == (4.0, 50) and s.strength * s.steps >= 25
        assert (c.student.arch, c.student.image_size) == ("resnet18", 224)
        assert (c.protocol.name, c.protocol.val_crop, c.weights.scheme) == ("ddoq-v1", 0.875, "sqrt")
        assert c.encoder.resize == "center-crop" and c.cluster.address == "auto" and c.ipc == 10
        assert c.dataset.val_path is not None and c.methods == ("ddoq-sqrt", "d4m", "random")


def test_the_own_data_commands_are_what_they_say() -> None:
    runs = [w for w in COMMANDS_BY_TEXT.values() if {"prior.path=my-prior", "prior.path=photos-prior"} & set(w)]
    own = {c.protocol.name: c for c in map(compose, runs)}
    assert set(own) == {"d4m", "digits"}
    for c in own.values():
        s = c.synthesizer
        assert (s.start, s.strength, s.steps, s.guidance, c.encoder.resize) == ("noised", 0.7, 50, None, "squash")
        assert (c.student.arch, c.student.image_size, c.ipc) == ("resnet18-small", 32, 10)
        assert c.methods == ("ddoq", "ddoq-sqrt", "d4m", "random") and c.dataset.val_path is not None
    trained = [compose(w) for w in COMMANDS_BY_TEXT.values() if any(word.startswith("out=photos") for word in w)]
    assert [c.side for c in trained] == [32, 32] and {c.out for c in trained} == {"photos-prior", "photos-teacher"}


def test_rates_are_the_measured_ones() -> None:
    text = " ".join(README.split())
    ingest = json.loads((CHECKOUT / "benchmarks/results/ingest.json").read_text())
    one, two = [f"{r['ratio_to_webdataset']:.2f}" for r in ingest if r["what"] == "ray"]
    assert f"({one} of it with one a core, {two} with two" in text
    bare, stage = json.loads((CHECKOUT / "benchmarks/results/encode.json").read_text())
    assert f"The encode stage went at {stage['ratio_to_bare_loop']:.2f} times a bare loop" in text
    assert f"{stage['images']} images in two turns" in text and len(stage["turns"]) == 2
    assert f"encoder of {bare['images_per_s']:.0f} images a second" in text
    assert f"Ray's actors {stage['with_start'] / bare['images_per_s']:.2f})" in text
