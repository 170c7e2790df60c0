"""From plain mappings to frozen dataclasses, strictly: unknown keys and wrong types are errors with the key's name."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
LARGEST = 2**63 - 1  # of whole numbers
MOST_THREADS = 1024  # of torch in one process; more cannot be started, and torch ends the process
MOST_WORKERS = 10_000  # actors or ranks of a kind: room for each is looked for one by one
LARGEST_SIDE = 16_384  # of a picture, in pixels
SWEEP = "for a run of each, one after the other, add --multirun"


def option(default: Any, text: str) -> Any:
    """A dataclass field with a default and the words that ``--help`` prints."""
    if isinstance(default, type) and dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=default, metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


def from_mapping(cls: type[T], values: Mapping[str, Any], prefix: str = "", over: T | None = None) -> T:
    """Build the dataclass `cls` from `values`; what they lack is as in `over`, or the default.

    Raises:
        ValueError: For an unknown key (with the nearest known one) or a value of the wrong type, naming the key.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ValueError(unknown_key(f"{prefix}{key}", [f"{prefix}{name}" for name in fields]))
    hints = get_type_hints(cls)
    built = {
        name: _convert(hints[name], values[name], f"{prefix}{name}", _default(field))
        for name, field in fields.items()
        if name in values
    }
    return cls(**built) if over is None else dataclasses.replace(over, **built)  # type: ignore[type-var]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def unknown_key(key: str, known: list[str]) -> str:
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(key.lower(), lower, n=1, cutoff=0.6)
    hint = f"; did you mean {lower[near[0]]}?" if near else ""
    return f"unknown configuration key {key}{hint} (known here: {', '.join(sorted(known))})"


def _convert(kind: Any, value: Any, key: str, default: Any = None) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if value is None and origin not in (Union, types.UnionType):
        raise ValueError(f"{key}=null: this key needs a value; leave it out to keep its default")
    if origin in (Union, types.UnionType):
        if value is None:
            if type(None) in args:
                return None
            raise ValueError(f"{key} must be given; expected {_words(kind)}")
        options = [a for a in args if a is not type(None)]
        if len(options) == 1:
            return _convert(options[0], value, key)
        for candidate in options:
            try:
                return _convert(candidate, value, key)
            except ValueError:
                continue
        raise ValueError(f"{key}={value!r}: expected {_words(kind)}")
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{key}={value}: expected one of {', '.join(map(str, args))}{_several(value)}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ValueError(f"{key}={value!r}: expected a list such as [a,b]")
        return tuple(_convert(args[0], v, f"{key}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            known = ", ".join(f"{key}.{f.name}" for f in dataclasses.fields(kind))
            raise ValueError(f"{key}={value!r}: expected a group of keys; give one by itself: {known}")
        return from_mapping(kind, value, f"{key}.", default)  # type: ignore[arg-type]
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{key}={value!r}: expected true or false")
        return value
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{key}={value!r}: expected a whole number{_several(value)}")
        if abs(value) > LARGEST:  # seeds, sizes and counts are 64-bit integers in NumPy, Arrow and torch
            raise ValueError(f"{key}={value}: expected a whole number of at most {LARGEST:,}")
        return value
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{key}={value!r}: expected a number{_several(value)}")
        if not abs(value) <= sys.float_info.max:  # nan, inf: what is unbounded is null
            raise ValueError(f"{key}={value}: expected a finite number")
        return float(value)
    if kind is str:
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise ValueError(f"{key}={value!r}: expected text")
        return str(value)
    raise AssertionError(f"no conversion for {kind} at {key}")


def _several(value: Any) -> str:
    return f"; {SWEEP}" if isinstance(value, str) and "," in value else ""


def _words(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return " or ".join(names.get(a, str(a)) for a in get_args(kind) if a is not type(None))


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`; the validation of a configuration in one line a rule."""
    if not condition:
        raise ValueError(message)


def plain(config: Any) -> Any:
    """A dataclass as nested plain dicts, lists and scalars (for YAML, JSON and identities)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (tuple, list)):
        return [plain(v) for v in config]
    return config
