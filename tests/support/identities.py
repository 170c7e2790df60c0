"""Which keys of the configuration each stage's identity holds, and which are declared to leave its bytes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support.recording import reads

from ddoq_ray.config import RunConfig
from ddoq_ray.execution.networks import Inspection, Networks
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Events
from ddoq_ray.pipeline import steps
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.prepared import Data

# Modules with outputs of their own; all others belong to their package's stage.
OF_THEIR_OWN = {"encode/heldout": "heldout"}
MADE_ANEW = {"evaluate", "report"}  # in every run, so without an identity

# Stage -> the stages whose digests its identity holds.
MADE_FROM = {
    "prepare": (),
    "encode": ("prepare",),
    "quantize": ("encode",),
    "synthesize": ("quantize",),
    "select": ("encode", "quantize"),
    "recover": ("prepare",),
    "given": ("prepare",),
    "heldout": ("encode",),
    "label": ("synthesize", "select", "recover", "given"),
    "train": ("label",),
}  # fmt: skip

# Keys whose value is in no identity, and why that is right in every stage.
ANYWHERE = {
    "run_dir": "where, not what",
    "stages": "which are run, not what they make",
    "baselines": "which rows there are; a row's bytes do not depend on the others",
    "num_seeds": "the same",
    "overwrite": "what becomes of another configuration's output",
    "max_bad_fraction": "when to stop; what is made does not depend on it",
    "prior.path": "the network's content digest stands for it",
    "prior.autoencoder_only": "the same",
    "prior.image_size": "the same",
    "teacher.path": "the same",
    "encoder.path": "the same",
    "synthesizer.judge": "the same",
    "latents.path": "the log's own identity stands for it",
    "latents.keep": "what stays on disk after the run",
    "teacher.min_kept": "when a line is said; what is made does not depend on it",
    "encoder.workers": "who works",
    "encoder.max_workers": "who works",
    "synthesizer.min_workers": "who works",
    "synthesizer.max_workers": "who works",
    "labels.workers": "who works",
    "quantizer.num_shards": "who works",
    "quantizer.snapshot_every": "what a death costs",
    "dataset.name": "a word in tables and paths",
    "protocol.name": "a word in tables",
    "images.path": "which rows there are; the set that it names has it in its identity",
    "images.name": "a word in tables and paths",
}
# (stage, key) -> why this stage's bytes do not depend on it.
DECLARED = {
    ("encode", "seed"): "in the identity where noise is drawn (encoder.posterior=sample)",
    ("heldout", "seed"): "the same",
    ("quantize", "encoder.chunk_samples"): "memory that is planned for readers",
    ("label", "labels.mode"): "the codec that it chooses is in the facts",
    ("label", "labels.budget"): "the same",
    ("label", "protocol.temperature"): "in the identity of an ensemble's labels; else it tells what a codec costs",
    (
        "label",
        "protocol.val_crop",
    ): "how the teacher is checked; what it does to stored pictures is in the identity",
    ("label", "teacher.min_top1"): "when the teacher is refused",
    **{
        ("synthesize", f"dataset.{key}"): "a word in the card, which is no part of the set"
        for key in ("torchvision", "path", "source")
    },
    ("train", "synthesizer.shard_images"): "how images lie in files",
    ("train", "labels.mode"): "hard labels are in the identity, and for all others their digest",
    ("train", "weights.scheme"): "which methods there are; a student's own scheme is in its identity",
    ("prepare", "ipc"): "classes that are too small are told of",
    ("prepare", "small_class"): "the same",
    ("prepare", "weights.scheme"): "which methods there are, of which one may need more images of a class",
}
UNITS = ("cluster.",)  # what a worker asks of the cluster; threads and device are recorded in `environment`


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, another value than it has) of every value of a configuration."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", _other(value, str(f.type))


def _other(value: Any, kind: str) -> Any:
    """A value that differs, of the same kind; it need not be valid, since only identities are built from it."""
    if value is None and kind in ("int | None", "float | None"):
        return 1
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return (*value, "other") if isinstance(value, tuple) else f"other-{value}"


def _with(config: Any, key: str, value: Any) -> Any:
    """A copy with another value at `key`, unchecked."""
    name, _, rest = key.partition(".")
    made = object.__new__(type(config))
    for f in dataclasses.fields(config):
        object.__setattr__(made, f.name, getattr(config, f.name))
    object.__setattr__(made, name, _with(getattr(config, name), rest, value) if rest else value)
    return made


def identities(planned: RunConfig, run_dir: Folder, networks: Networks) -> dict[str, Callable[[RunConfig], Any]]:
    """Name of a step -> what its outputs of the finished run are known by, as a function of the configuration.

    The steps are those that were `planned`, so that another configuration is compared in the same places.
    """
    data, events = Data.load(run_dir), Events(run_dir)

    def of(name: str) -> Callable[[RunConfig], Any]:
        def identity(config: RunConfig) -> Any:
            run = Run(config, run_dir, data, networks, events)
            return [step.identity(run) for step in steps(planned) if step.name == name]

        return identity

    return {name: of(name) for name in MADE_FROM}


def held(config: RunConfig, run: Folder, networks: Networks) -> dict[str, set[str]]:
    """Stage -> the keys that its identity, or one that it is made from, follows."""
    own: dict[str, set[str]] = {}
    for stage, identity in identities(config, run, networks).items():
        plain = identity(config)
        own[stage] = {key for key, other in leaves(config) if _differs(identity, plain, _with(config, key, other))}
    for stage, sources in MADE_FROM.items():
        own[stage] = own[stage].union(*(own[source] for source in sources))
    return own


def _differs(identity: Callable[[RunConfig], Any], plain: Any, other: RunConfig) -> bool:
    try:
        return bool(identity(other) != plain)
    except (ValueError, KeyError, AssertionError):
        return True  # the value was looked at and refused


def left_out(config: RunConfig, log: Path, *without_effect: str) -> list[str]:
    """What a stage of the finished run of `config` read, as `log` has it, that nothing accounts for.

    Args:
        without_effect: Keys that this configuration reads and does not use.
    """
    networks = Inspection(config, teacher=True).result()
    in_identity = held(config, Folder(config.folder), networks)
    left = []
    for module, keys in reads(log).items():
        stage = OF_THEIR_OWN.get(module, module.split("/")[0])
        for key in keys if stage not in MADE_ANEW else ():
            known = key in {*in_identity[stage], *ANYWHERE, *without_effect} or (stage, key) in DECLARED
            if not known and not key.startswith(UNITS):
                left.append(f"{stage} {key} (in stages/{module}.py)")
    return sorted(left)
