"""What mkdocs adds to the pages of this folder: the list of all keys, and plots that lie with their results.

mkdocs calls the functions by their names (https://www.mkdocs.org/dev-guide/plugins/#events).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from ddoq_ray.commands.help import command_help, help_text
from ddoq_ray.commands.table import COMMANDS, RUN

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = ("studies/results", "benchmarks/results")


def on_files(files: Files, config: Any) -> Files:
    """Add keys.md, and the results that pages show."""
    files.append(File.generated(config, "keys.md", content=keys_page()))
    for folder in RESULTS:
        for file in sorted(file for file in (CHECKOUT / folder).glob("*.*") if file.suffix != ".md"):
            files.append(File.generated(config, f"{folder}/{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to results lead out of this folder in a checkout; on the site they do not."""
    for folder in RESULTS:
        markdown = markdown.replace(f"](../{folder}/", f"]({folder}/")
    return markdown


def keys_page() -> str:
    """Every command with its keys, in the words of `--help`."""
    said = "What `ddoq-ray --help` prints, and `ddoq-ray COMMAND --help` of the commands that have keys of their own."
    parts = ["# Keys", "", said, "", "## ddoq-ray", "", "```text", help_text().rstrip(), "```"]
    for command in COMMANDS:
        if command is not RUN and not command.reads:
            parts += ["", f"## ddoq-ray {command.name}", "", "```text", command_help(command).rstrip(), "```"]
    return "\n".join(parts) + "\n"
