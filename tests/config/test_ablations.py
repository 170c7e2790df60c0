"""Ablations as experiments: each composes, on digits and on other data, and changes what it says and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ddoq_ray.config.compose import load_config
from ddoq_ray.config.presets import ABLATION, choices, config_dir, preset_keys
from ddoq_ray.config.schema import plain

ABLATIONS = [name for name in choices("experiment") if name.startswith(ABLATION)]
# What a file changes by a choice of a group: the group's keys, or those that the choice sets.
BY_CHOICE = {
    "quantizer-gram": {"quantizer.name": "gram"},
    "quantizer-d4m": {"quantizer.name": "minibatch_kmeans", "quantizer.variant": "d4m"},
    "quantizer-balanced": {"quantizer.name": "balanced"},
}
UNCHANGED = {"quantizer-corrected", "prior-diffusion", "weights"}  # the default, which the others stand beside


def leaves(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(part: dict[str, Any], prefix: str) -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = tuple(value) if isinstance(value, list) else value

    walk(plain(config), "")
    return found


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_what_it_says_and_nothing_else(name: str) -> None:
    short = name.removeprefix(ABLATION)
    said = {k: tuple(v) if isinstance(v, list) else v for k, v in preset_keys("experiment", name).items()}
    before, after = leaves(load_config([])), leaves(load_config([f"experiment={name}"]))
    assert all(after[key] == value for key, value in {**said, **BY_CHOICE.get(short, {})}.items())
    group = "quantizer." if short in BY_CHOICE else None
    changed = {k for k in {*before, *after} if before.get(k) != after.get(k)}
    assert {k for k in changed if group is None or not k.startswith(group)} <= set(said)
    assert (changed == {"baselines"}) == (short in UNCHANGED)


def test_every_ablation_says_what_it_is() -> None:
    page = (config_dir().parent / "docs/methods.md").read_text()
    for name in ABLATIONS:
        text = (config_dir() / "experiment" / f"{name}.yaml").read_text()
        assert text.splitlines()[1].startswith("# "), name
        assert f"`{name.removeprefix(ABLATION)}`" in page
        assert "full" not in yaml.safe_load(text)["baselines"]  # which other data may not fit


def test_an_ablation_of_other_data_comes_after_what_the_prior_brings(tmp_path: Path) -> None:
    prior = tmp_path / "prior"
    prior.mkdir()
    (prior / "ddoq_prior.json").write_text('{"synthesizer": {"strength": 0.6, "steps": 30}}')
    other = [
        "dataset.path=shards", "dataset.val_path=val", f"prior.path={prior}", "teacher.path=teacher",
        "student=resnet18-small", "protocol=digits",
    ]  # fmt: skip
    config = load_config(["experiment=ablation/strength-0.4", *other])
    assert (config.synthesizer.strength, config.synthesizer.steps, config.baselines) == (0.4, 30, ("random",))
    assert (
        load_config(["experiment=ablation/strength-0.4", *other, "synthesizer.strength=0.3"]).synthesizer.strength
        == 0.3
    )
    with pytest.raises(ValueError, match="need what only the digits have"):
        load_config(["experiment=ablation/rescale", "dataset.path=shards"])
