"""From a command line to a frozen `RunConfig`: finds the YAML, lets Hydra compose it, checks every key."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ddoq_ray.config.asking import ask, implied, key_of
from ddoq_ray.config.paths import plain_paths
from ddoq_ray.config.run import RunConfig, run_config
from ddoq_ray.config.schema import from_mapping, plain, unknown_key

T = TypeVar("T")
MEASURED = {"label", "train", "evaluate"}  # stages that a teacher is for


def config_dir() -> Path:
    """The YAML groups: the copy inside an installed wheel, else the checkout's configs/."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "_configs", package.parent / "configs"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ValueError(f"no configuration files: expected them in {package / '_configs'} or {package.parent / 'configs'}")


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


def _override_key(override: str) -> str:
    return re.split(r"[=@]", override.lstrip("+~"), maxsplit=1)[0]


# Keys whose values are text of any kind: Hydra's own grammar would refuse a brace pattern or a "=" in a path.
_TEXT = re.compile(r"(run_dir|[a-z]+\.(path|val_path|classes))=(.*)", re.DOTALL)
_PLAIN = re.compile(r"null|[\w./:@-]*|'.*'|\".*\"", re.DOTALL)


def _read_override(override: str) -> str:
    """Check the form of one override; quote a path for Hydra where its grammar needs that."""
    key, equals, value = override.partition("=")
    if not equals or override.startswith("~"):
        raise ValueError(f"{override!r} is not key=value (a command comes first); see ddoq-ray --help")
    if key.lstrip("+") == "quantizer.name":
        raise ValueError(f"quantizer.name={value} alone would leave another algorithm's keys; use quantizer={value}")
    if key.lstrip("+").split(".")[0] == "hydra":
        raise ValueError(f"unknown configuration key {key}: settings of Hydra's own are not read; see ddoq-ray --help")
    text = _TEXT.fullmatch(override)
    if text is None or _PLAIN.fullmatch(value):
        return override
    # Hydra takes a backslash for an escape before a quote only.
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), value)
    return f"{key}='{escaped}'"


def _check_once(overrides: Sequence[str]) -> None:
    """Data given twice is a brace pattern that the shell has expanded: the last shard alone would be distilled."""
    for key in ("dataset.path", "dataset.val_path"):
        given = [o.partition("=")[2] for o in overrides if _override_key(o) == key]
        if len(given) > 1:
            raise ValueError(
                f"{key} is given {len(given)} times ({', '.join(given[:3])}{', ...' if len(given) > 3 else ''}); "
                "put a brace pattern or glob in quotes, so that the shell leaves it as it is"
            )


def load_config(overrides: Sequence[str] = ()) -> RunConfig:
    """Compose and check the configuration of a run.

    Args:
        overrides: `key=value` as on the command line, e.g. ``["ipc=50", "quantizer=gram"]``.

    Raises:
        ValueError: For an unknown, ineffective or invalid key, naming it and what was expected.
    """
    # Hydra knows no group that is given as nothing.
    overrides = [_read_override(o) for o in overrides if o != "experiment=null"]
    _check_once(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = compose("config", overrides=[*implied(overrides), *overrides])
            values: dict[str, Any] = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, overrides)) from error
    config = run_config(values)
    _check_experiment(overrides)
    for override in overrides:
        key = _override_key(override)
        for prefix, when, why in _INEFFECTIVE:
            if (key == prefix or (prefix.endswith(".") and key.startswith(prefix))) and when(config):
                raise ValueError(f"{key} has no effect here: {why}; leave one of the two out")
    ask(config, overrides)
    _check_networks(config)
    return config


def _check_networks(config: RunConfig) -> None:
    wanted = set(config.stages)
    for group, needing in (("prior", wanted - {"prepare"}), ("teacher", MEASURED & wanted)):
        if getattr(config, group).path is None and needing:
            raise ValueError(f"{group}.path=null: {', '.join(sorted(needing))} need one; leave it out, or give a path")


def _check_experiment(overrides: Sequence[str]) -> None:
    given = dict(key_of(o) for o in overrides)
    if given.get("experiment", "digits") not in ("digits", "null") and not {"dataset", "dataset.path"} & set(given):
        raise ValueError(
            f"experiment={given['experiment']} needs data: give dataset.path and dataset.val_path (shards with a "
            "classes.json, or what `ddoq-ray prepare` wrote)"
        )


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    text = str(error).strip()
    match = re.search(r"Could not override '([^']+)'", text)
    if match:
        key = match.group(1)
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            groups = [o for o in overrides if (config_dir() / _override_key(o)).is_dir()]
            try:
                composed = OmegaConf.to_container(compose("config", overrides=groups))
            except (HydraException, OmegaConfBaseException):
                composed = OmegaConf.to_container(compose("config"))
        parent, _, _ = key.rpartition(".")
        node: Any = composed
        for part in filter(None, parent.split(".")):
            node = node.get(part, {}) if isinstance(node, dict) else {}
        known = [f"{parent}.{k}" if parent else str(k) for k in node] if isinstance(node, dict) else []
        return unknown_key(key, known)
    choice = re.search(r"Could not (?:find|load) '(\w+)/([^']+)'", text)
    if choice:
        known = sorted(p.stem for p in (config_dir() / choice.group(1)).glob("*.yaml"))
        return f"{choice.group(1)}={choice.group(2)}: expected one of {', '.join(known)}"
    if "See https://hydra.cc" in text:
        text = text.split(" See https://hydra.cc")[0].split("\nSee https://hydra.cc")[0]
        return f"cannot read {' '.join(overrides)}: {text}; quote a value with special characters: key=\"'...'\""
    return re.sub(r"\s+", " ", text.split("Config search path")[0]).strip()


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def load_command(cls: type[T], overrides: Sequence[str]) -> T:
    """The configuration of a command of its own (train-prior, train-teacher): a dataclass with a `dataset` group.

    Raises:
        ValueError: For an unknown or invalid key.
    """
    overrides = [o.lstrip("+") for o in overrides]
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"{override!r} is not key=value; see ddoq-ray --help")
    _check_once(overrides)
    choices = [o for o in overrides if o.startswith("dataset=")]
    name = choices[-1].split("=", 1)[1] if choices else "digits"
    path = config_dir() / "dataset" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ValueError(f"dataset={name}: expected one of {', '.join(known)}")
    try:
        given = OmegaConf.from_dotlist([o for o in overrides if o not in choices])
        merged = OmegaConf.merge({"dataset": OmegaConf.load(path)}, given)
        values: dict[str, Any] = OmegaConf.to_container(merged, resolve=True)  # type: ignore[assignment]
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"cannot read {' '.join(overrides)}: {' '.join(str(error).split())}") from error
    return from_mapping(cls, plain_paths(values))
