"""``key=value`` as people type it: a value is read by the kind of its key, so that a path is a path whatever is in it.

Hydra's own grammar would take ``run_dir=1e5`` for a number, ``a,b`` for a sweep and ``=``, brackets or letters beyond
ASCII in a path for errors. Values are read here, and handed to Hydra written out.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ddoq_ray.config.quantizer import QUANTIZERS

_WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf)", re.ASCII | re.IGNORECASE)
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)


def read(overrides: Sequence[str], cls: type, groups: Iterable[str] = ()) -> list[tuple[str, Any]]:
    """(key, value) of each `key=value`, in order.

    Args:
        overrides: As on the command line; a `+` before a key says nothing here.
        cls: The configuration's dataclass, which tells what kind of value each key takes.
        groups: Keys whose value is a choice's name.

    Raises:
        ValueError: For what is no key=value, or an empty path.
    """
    groups = frozenset(groups)
    found = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip().lstrip("+")
        if not equals or not key or key.startswith("~") or any(c.isspace() for c in key):
            raise ValueError(f"{override!r} is not key=value (a command comes first); see ddoq-ray --help")
        if key.startswith("-"):
            raise ValueError(f"{override!r}: keys have no dashes; write {key.lstrip('-')}={text}; see ddoq-ray --help")
        kind = str if key in groups else kind_of(cls, key)
        value = text if kind is None else value_of(kind, text)
        if value == "" and kind in (str, str | None):
            raise ValueError(f"{key}= is empty (an unset variable?): give a value, or leave the key out")
        found.append((key, value))
    return found


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def kind_of(cls: type, key: str) -> Any:
    """The type of a dotted key; None for one that is a group of keys, or unknown."""
    kind: Any = cls
    *groups, name = key.split(".")
    for part in groups:
        kind = _hints(kind).get(part)
        if part == "quantizer":
            algorithms: list[type] = list(QUANTIZERS.values())
            kind = next((c for c in algorithms if name in _hints(c)), kind)
        if not dataclasses.is_dataclass(kind):
            return None
    kind = _hints(kind).get(name)
    return None if dataclasses.is_dataclass(kind) else kind


def value_of(kind: Any, text: str) -> Any:
    """A value of `kind`; text that is none is left as text, for the checks of the key to name it.

    >>> value_of(str, "1e5"), value_of(int, "01"), value_of(float | None, "null"), value_of(tuple[str, ...], "d4m")
    ('1e5', 1, None, ('d4m',))
    >>> value_of(str | tuple[str, ...] | None, "a,b"), value_of(str | tuple[str, ...] | None, "[a,b]")
    ('a,b', ('a', 'b'))
    """
    plain, quoted = _unquoted(text)
    options = [a for a in get_args(kind) if a is not type(None)] if _is_union(kind) else [kind]
    if not quoted and plain.strip() == "null":
        return None
    for option in options:
        if get_origin(option) is tuple:
            inside = plain.strip()
            if not inside:  # an unset variable; none is []
                return plain
            listed = inside[:1] + inside[-1:] in ("[]", "()")
            if not listed and str in options:  # one, where one or several may be given
                return plain
            inside = inside[1:-1] if listed else inside
            return tuple(value_of(get_args(option)[0], part) for part in _parts(inside))
        word = plain.strip()
        if option is bool and word.lower() in ("true", "false"):
            return word.lower() == "true"
        if option in (int, float) and _WHOLE.fullmatch(word):
            return int(word)
        if option in (int, float) and _NUMBER.fullmatch(word):
            return float(word)
        if get_origin(option) is Literal:
            return word
    return plain


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _unquoted(text: str) -> tuple[str, bool]:
    """A text without the quotes around all of it, as Hydra's users write them; whether there were any."""
    word = text.strip()
    if not _QUOTED.fullmatch(word):
        return text, False
    mark = word[0]
    # A backslash escapes a quote, and itself before a quote only: all others are the text's own.
    inner = re.sub(rf"(\\+)({mark}|$)", lambda m: "\\" * (len(m[1]) // 2) + m[2], word[1:-1])
    return inner, True


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def written(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(written, value))}]"
    # Hydra takes a backslash for an escape before a quote only.
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), str(value))
    return f"'{escaped}'"


def nested(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Dotted keys as nested mappings.

    Raises:
        ValueError: When a key is a value and a group of keys at once.
    """
    made: dict[str, Any] = {}
    for key, value in pairs:
        *groups, name = key.split(".")
        node = made
        for part in groups:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"{key}: {part} is given a value of its own before; leave one of the two out")
        node[name] = value
    return made


def leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted keys: the inverse of `nested`."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found
