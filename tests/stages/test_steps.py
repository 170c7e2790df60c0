"""The list of steps: where each lies, what it is known by, and that nobody else spells a run directory's names."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest

import ddoq_ray
from ddoq_ray.config.compose import load_config
from ddoq_ray.config.methods import METHODS, SPECS
from ddoq_ray.config.run import STAGES
from ddoq_ray.pipeline import of_kind, steps
from ddoq_ray.stages.cells import cells, label_key, methods
from ddoq_ray.stages.given.step import Given
from ddoq_ray.stages.label.step import Label
from ddoq_ray.stages.quantize.step import Quantize
from ddoq_ray.stages.recover.step import Recover
from ddoq_ray.stages.select.step import Select
from ddoq_ray.stages.synthesize.step import Synthesize
from ddoq_ray.stages.train.step import Train
from ddoq_ray.storage import layout

PACKAGE = Path(ddoq_ray.__file__).parent
EVERYTHING = ["ipc=2", "num_seeds=2", f"baselines=[{','.join(METHODS)}]"]


def test_every_method_has_its_steps() -> None:
    planned = steps(load_config(EVERYTHING))
    books = [f"compare/{name}-ipc2" for name in ("d4m", "uniform-grid", "stitched")]
    assert [s.place for s in of_kind(Quantize, planned)] == ["codebook", *(f"{book}/codebook" for book in books)]
    sets = [*books, "compare/noise-init-ipc2"]  # which has the run's own codebook
    assert [s.place for s in of_kind(Synthesize, planned)] == ["images", *(f"{at}/images" for at in sets)]
    chosen = {"herding", "medoids", "confident", "rded"}
    draws = {"compare/random-ipc2/draw-0/images", "compare/random-ipc2/draw-1/images"}
    assert {s.place for s in of_kind(Select, planned)} == {f"compare/{name}-ipc2/images" for name in chosen} | draws
    assert {s.place for s in of_kind(Recover, planned)} == {f"compare/{name}-ipc2/images" for name in ("sre2l", "cda")}
    trained = of_kind(Train, planned)
    assert len(trained) == 2 * len(SPECS)
    for step in trained:
        full = step.cell.method == "full"
        assert (step.source is None) == full and (step.labels is None) == full
        if step.source is not None and step.labels is not None:
            assert step.cell.images == step.source.place and step.cell.labels == step.labels.place
            assert step.labels.source == step.source
    assert [stage for stage in STAGES if stage not in {s.stage for s in planned}] == []


@pytest.mark.parametrize("own", ["counts", "sqrt", "uniform"])
def test_no_two_steps_share_a_place(own: str) -> None:
    planned = steps(load_config([*EVERYTHING, f"weights.scheme={own}"]))
    places = [s.place for s in planned if s.name not in ("evaluate", "report")]
    assert len(places) == len(set(places))


def test_other_sizes_teachers_and_protocols_lie_beside_each_other() -> None:
    changes = (
        [], ["student.image_size=24"], ["teacher.path=elsewhere/other"], ["protocol.name=mine"],
        ["student.arch=convnet3-w16"], ["num_seeds=4"],
    )  # fmt: skip
    configs = [load_config([*EVERYTHING, *keys]) for keys in changes]
    labels = [{s.place for s in of_kind(Label, steps(c))} for c in configs[:4]]
    assert (
        not set.intersection(labels[0], labels[1] | labels[2] | labels[3])
        and len(set.union(*labels)) == 4 * len(labels[0]) == 4 * 13
    )
    students = [{c.folder for c in cells(c)} for c in configs[:5]]
    assert len(set.union(*students)) == sum(map(len, students))
    assert students[0] < {c.folder for c in cells(configs[5])}  # more seeds leave the others where they are
    assert label_key(configs[2]).name == "other-digits-16px"


def test_a_given_set_is_a_method_with_a_name_of_its_own() -> None:
    config = load_config(["ipc=2", "num_seeds=1", "baselines=[]", "images.path=somewhere", "images.name=dm"])
    assert config.methods == ("ddoq", "dm")
    (given,) = of_kind(Given, steps(config))
    assert given.place == "compare/dm-ipc2/images"
    assert [(c.method, c.images, c.scheme) for c in cells(config)][1] == ("dm", given.place, "counts")
    for wrong, words in (("images.name=random", "method's own word"), ("images.name=a/b", "letters, digits")):
        with pytest.raises(ValueError, match=words):
            load_config(["images.path=somewhere", wrong])
    with pytest.raises(ValueError, match=r"images.name has no effect without images.path"):
        load_config(["images.name=dm"])


def test_settings_need_nothing_but_the_configuration() -> None:
    config = load_config(EVERYTHING)
    other = load_config([*EVERYTHING, "seed=1", "ipc=3"])
    for step in steps(config):
        assert step.settings(config) == step.settings(config)
        assert isinstance(step.asks(config), list)
    books = of_kind(Quantize, steps(config))
    assert all(book.settings(config) != book.settings(other) for book in books)


def test_a_method_is_a_row() -> None:
    """What the report, the plan and the steps say of a method follows from its row."""
    for method in methods(load_config(EVERYTHING)):
        assert method.spec is SPECS[method.name] and method.spec.words.endswith(".")
        assert (method.codebook is None) == (method.spec.quantizer is None)
        assert method.spec.tiles == math.isqrt(method.spec.tiles) ** 2
        if method.spec.images == "select":
            assert (PACKAGE / "stages/select" / f"{method.name}.py").is_file()


def coined() -> set[str]:
    """File names of a run directory, and the beginnings of numbered ones."""
    values = [v for name, v in vars(layout).items() if name.isupper() and isinstance(v, str)]
    files = {v for v in values if "." in v and "*" not in v}
    # Presets, networks and collections have files of these names too.
    return files - {"config.yaml", "config.json", "classes.json", "model.safetensors"}


def test_names_of_a_run_directory_are_spelt_in_one_place() -> None:
    numbered = ("images-", "shard-", "chunk-", "labels-", "part-")
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "layout.py" and path.parent.name == "storage":
            continue
        tree = ast.parse(path.read_text())
        docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
        formats = [n for n in ast.walk(tree) if isinstance(n, ast.JoinedStr)]
        in_formats = {id(v) for n in formats for v in n.values}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in docs:
                continue
            whole = node.value.rpartition("/")[2] in coined()
            begun = id(node) in in_formats and node.value.rpartition("/")[2] in numbered
            if whole or begun:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.value!r}")
    assert not found, f"coined in storage/layout.py: {found}"
