"""Every numeric key of every command, given numbers that nobody means: accepted, or refused by name in one line."""

import dataclasses
from collections.abc import Iterator
from importlib import import_module
from typing import get_args, get_type_hints

import pytest

from ddoq_ray.commands.table import BY_NAME
from ddoq_ray.config.grammar import nested, read
from ddoq_ray.config.quantizer import QUANTIZERS
from ddoq_ray.config.run import RunConfig, configured
from ddoq_ray.config.schema import from_mapping

NUMBERS = ("0", "-1", "nan", "inf", "1e30", "9" * 400)
NEEDED = {
    "run": [],
    "compare": [],
    "train-prior": ["out=x"],
    "train-teacher": ["out=x"],
    "tune-decoder": ["source=x", "perceptual=y", "out=z"],
    "import-teacher": ["source=a", "arch=resnet20-cifar", "image_size=32", "out=b", "classes=c"],
}


def numeric(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys whose values are numbers, or lists of them."""
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from numeric(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif {int, float} & {kind, *get_args(kind)}:
            yield prefix + name


def cases(command: str) -> Iterator[tuple[list[str], str]]:
    """Keys that a case needs beside the odd one, and the odd one."""
    cls = config_of(command)
    # What a comparison has beside a run's keys are lists.
    keys = ["ipcs"] if command == "compare" else [k for k in numeric(cls) if not k.startswith("quantizer.")]
    yield from ((NEEDED[command], key) for key in keys)
    for choice, quantizer in QUANTIZERS.items() if command == "run" else ():
        yield from (([f"quantizer.name={choice}"], key) for key in numeric(quantizer, "quantizer."))


def config_of(command: str) -> type:
    module, _, name = BY_NAME[command].config.partition(":")
    return getattr(import_module(module), name)  # type: ignore[no-any-return]


@pytest.mark.parametrize("command", NEEDED)
def test_each_number_is_accepted_or_refused_by_name_in_a_line(command: str) -> None:
    cls = config_of(command)
    for needed, key in cases(command):
        for number in NUMBERS:
            values = nested(read([*needed, f"{key}={number}"], cls))
            try:
                configured(cls, values) if issubclass(cls, RunConfig) else from_mapping(cls, values)
            except ValueError as error:
                text = str(error)
                assert key.rpartition(".")[2] in text, (key, number, text)
                assert "\n" not in text and len(text) < 1000, (key, number, text)
                assert "expected" in text or "no effect" in text or "give" in text, (key, number, text)
            else:
                assert number not in ("nan", "inf", "-1"), (key, number)


@pytest.mark.parametrize(
    ("command", "given", "words"),
    [
        ("run", "dataset.heldout=inf", ["dataset.heldout=inf", "finite"]),
        ("run", "synthesizer.guidance=inf", ["synthesizer.guidance=inf", "finite"]),
        ("run", "seed=99999999999999999999", ["seed=99999999999999999999", "at most 9,223,372,036,854,775,807"]),
        ("run", "num_seeds=1000000000", ["num_seeds=1000000000", "at most 10,000"]),
        ("run", "protocol.step_at=[0] protocol.schedule=step", ["protocol.step_at=[0]", "from 1 on"]),
        ("run", "quantizer.num_shards=1000000000", ["quantizer.num_shards=1000000000", "at most 10,000"]),
        ("run", "cluster.trainer.groups=1000000000", ["cluster.trainer.groups=1000000000", "at most 10,000"]),
        ("run", "cluster.threads=100000", ["cluster.threads=100000", "at most 1024"]),
        ("run", "student.image_size=100000", ["student.image_size=100000", "at most 16,384"]),
        ("train-teacher", "image_size=100000", ["image_size=100000", "at most 16,384"]),
        ("run", "cluster.teacher.num_gpus=1.5", ["cluster.teacher.num_gpus=1.5", "whole number"]),
        ("run", "cluster.trainer.num_cpus=0.00001", ["cluster.trainer.num_cpus=1e-05", "0.0001"]),
        ("train-prior", "training.autoencoder_lr=0", ["training.autoencoder_lr=0.0", "more than 0"]),
        ("train-prior", "training.unet_widths=[0]", ["training.unet_widths=[0]", "multiples of 8"]),
        ("train-prior", "training.dit_heads=0", ["training.dit_heads=0", "1 or more"]),
        ("train-prior", "training.dit_width=90", ["training.dit_width=90", "training.dit_heads=4"]),
        ("train-teacher", "training.label_smoothing=1", ["training.label_smoothing=1.0", "below 1"]),
        ("train-teacher", "training.min_scale=0", ["training.min_scale=0.0", "above 0"]),
        ("train-teacher", "training.seed=-1", ["training.seed=-1", "0 or more"]),
    ],
)
def test_what_would_end_a_run_later_is_refused_at_once(command: str, given: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        BY_NAME[command].compose([*NEEDED[command], *given.split()])
    assert all(word in str(error.value) for word in words), str(error.value)
