"""The command line: ``ddoq-ray [command] key=value ...``. No command is `run`; a stage's name runs that stage."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import ddoq_ray
from ddoq_ray.commands.sweep import configurations
from ddoq_ray.commands.table import BY_NAME, named
from ddoq_ray.execution import signals
from ddoq_ray.execution.errors import NoWorkers, user_error
from ddoq_ray.execution.streams import emit, open_all


@dataclass(frozen=True)
class Line:
    """A command line taken apart: the command's name, `key=value` words, and what the flags ask for."""

    command: str
    words: list[str]
    several: bool = False  # --multirun
    shown: bool = False  # --cfg job
    completion: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code.

    0, 2 for what the user can mend, 3 when the cluster never had room for a worker, 1 for a bug or a lost cluster,
    128 + a signal.
    """
    open_all()
    args = list(sys.argv[1:] if argv is None else argv)
    with signals.watching():
        return _in_words(args)


def _about(args: Sequence[str]) -> str:
    """What --help and --version print, which stand above all else; empty where neither is asked."""
    if any(a in ("-h", "--help", "help") for a in args):
        from ddoq_ray.commands.help import command_help, help_text

        return command_help(BY_NAME[args[0]]) if args[0] in BY_NAME else help_text()
    return f"ddoq-ray {ddoq_ray.__version__}\n" if "--version" in args else ""


def read_line(args: Sequence[str]) -> Line:
    """Take a command line apart; flags are Hydra's and may stand anywhere.

    Raises:
        ValueError: For a flag without what belongs to it, or with what is not known here.
    """
    left, words, flags = list(args), [], {"several": False, "shown": False}
    completion: str | None = None
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        if word in ("--multirun", "-m"):
            flags["several"] = True
        elif flag in ("--cfg", "-c", "--shell-completion", "-sc"):
            value = value if equals else left.pop(0) if left else ""
            if flag in ("--shell-completion", "-sc"):
                completion = value
            elif value == "job":
                flags["shown"] = True
            else:
                raise ValueError(f"{flag} {value}: expected {flag} job, which prints the composed configuration")
        else:
            words.append(word)
    command = words.pop(0) if words and "=" not in words[0] else "run"
    return Line(command, words, completion=completion, **flags)


def _in_words(args: list[str]) -> int:
    """Run the command and put its end into words: (exit code)."""
    again = True
    try:
        if about := _about(args):
            emit(about, sys.stdout, end="")
            return 0
        line = read_line(args)
        again = line.command not in BY_NAME or BY_NAME[line.command].goes_on
        _dispatch(line)
    except (KeyboardInterrupt, SystemExit):
        return _interrupted(again)
    except Exception as error:
        told = user_error(error)
        if told is not None:
            _tell(f"error: {told}")
            return 2
        if isinstance(error, MemoryError):
            _tell("error: this process could not have the memory it asked for; raise the limit on this shell's memory "
                  "(ulimit -v), or take a machine with more")  # fmt: skip
            return 2
        if isinstance(error, NoWorkers):  # before signals: one is how a run is got out of its wait
            _tell(f"error: {error}")
            return 3
        if signals.received() is not None:  # a library's own error on the way out
            return _interrupted(again)
        if words := _lost():
            _tell(f"error: {words}")
            return 1
        raise
    return 0


def _interrupted(goes_on: bool) -> int:
    number = signals.received() or signal.SIGINT
    what = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    again = "goes on where this one stopped" if goes_on else "begins anew"
    _tell(f"{what}; the same command again {again}")
    return 128 + number


def _tell(words: str) -> None:
    from ddoq_ray.execution.console import say  # tqdm is not for --help

    say(f"ddoq-ray: {words}")


def _lost() -> str:
    """What is known of a lost cluster, when Ray was in use at all."""
    session = sys.modules.get("ddoq_ray.execution.session")
    return str(session.lost()) if session is not None else ""


def _dispatch(line: Line) -> None:
    if line.completion is not None:
        from ddoq_ray.commands.completion import script

        emit(script(line.completion), sys.stdout, end="")
        return
    command = named(line.command)
    try:
        os.getcwd()
    except OSError as error:
        raise ValueError(
            f"the current directory cannot be had ({error.strerror}); it may be deleted: cd to one that is there"
        ) from None
    for odd in (
        a for a in line.words if any("\ud800" <= ch <= "\udfff" for ch in a)
    ):  # Ray records the command as text
        raise ValueError(
            f"{odd.encode('utf-8', 'backslashreplace').decode()} is no UTF-8: set LC_ALL=C.UTF-8 (or PYTHONUTF8=1) "
            "where the terminal has another; a folder whose name is no UTF-8 needs a link with a plain name"
        )
    runs = configurations(command, line.words) if line.several else [("", command.compose(line.words))]
    if line.shown:
        from ddoq_ray.config.compose import to_yaml  # Hydra is not for --help

        emit("---\n".join(to_yaml(config) for _, config in runs), sys.stdout, end="")
        return
    for number, (words, config) in enumerate(runs, 1):
        if line.several:
            emit(f"run {number} of {len(runs)}: {words} in {config.folder}", sys.stderr)
        command.run(config)
