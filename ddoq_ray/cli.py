"""The command line: ``ddoq-ray [command] key=value ...``. No command is `run`; a stage's name runs that stage."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import ddoq_ray
from ddoq_ray.config import STAGES, RunConfig

_INTRO = """\
ddoq-ray distils a labelled image dataset into a few weighted synthetic images per class,
by optimal quantization in a diffusion model's latent space (DDOQ), and measures what they are worth.

Use:  ddoq-ray [command] key=value ...

  ddoq-ray                                    distil scikit-learn's digits at 10 images per class, on this machine
  ddoq-ray ipc=50 quantizer=gram              another size, another quantizer
  ddoq-ray dataset.path=shards/train dataset.val_path=shards/val prior.path=DIR teacher.path=DIR
  ddoq-ray label                              one stage of a run whose earlier stages are done
  ddoq-ray stages=[label,train,evaluate,report]
  ddoq-ray train-prior dataset=digits out=my-prior
  ddoq-ray train-teacher dataset=digits out=my-teacher

Commands
  run (or nothing)   the configured stages, in order; what is done already is reused, what was cut off resumes
  {stages}
                     one stage
  train-prior        a small latent diffusion prior of your own, in diffusers' format
  train-teacher      a classifier of your own that labels views

Everything of a run goes to run_dir; report/index.html is the page to open.
"""


def help_text() -> str:
    """What ``--help`` prints: the commands, then every key with its default and its words."""
    from ddoq_ray.config.compose import config_dir
    from ddoq_ray.config.quantizer import QUANTIZERS

    lines = [_INTRO.format(stages=", ".join(STAGES)), "Keys (group=CHOICE takes a whole set of values at once)"]
    for field in dataclasses.fields(RunConfig):
        default = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        if not dataclasses.is_dataclass(default):
            lines.append(_line(field.name, field))
    for field in dataclasses.fields(RunConfig):
        if field.default_factory is dataclasses.MISSING or not dataclasses.is_dataclass(field.default_factory()):
            continue
        choices = sorted(p.stem for p in (config_dir() / field.name).glob("*.yaml"))
        lines += ["", f"{field.name}: {field.metadata['help']}" + (f" ({field.name}={'|'.join(choices)})" if choices else "")]
        groups = QUANTIZERS.values() if field.name == "quantizer" else [type(field.default_factory())]
        seen: set[str] = set()
        for group in groups:
            lines += _group_lines(group, f"{field.name}.", seen)
    return "\n".join(lines) + "\n"


def _group_lines(group: Any, prefix: str, seen: set[str]) -> list[str]:
    lines = []
    for field in dataclasses.fields(group):
        key = f"{prefix}{field.name}"
        if key in seen:
            continue
        seen.add(key)
        factory = field.default_factory
        if factory is not dataclasses.MISSING and dataclasses.is_dataclass(factory):
            inner = ", ".join(f.name for f in dataclasses.fields(factory))  # type: ignore[arg-type]
            lines.append(_line(key, field, f"{field.metadata['help']}: {inner}"))
        else:
            lines.append(_line(key, field))
    return lines


def _line(key: str, field: Any, words: str | None = None) -> str:
    words = words or field.metadata["help"]
    default = field.default
    if default is not dataclasses.MISSING and default not in (None, ""):
        shown = "[" + ",".join(map(str, default)) + "]" if isinstance(default, tuple) else default
        words += f" [{str(shown).lower() if isinstance(shown, bool) else shown}]"
    return textwrap.fill(words, width=100, initial_indent=f"  {key:<28} ", subsequent_indent=" " * 31)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for what the person can mend, 1 for a bug or a lost cluster."""
    args = list(sys.argv[1:] if argv is None else argv)
    if any(a in ("-h", "--help", "help") for a in args):
        print(help_text(), end="")
        return 0
    if "--version" in args:
        print(f"ddoq-ray {ddoq_ray.__version__}")
        return 0
    command = args.pop(0) if args and "=" not in args[0] else "run"
    try:
        _dispatch(command, args)
    except KeyboardInterrupt:
        print("ddoq-ray: interrupted; the same command again goes on where this one stopped", file=sys.stderr)
        return 130
    except Exception as error:
        told = user_error(error)
        if told is None:
            raise
        print(f"ddoq-ray: error: {told}", file=sys.stderr)
        return 2
    return 0


def _dispatch(command: str, args: list[str]) -> None:
    if command == "train-prior":
        from ddoq_ray.commands import train_prior

        train_prior.main(args)
    elif command == "train-teacher":
        from ddoq_ray.commands import train_teacher

        train_teacher.main(args)
    elif command == "run" or command in STAGES:
        from ddoq_ray.config.compose import load_config

        if command != "run":
            if any(a.startswith("stages=") for a in args):
                raise ValueError(f"`ddoq-ray {command}` is one stage; leave stages= out, or leave the command out")
            args = [*args, f"stages=[{command}]"]
        config = load_config(args)
        from ddoq_ray import pipeline

        pipeline.run(config)
    else:
        known = ", ".join(("run", *STAGES, "train-prior", "train-teacher"))
        raise ValueError(f"unknown command {command!r}; expected one of {known}, or key=value")


def user_error(error: BaseException) -> str | None:
    """The words of the ValueError at the bottom of an error, through Ray's wrappers; None for anything else.

    Ray raises a worker's exception as a subclass of its class with the worker's traceback as text; the original is
    its `cause`.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        inner = getattr(current, "cause", None) or current.__cause__
        if type(current) is ValueError:
            return str(current)
        current = inner if isinstance(inner, BaseException) else None
    return None
