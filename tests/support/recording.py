"""A configuration that writes down which of its keys are read and by which stage, in this process and Ray's workers.

Each dataclass of the configuration becomes a subclass of itself whose attributes are watched. A read belongs to every
stage whose code is on the stack: what `train_worker` reads through a function of `label` belongs to both. Copying a
configuration, checking it and building an identity from it are no reads.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import ray.cloudpickle

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not import tests

COPIES = {"replace", "_replace", "plain", "__post_init__", "__repr__", "__eq__", "__reduce_ex__"}
OF_STEPS = {"settings", "inputs", "identity", "log_identity", "asks", "wanted", "checked"}
_WATCHED: dict[tuple[str, str, str], type] = {}


def modules_here(frame: Any) -> set[str]:
    """Modules of the stages on the stack, as `encode/worker`.

    None while a configuration is copied or checked, or an identity is built.
    """
    found: set[str] = set()
    while frame is not None:
        code = frame.f_code
        _, inside, module = code.co_filename.rpartition("/ddoq_ray/stages/")
        if code.co_name in COPIES or (inside and code.co_name in OF_STEPS):
            return set()
        if inside and "/" in module:
            found.add(module.removesuffix(".py"))
        frame = frame.f_back
    return found


def watched(base: type, prefix: str, log: str) -> type:
    """A subclass of a configuration dataclass that writes its reads below `log`."""
    key = (base.__qualname__, prefix, log)
    if key in _WATCHED:
        return _WATCHED[key]
    names = {f.name for f in dataclasses.fields(base)}
    seen: set[tuple[str, str]] = set()

    def __getattribute__(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name in names and not dataclasses.is_dataclass(value):
            for module in modules_here(sys._getframe(1)):
                if (module, name) not in seen:
                    seen.add((module, name))
                    with open(f"{log}/{os.getpid()}", "a") as f:
                        f.write(f"{module} {prefix}{name}\n")
        return value

    def __reduce_ex__(self: Any, _: int) -> Any:
        return rebuilt, (base, prefix, log, {name: object.__getattribute__(self, name) for name in names})

    made = type(base.__name__, (base,), {"__getattribute__": __getattribute__, "__reduce_ex__": __reduce_ex__})
    _WATCHED[key] = made
    return made


def rebuilt(base: type, prefix: str, log: str, values: dict[str, Any]) -> Any:
    made = object.__new__(watched(base, prefix, log))
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def recording(config: Any, log: Path, prefix: str = "") -> Any:
    """`config` with its reads written down; `log` is a folder of its own."""
    values = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        inner = dataclasses.is_dataclass(value)
        values[f.name] = recording(value, log, f"{prefix}{f.name}.") if inner else value
    return rebuilt(type(config), prefix, str(log), values)


def reads(log: Path) -> dict[str, set[str]]:
    """Module of a stage -> the keys that were read while its code was at work."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in log.iterdir():
        for line in file.read_text().splitlines():
            module, key = line.split()
            found[module].add(key)
    return dict(found)
