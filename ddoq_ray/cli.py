"""The command line: ``ddoq-ray [command] key=value ...``. No command is `run`; a stage's name runs that stage."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any

import ddoq_ray
from ddoq_ray.config import STAGES, RunConfig
from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.execution import signals
from ddoq_ray.execution.streams import emit, open_all

_INTRO = """\
ddoq-ray distils a labelled image dataset into a few weighted synthetic images per class,
by optimal quantization in a diffusion model's latent space (DDOQ), and measures what they are worth.

Use:  ddoq-ray [command] key=value ...

  ddoq-ray                                    distil scikit-learn's digits at 10 images per class, on this machine
  ddoq-ray ipc=50 quantizer=gram              another size, another quantizer
  ddoq-ray prepare dataset=imagefolder dataset.path=photos run_dir=DIR     any labelled images to shards
  ddoq-ray dataset.path=shards/train dataset.val_path=shards/val prior.path=DIR teacher.path=DIR \\
           student=resnet18-small protocol=d4m
  ddoq-ray label                              one stage of a run whose earlier stages are done
  ddoq-ray stages=[label,train,evaluate,report]
  ddoq-ray train-prior dataset=digits out=my-prior
  ddoq-ray train-teacher dataset=digits out=my-teacher

Commands
  run (or nothing)   the configured stages, in order; what is done already is reused, what was cut off resumes
  {stages}
                     one stage
  train-prior        a small latent diffusion prior of your own, in diffusers' format, with what it is run by
  train-teacher      a classifier of your own that labels views

Everything of a run goes to run_dir; report/index.html is the page to open. A value is read by the kind of its key:
paths need no quotes but the shell's, lists are [a,b] or a,b; of a key given twice the last counts.
"""


def help_text() -> str:
    """What ``--help`` prints: the commands, then every key with its words and its value when nothing is asked."""
    from ddoq_ray.config.compose import config_dir, load_config
    from ddoq_ray.config.quantizer import QUANTIZERS

    config = load_config()
    lines = [_INTRO.format(stages=", ".join(STAGES)), "Keys (group=CHOICE takes a whole set of values at once)"]
    groups = [f for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(getattr(config, f.name))]
    lines += [_line(f.name, f, getattr(config, f.name)) for f in dataclasses.fields(RunConfig) if f not in groups]
    for field in groups:
        choices = sorted(p.stem for p in (config_dir() / field.name).glob("*.yaml"))
        lines += ["", f"{field.name}: {field.metadata['help']} ({field.name}={'|'.join(choices)})"]
        shown = [getattr(config, field.name)]
        if field.name == "quantizer":  # the keys of every algorithm, each once
            shown += [load_config([f"quantizer={name}"]).quantizer for name in QUANTIZERS]
        seen: set[str] = set()
        for group in shown:
            lines += _group_lines(group, f"{field.name}.", seen)
    return "\n".join(lines) + "\n"


TRAINING_COMMANDS = ("train-prior", "train-teacher")


def command_help(command: str) -> str:
    """What ``train-prior --help`` and ``train-teacher --help`` print."""
    from ddoq_ray.commands.train_prior import TrainPriorConfig
    from ddoq_ray.commands.train_teacher import TrainTeacherConfig

    config = {"train-prior": TrainPriorConfig, "train-teacher": TrainTeacherConfig}[command]
    default = config(dataset=DatasetConfig(source="digits"))
    lines = [f"ddoq-ray {command} [dataset=digits] out=FOLDER key=value ...", ""]
    for field in dataclasses.fields(config):
        value = getattr(default, field.name)
        if not dataclasses.is_dataclass(value):
            lines.append(_line(field.name, field, value))
    lines += _group_lines(default.dataset, "dataset.", set())
    for field in dataclasses.fields(default.training):
        lines.append(f"  training.{field.name:<19} [{getattr(default.training, field.name)}]")
    return "\n".join(lines) + "\n"


def _group_lines(group: Any, prefix: str, seen: set[str]) -> list[str]:
    lines = []
    for field in dataclasses.fields(group):
        key = f"{prefix}{field.name}"
        if key in seen:
            continue
        seen.add(key)
        lines.append(_line(key, field, getattr(group, field.name)))
    return lines


def _line(key: str, field: Any, value: Any) -> str:
    words = field.metadata["help"]
    if dataclasses.is_dataclass(value):
        words += f" [{', '.join(f'{f.name}={getattr(value, f.name)}' for f in dataclasses.fields(value))}]"
    elif isinstance(value, tuple):
        words += f" [{','.join(map(str, value))}]" if value else " [none]"
    elif value is not None:
        words += f" [{str(value).lower() if isinstance(value, bool) else value}]"
    return textwrap.fill(words, width=100, initial_indent=f"  {key:<28} ", subsequent_indent=" " * 31)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 2 for what the person can mend, 1 for a bug or a lost cluster, 128 + a signal."""
    open_all()
    args = list(sys.argv[1:] if argv is None else argv)
    if any(a in ("-h", "--help", "help") for a in args):
        emit(command_help(args[0]) if args[0] in TRAINING_COMMANDS else help_text(), sys.stdout, end="")
        return 0
    if "--version" in args:
        emit(f"ddoq-ray {ddoq_ray.__version__}", sys.stdout)
        return 0
    command = args.pop(0) if args and "=" not in args[0] else "run"
    with signals.watching():
        return _told(command, args)


