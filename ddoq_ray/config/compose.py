"""From a command line to a frozen `RunConfig`: finds the YAML, lets Hydra compose it, checks every key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ddoq_ray.config.asking import ask, implied
from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.config.grammar import nested, read, written
from ddoq_ray.config.paths import plain_paths
from ddoq_ray.config.presets import choices, config_dir, groups
from ddoq_ray.config.run import RunConfig, run_config
from ddoq_ray.config.schema import from_mapping, plain, unknown_key

T = TypeVar("T")
_TORCHVISION = next(a for a in get_args(get_type_hints(DatasetConfig)["torchvision"]) if a is not type(None))
MEASURED = {"label", "train", "evaluate"}  # stages that a teacher is for


# A key that the person set although another key makes it do nothing: (key or prefix, when, why).
_INEFFECTIVE: tuple[tuple[str, Callable[[RunConfig], bool], str], ...] = (
    ("synthesizer.strength", lambda c: c.synthesizer.start == "noise", "synthesizer.start=noise is pure noise"),
    ("encoder.", lambda c: c.latents.path is not None, "latents.path gives latents that are already encoded"),
    ("labels.workers", lambda c: c.labels.mode == "online", "labels.mode=online stores no labels"),
    ("labels.epochs_per_unit", lambda c: c.labels.mode == "online", "labels.mode=online stores no labels"),
    ("protocol.full_epochs", lambda c: "full" not in c.methods, "`full` is not among baselines"),
    (
        "dataset.source",
        lambda c: c.dataset.path is not None and c.dataset.source == "digits",
        "dataset.path gives the data",
    ),
    ("protocol.step_factor", lambda c: c.protocol.schedule != "step", "protocol.schedule is not step"),
    (
        "cluster.num_cpus",
        lambda c: c.cluster.address not in (None, "local"),
        "cluster.address joins a cluster as it is",
    ),
)


def _check_known(pairs: Sequence[tuple[str, Any]]) -> None:
    """Refuse what Hydra would refuse in words of its own, or take for something else."""
    for key, value in pairs:
        if key == "quantizer.name":
            raise ValueError(
                f"quantizer.name={value} alone would leave another algorithm's keys; use quantizer={value}"
            )
        if key.split(".")[0] == "hydra":
            raise ValueError(
                f"unknown configuration key {key}: settings of Hydra's own are not read; see ddoq-ray --help"
            )
        if key in groups() and value not in choices(key):
            raise ValueError(no_choice(key, "null" if value is None else str(value)))
    _check_once(pairs)


def no_choice(group: str, value: str) -> str:
    """What to say of `group=value` where the group has no such choice, with the key that may have been meant."""
    known = choices(group)
    text = f"{group}={value}: expected one of {', '.join(known)}"
    near = [] if set(value) & set("/:\\") else difflib.get_close_matches(value.lower(), known, n=1)
    if near:
        return f"{text}; did you mean {group}={near[0]}?"
    if group == "dataset" and value in get_args(_TORCHVISION):
        return f"{text}; torchvision's are dataset=torchvision dataset.torchvision={value}"
    if group == "student":
        return f"{text}; any other of torchvision's classifiers is student.arch=NAME student.image_size=PIXELS"
    if group in ("dataset", "prior", "teacher", "latents", "encoder"):
        return f"{text}; a place is given as {group}.path={value}"
    return text


def _check_once(pairs: Sequence[tuple[str, Any]]) -> None:
    """Data given twice is a brace pattern that the shell has expanded: the last shard alone would be distilled."""
    for key in ("dataset.path", "dataset.val_path"):
        given = [str(value) for k, value in pairs if k == key]
        if len(given) > 1:
            raise ValueError(
                f"{key} is given {len(given)} times ({', '.join(given[:3])}{', ...' if len(given) > 3 else ''}); "
                "put a brace pattern or glob in quotes, so that the shell leaves it as it is"
            )


def load_config(overrides: Sequence[str] = ()) -> RunConfig:
    """Compose and check the configuration of a run.

    Args:
        overrides: `key=value` as on the command line, e.g. ``["ipc=50", "quantizer=gram"]``; of a key given twice the
            last counts.

    Raises:
        ValueError: For an unknown, ineffective or invalid key, naming it and what was expected.
    """
    # Hydra knows no group that is given as nothing.
    pairs = [(k, v) for k, v in read(overrides, RunConfig, groups()) if (k, v) != ("experiment", None)]
    _check_known(pairs)
    given = dict(pairs)
    config = run_config(_composed({**dict(implied(given)), **given}))
    _check_experiment(given)
    for key in given:
        for prefix, when, why in _INEFFECTIVE:
            if (key == prefix or (prefix.endswith(".") and key.startswith(prefix))) and when(config):
                raise ValueError(f"{key} has no effect here: {why}; leave one of the two out")
    ask(config, given)
    _check_networks(config)
    return config


def _composed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The groups' files with keys over them, as plain nested values."""
    GlobalHydra.instance().clear()
    lines = [f"{key}={value if key in groups() else written(value)}" for key, value in given.items()]
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            values: Any = OmegaConf.to_container(
                compose("config", overrides=lines), resolve=True, throw_on_missing=True
            )
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, given)) from error
    return dict(values)


def _check_networks(config: RunConfig) -> None:
    wanted = set(config.stages)
    for group, needing in (("prior", wanted - {"prepare"}), ("teacher", MEASURED & wanted)):
        if getattr(config, group).path is None and needing:
            raise ValueError(f"{group}.path=null: {', '.join(sorted(needing))} need one; leave it out, or give a path")


def _check_experiment(given: Mapping[str, Any]) -> None:
    if given.get("experiment", "digits") != "digits" and not {"dataset", "dataset.path"} & set(given):
        raise ValueError(
            f"experiment={given['experiment']} needs data: give dataset.path and dataset.val_path (shards with a "
            "classes.json, or what `ddoq-ray prepare` wrote)"
        )


def _explain(error: Exception, given: Mapping[str, Any]) -> str:
    text = str(error).strip()
    match = re.search(r"Could not override '([^']+)'", text)
    if not match:
        return re.sub(r"\s+", " ", text.split("See https://hydra.cc")[0].split("Config search path")[0]).strip()
    key = match.group(1)
    parent, _, _ = key.rpartition(".")
    node: Any = _composed({k: v for k, v in given.items() if k in groups()})
    for part in filter(None, parent.split(".")):
        node = node.get(part, {}) if isinstance(node, dict) else {}
    known = [f"{parent}.{k}" if parent else str(k) for k in node] if isinstance(node, dict) else []
    return unknown_key(key, known)


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def load_command(cls: type[T], overrides: Sequence[str]) -> T:
    """The configuration of a command of its own (train-prior, train-teacher): a dataclass with a `dataset` group.

    Raises:
        ValueError: For an unknown or invalid key.
    """
    pairs = read(overrides, cls, ("dataset",))
    _check_once(pairs)
    given = dict(pairs)
    name = given.pop("dataset", "digits")
    if name not in choices("dataset"):
        raise ValueError(no_choice("dataset", str(name)))
    try:
        merged = OmegaConf.merge(
            {"dataset": OmegaConf.load(config_dir() / "dataset" / f"{name}.yaml")}, nested(given.items())
        )
        values: dict[str, Any] = OmegaConf.to_container(merged, resolve=True)  # type: ignore[assignment]
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"cannot read {' '.join(overrides)}: {' '.join(str(error).split())}") from error
    return from_mapping(cls, plain_paths(values))
