"""What ``--help`` prints: the commands, then every key with its words and its value when nothing is asked."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ddoq_ray.commands.table import COMMANDS, RUN, Command
from ddoq_ray.config import RunConfig
from ddoq_ray.config.presets import choices, groups_of
from ddoq_ray.config.quantizer import QUANTIZERS

_INTRO = f"""\
ddoq-ray distils a labelled image dataset into a few weighted synthetic images per class,
by optimal quantization in a diffusion model's latent space (DDOQ), and measures what they are worth.

Use:  ddoq-ray [command] key=value ...

  ddoq-ray                                    distil scikit-learn's digits at {RunConfig().ipc} images per class
  ddoq-ray ipc=50 quantizer=gram              another size, another quantizer
  ddoq-ray prepare dataset=imagefolder dataset.path=photos run_dir=DIR     any labelled images to shards
  ddoq-ray dataset.path=shards/train dataset.val_path=shards/val prior.path=DIR teacher.path=DIR \\
           student=resnet18-small protocol=d4m
  ddoq-ray label                              one stage of a run whose earlier stages are done
  ddoq-ray stages=[label,train,evaluate,report]
  ddoq-ray --multirun ipc=1,5,10              a run of each, one after the other, each in a folder of its own
  ddoq-ray train-prior dataset=digits out=my-prior
  ddoq-ray train-teacher dataset=digits out=my-teacher
"""
_FLAGS = """\
Flags
  --help, -h         this; behind a command, that command's keys
  --cfg job, -c job  print the configuration that the keys compose, as YAML, and run nothing
  --multirun, -m     a run for each of several values (ipc=1,5,10 quantizer=gram,kmeans), one after the other
  --shell-completion install=bash     print what completes commands, keys and choices (also -sc; install=zsh)
  --version

Everything of a run goes to run_dir; report/index.html is the page to open. A value is read by the kind of its key:
paths need no quotes but the shell's, lists are [a,b] or a,b; of a key given twice the last counts.
"""


def help_text() -> str:
    """The commands and the flags, then the keys of a run."""
    lines = [_INTRO, "Commands"]
    for command in COMMANDS:
        name = "run (or nothing)" if command is RUN else command.name
        lines.append(textwrap.fill(command.words, 110, initial_indent=f"  {name:<18} ", subsequent_indent=" " * 21))
    lines += ["", _FLAGS, "Keys (group=CHOICE takes a whole set of values at once)"]
    return "\n".join([*lines, *_keys(RUN)]) + "\n"


def command_help(command: Command) -> str:
    """How a command is typed, what it does, and its keys."""
    about = command.about or f"{command.words[:1].upper()}{command.words[1:]}."
    return "\n".join([command.use, "", textwrap.fill(about, 110), "", *_keys(command)]) + "\n"


def _keys(command: Command) -> list[str]:
    """A line for each key that the command reads, the keys of a group below the group's line."""
    lines: list[str] = []
    of_group = ""
    for key, words, value in keys_of(command.keys):
        if command.reads and not any(key == r or (r.endswith(".") and key.startswith(r)) for r in command.reads):
            continue
        group, _, inner = key.partition(".")
        if inner and group != of_group:
            of_group = group
            lines += ["", _group_line(command.keys, group)]
        shown = ""
        if isinstance(value, tuple):
            shown = f" [{','.join(map(str, value))}]" if value else " [none]"
        elif value not in (None, ""):
            shown = f" [{str(value).lower() if isinstance(value, bool) else value}]"
        lines.append(
            textwrap.fill(
                words + shown, 100, break_on_hyphens=False, initial_indent=f"  {key:<28} ", subsequent_indent=" " * 31
            )
        )
    return lines


def _group_line(cls: type, group: str) -> str:
    words = next(f.metadata["help"] for f in dataclasses.fields(cls) if f.name == group)
    known = f" ({group}={' | '.join(choices(group))})" if group in groups_of(cls) else ""
    return textwrap.fill(f"{group}: {words}{known}", 110, break_on_hyphens=False, subsequent_indent="  ")


def keys_of(cls: type) -> list[tuple[str, str, Any]]:
    """(key, words, default) of every key of a configuration, each once; of a quantizer, the keys of every algorithm."""
    found: dict[str, tuple[str, str, Any]] = {}
    hints, default = get_type_hints(cls), cls()
    plain = [f for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(hints[f.name])]
    for field in sorted(dataclasses.fields(cls), key=lambda f: f not in plain):  # single keys before the groups
        for key, words, value in _leaves(field, hints[field.name], getattr(default, field.name)):
            found.setdefault(key, (key, words, value))
        if field.name == "quantizer":
            for algorithm in QUANTIZERS.values():
                for key, words, value in _leaves(field, algorithm, algorithm()):
                    found.setdefault(key, (key, words, value))
    return list(found.values())


def _leaves(field: Any, kind: Any, value: Any, above: str = "", said: str = "") -> Iterator[tuple[str, str, Any]]:
    """The keys of a field, below a group whose words are needed to tell apart what it holds."""
    key, words = f"{above}{field.name}", f"{said}{field.metadata['help']}"
    if not dataclasses.is_dataclass(value):
        known = _known_words(kind)
        named = all(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", words) for word in known)
        yield key, words if named else f"{words} ({' | '.join(known)})", value
        return
    hints = get_type_hints(type(value))
    for inner in dataclasses.fields(value):
        under = f"{words}: " if above else ""
        yield from _leaves(inner, hints[inner.name], getattr(value, inner.name), f"{key}.", under)


def _known_words(kind: Any) -> list[str]:
    """The words that a key may be; none where it takes others, numbers or text."""
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    return [word for part in get_args(kind) for word in _known_words(part)]