def _told(command: str, args: list[str]) -> int:
    """Run the command and put its end into words: (exit code)."""
    try:
        _dispatch(command, args)
    except (KeyboardInterrupt, SystemExit):
        return _interrupted(command)
    except Exception as error:
        told = user_error(error)
        if told is not None:
            emit(f"ddoq-ray: error: {told}", sys.stderr)
            return 2
        if signals.received() is not None:  # a library's own error on the way out
            return _interrupted(command)
        if words := _lost():
            emit(f"ddoq-ray: error: {words}", sys.stderr)
            return 1
        raise
    return 0


def _interrupted(command: str) -> int:
    number = signals.received() or signal.SIGINT
    what = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    again = "begins anew" if command in TRAINING_COMMANDS else "goes on where this one stopped"
    emit(f"ddoq-ray: {what}; the same command again {again}", sys.stderr)
    return 128 + number


def _lost() -> str:
    """What is known of a lost cluster, when Ray was in use at all."""
    session = sys.modules.get("ddoq_ray.execution.session")
    return str(session.lost()) if session is not None else ""


def _dispatch(command: str, args: list[str]) -> None:
    if command == "train-prior":
        from ddoq_ray.commands import train_prior

        train_prior.main(args)
    elif command == "train-teacher":
        from ddoq_ray.commands import train_teacher

        train_teacher.main(args)
    elif command == "run" or command in STAGES:
        from ddoq_ray.config.compose import load_config

        for odd in (a for a in args if any("\ud800" <= ch <= "\udfff" for ch in a)):  # Ray records the command as text
            raise ValueError(
                f"{odd.encode('utf-8', 'backslashreplace').decode()} is no UTF-8: set LC_ALL=C.UTF-8 (or PYTHONUTF8=1) "
                "where the terminal has another; a folder whose name is no UTF-8 needs a link with a plain name"
            )
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
            return str(current) if _raised_here(error, current) else None
        current = inner if isinstance(inner, BaseException) else None
    return None


def _raised_here(outer: BaseException, error: BaseException) -> bool:
    """Whether our own code raised `error`: a library's ValueError is a bug of ours and keeps its traceback.

    An error that came from a worker has lost its frames; Ray keeps them as text.
    """
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if not files or f"{os.sep}ray{os.sep}" in files[-1]:
        files = re.findall(r'File "([^"]+)"', str(getattr(outer, "traceback_str", "")))
    return not files or f"{os.sep}ddoq_ray{os.sep}" in files[-1] or "site-packages" not in files[-1]
