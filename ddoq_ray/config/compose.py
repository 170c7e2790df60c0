"""From a command line to a frozen configuration: finds the YAML, lets Hydra compose it, checks every key.

The dataclasses hold all defaults, the YAML files only what a choice changes. What Hydra composes of choices and keys
is laid over the defaults, and read strictly.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ddoq_ray.config.asking import ablation_of, ask, implied
from ddoq_ray.config.compare import CompareConfig
from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.config.grammar import kind_of, nested, read, written
from ddoq_ray.config.ineffective import check_effective
from ddoq_ray.config.paths import plain_paths
from ddoq_ray.config.presets import choices, config_dir, groups_of
from ddoq_ray.config.quantizer import QUANTIZERS
from ddoq_ray.config.run import RunConfig, configured
from ddoq_ray.config.schema import SWEEP, from_mapping, plain, unknown_key

T = TypeVar("T")
_TORCHVISION = next(a for a in get_args(get_type_hints(DatasetConfig)["torchvision"]) if a is not type(None))
MEASURED = {"label", "train", "evaluate"}  # stages that a teacher is for


def load(cls: type[T], overrides: Sequence[str] = ()) -> T:
    """Compose and check the configuration of a command, whose keys are the fields of `cls`.

    Args:
        overrides: `key=value` as on the command line, e.g. ``["ipc=50", "quantizer=gram"]``; of a key given twice the
            last counts.

    Raises:
        ValueError: For an unknown, ineffective or invalid key, naming it and what was expected.
    """
    # Hydra knows no group that is given as nothing.
    groups = groups_of(cls)  # type: ignore[arg-type]
    pairs = [(k, v) for k, v in read(overrides, cls, groups) if (k, v) != ("experiment", None)]
    _check_known(cls, pairs)
    given = dict(pairs)
    if not issubclass(cls, RunConfig):
        config = from_mapping(cls, plain_paths(_composed(cls, given)))
        check_effective(config, given)
        return config
    values = _composed(cls, {**dict(implied(given)), **given})
    _check_experiment(given, values, cls)
    run = configured(cls, values)
    check_effective(run, given)
    ask(run, given)
    for part in parts_of(run):
        _check_networks(part)
    return run


def parts_of(config: RunConfig) -> Sequence[RunConfig]:
    """The runs of a comparison, which share a run directory; of a plain run, itself."""
    return config.parts() if isinstance(config, CompareConfig) else [config]


def load_config(overrides: Sequence[str] = ()) -> RunConfig:
    """`load` of a run."""
    return load(RunConfig, overrides)


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def no_choice(group: str, value: str) -> str:
    """What to say of `group=value` where the group has no such choice, with the key that may have been meant."""
    known = choices(group)
    text = f"{group}={value}: expected one of {', '.join(known)}"
    if "," in value and all(part.strip() in known for part in value.split(",")):
        return f"{text}; {SWEEP}"
    near = [] if set(value) & set("/:\\") else difflib.get_close_matches(value.lower(), known, n=1)
    if near:
        return f"{text}; did you mean {group}={near[0]}?"
    if group == "dataset" and value in get_args(_TORCHVISION):
        return f"{text}; torchvision's are dataset=torchvision dataset.torchvision={value}"
    if group == "student":
        return f"{text}; any other of torchvision's classifiers is student.arch=NAME student.image_size=PIXELS"
    if group in ("dataset", "prior", "teacher"):
        return f"{text}; a place is given as {group}.path={value}"
    return text


def _check_known(cls: type, pairs: Sequence[tuple[str, Any]]) -> None:
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
        if key in groups_of(cls) and value not in choices(key):
            raise ValueError(no_choice(key, "null" if value is None else str(value)))
        parts = key.split(".")
        for above in (".".join(parts[:n]) for n in range(1, len(parts))):
            if kind_of(cls, above) is not None:  # a value, not a group of keys
                raise ValueError(unknown_key(key, [above]))
    nested(pair for pair in pairs if pair[0] not in groups_of(cls))  # refuses a value that is a group of keys too
    for key in ("dataset.path", "dataset.val_path"):
        given = [str(value) for k, value in pairs if k == key]
        # A brace pattern that the shell has expanded: the last shard alone would be distilled.
        if len(given) > 1:
            raise ValueError(
                f"{key} is given {len(given)} times ({', '.join(given[:3])}{', ...' if len(given) > 3 else ''}); "
                "put a brace pattern or glob in quotes, so that the shell leaves it as it is"
            )


def _composed(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, the files of the choices and the keys, each over those before it, as plain nested values."""
    groups, of_run = groups_of(cls), issubclass(cls, RunConfig)
    mark = "" if of_run else "+"  # only a run has a list of choices to begin with
    chosen = tuple(f"{mark}{k}={v}" for k, v in given.items() if k in groups)
    keys = [f"++{k}={written(v)}" for k, v in given.items() if k not in groups]
    try:
        laid = copy.deepcopy(_chosen("config" if of_run else None, chosen))
        for key in OverridesParser.create().parse_overrides(keys):
            OmegaConf.update(laid, key.key_or_group, key.value(), merge=True, force_add=True)
        below = _defaults(cls, laid)
        values: Any = OmegaConf.to_container(OmegaConf.merge(below, laid), resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        text = str(error).split("See https://hydra.cc")[0].split("Config search path")[0]
        said = " ".join(f"{k}={v}" for k, v in given.items())
        raise ValueError(f"cannot read {said}: {' '.join(text.split())}") from error
    return dict(values)


@functools.lru_cache(256)
def _chosen(config: str | None, lines: tuple[str, ...]) -> DictConfig:
    """The files of some choices, laid over one another; kept, since runs of a sweep differ mostly in their keys."""
    with _hydra():
        return compose(config, overrides=list(lines))


def _defaults(cls: type, laid: DictConfig) -> DictConfig:
    """All defaults of a command, with those of the quantizer that is chosen."""
    return _defaults_with(cls, (laid.get("quantizer") or {}).get("name"))


@functools.lru_cache(64)
def _defaults_with(cls: type, name: str | None) -> DictConfig:
    values = plain(cls())
    if name in QUANTIZERS:
        values["quantizer"] = plain(QUANTIZERS[name]())
    return OmegaConf.create(values)


@contextlib.contextmanager
def _hydra() -> Iterator[None]:
    """Hydra for our own files. It is global to the process: a caller's own is as it was afterwards."""
    before, base = GlobalHydra.instance().hydra, VersionBase.instance().version_base
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = before
        VersionBase.instance().version_base = base


def _check_networks(config: RunConfig) -> None:
    wanted = set(config.stages)
    for group, needing in (("prior", wanted - {"prepare"}), ("teacher", MEASURED & wanted)):
        if getattr(config, group).path is None and needing:
            raise ValueError(f"{group}.path=null: {', '.join(sorted(needing))} need one; leave it out, or give a path")
    asking = config.methods_of("teacher") if "synthesize" in wanted else []
    if config.teacher.path is None and asking:
        raise ValueError(
            f"teacher.path=null: {', '.join(asking)} ask a teacher for images; give a path, or leave them out of "
            "baselines"
        )


def _check_experiment(given: Mapping[str, Any], values: Mapping[str, Any], cls: type) -> None:
    named = given.get("experiment", "digits")
    if cls is RunConfig and "experiment" in given and {"methods", "ipcs"} & set(values) - set(given):
        raise ValueError(f"experiment={named} is a comparison: `ddoq-ray compare experiment={named}`")
    if not named.startswith("digits") and ablation_of(given) is None and not {"dataset", "dataset.path"} & set(given):
        raise ValueError(
            f"experiment={given['experiment']} needs data: give dataset.path and dataset.val_path (shards with a "
            "classes.json, or what `ddoq-ray prepare` wrote)"
        )
