"""Whether a record that is whole says what this version of the package reads in it: another one may have written it."""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import cache
from typing import Any, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from ddoq_ray.storage import manifests

# What wrote a manifest (`Artifact.stage`) -> what it holds.
_KINDS: dict[str, type] = {
    "prepare": manifests.DataManifest,
    "encode": manifests.LatentsManifest,
    "heldout": manifests.LatentsManifest,
    "quantize": manifests.CodebookManifest,
    "synthesize": manifests.ImagesManifest,
    "select": manifests.ImagesManifest,
    "given": manifests.ImagesManifest,
    "recover": manifests.ImagesManifest,
    "label": manifests.LabelsManifest,
    "train": manifests.StudentManifest,
}
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


class OtherVersion(ValueError):
    """A record is whole and does not say what this version of the package reads in it."""


class Facts(dict[str, Any]):
    """A record's row, which tells in words of a fact that it lacks, where that is asked for."""

    def __init__(self, row: Mapping[str, Any], path: str, of: str = "") -> None:
        """`of`: what stands before its keys, where it is a part of a record."""
        super().__init__({k: Facts(v, path, f"{of}{k}.") if isinstance(v, dict) else v for k, v in row.items()})
        self.path, self.of = path, of

    def __missing__(self, key: str) -> Any:
        raise other_version(self.path, f"it has no `{self.of}{key}`")

    def __reduce__(self) -> tuple[Any, ...]:
        return Facts, (dict(self), self.path, self.of)


def other_version(path: str, what: str) -> OtherVersion:
    """What to say of such a record."""
    return OtherVersion(
        f"{path} was not written by this version of ddoq-ray: {what}. Go on with the version that config.yaml in the "
        "run directory names, or use another run_dir, or overwrite=true to make this stage and all after it anew"
    )


class FileFacts(TypedDict):
    """Of a file that a record vouches for (`artifact.file_facts`)."""

    bytes: int
    sha256: str


class Begun(TypedDict):
    """What each record of an artifact holds: ``started.json``, and manifests."""

    identity: dict[str, Any]
    files: NotRequired[dict[str, FileFacts]]


def misfit(row: Mapping[str, Any], stage: str | None = None) -> str:
    """What a record of an artifact has, and this version cannot read; empty when nothing.

    Facts that are not there are told where they are asked for (`Facts`).

    Args:
        row: The record.
        stage: Of a manifest, what wrote it; None: of a ``started.json``.

    >>> misfit({"identity": {}}), misfit({"identity": 3})
    ('', 'its `identity` is 3; expected an object')
    """
    kinds = [Begun, *([_KINDS[stage]] if isinstance(stage, str) and stage in _KINDS else [])]
    return next((told for kind in kinds if (told := misfit_of(kind, row))), "")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def misfit_of(kind: type, row: Mapping[str, Any], of: str = "") -> str:
    """`misfit` of a record whose facts are the fields of a dataclass or TypedDict."""
    for name, hint in _hints(kind).items():
        called = f"{of}{name}"
        kind_of_it = get_args(hint)[0] if get_origin(hint) is NotRequired else hint
        if name in row and (told := _wrong(kind_of_it, row[name], called)):
            return told
    return ""


def _wrong(hint: Any, value: Any, called: str) -> str:
    """What is wrong with a value; empty when it is one of its kind."""
    if hint is Any:
        return ""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        each = [_wrong(a, value, called) for a in args if a is not type(None)]
        return "" if (value is None and type(None) in args) or "" in each else each[0]
    plain = dict if is_typeddict(hint) else origin or hint
    kinds: Any = (int, float) if plain is float else plain
    fits: bool = isinstance(value, kinds) and (plain is bool or not isinstance(value, bool))
    if not fits:
        shown = f"{value!r}"[:40].replace("None", "null")
        return f"its `{called}` is {shown}; expected {_WORDS[plain]}"
    if is_typeddict(hint):
        return misfit_of(hint, value, f"{called}.")
    if args[-1:] in ((), (Any,)):
        return ""
    return next(
        (told for v in (value.values() if plain is dict else value) if (told := _wrong(args[-1], v, called))), ""
    )
