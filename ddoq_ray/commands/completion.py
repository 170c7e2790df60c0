"""``--shell-completion install=bash``: a script that completes commands, keys and choices."""

from __future__ import annotations

from ddoq_ray.commands.help import keys_of
from ddoq_ray.commands.table import COMMANDS
from ddoq_ray.config.presets import choices, groups_of

_BASH = """\
_ddoq_ray() {{
  local line="${{COMP_LINE:0:$COMP_POINT}}"
  local word="${{line##* }}"
  COMPREPLY=($(compgen -W "{words}" -- "$word"))
  case "$word" in *=*) COMPREPLY=("${{COMPREPLY[@]#"${{word%=*}}="}}") ;; esac  # bash takes = for the end of a word
}}
complete -o nospace -o default -F _ddoq_ray ddoq-ray
"""
_ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"


def script(asked: str) -> str:
    """What the shell is to evaluate: ``eval "$(ddoq-ray --shell-completion install=bash)"``.

    Raises:
        ValueError: For another shell.
    """
    if asked not in ("install=bash", "install=zsh"):
        raise ValueError(f"--shell-completion {asked}: expected install=bash or install=zsh")
    words = {command.name for command in COMMANDS}
    for cls in {command.config: command.keys for command in COMMANDS}.values():
        words |= {f"{key}=" for key, _, _ in keys_of(cls)}
        words |= {f"{group}={choice}" for group in groups_of(cls) for choice in choices(group)}
    text = _BASH.format(words=" ".join(sorted(words)))
    return text if asked == "install=bash" else _ZSH + text
