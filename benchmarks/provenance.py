"""What every measured row says of itself, and how rows reach a file and the terminal."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ddoq_ray.provenance import commit, hardware


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A benchmark's command line: ``--json FILE`` and what the benchmark adds."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", metavar="FILE", help="write the rows here, a JSON list")
    return made


def peak_bytes(process: int | str = "self", field: str = "VmHWM") -> int:
    """Resident memory of a process at its highest (VmHWM), or another line of its status."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def provenance() -> dict[str, str]:
    """Hardware, commit and command of this measurement; files of the command by their names, wherever they are."""
    package, module = Path(sys.argv[0]).parent.name, Path(sys.argv[0]).stem
    words = [a for i, a in enumerate(sys.argv[1:], 1) if a != "--json" and sys.argv[i - 1] != "--json"]
    words = [Path(a).name if os.sep in a and Path(a).exists() else a for a in words]
    return {
        "hardware": hardware(),
        "commit": commit() or "unknown",
        "command": " ".join(["python -m", f"{package}.{module}", *words]),
    }


def finish(rows: list[dict[str, Any]], columns: list[str], path: str | None) -> None:
    """Print the rows as a Markdown table of `columns`, and write all of them with their provenance to `path`."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in (row.get(c, "") for c in columns)]
        print("| " + " | ".join(cells) + " |")
    if path:
        about = provenance()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps([row | about for row in rows], indent=1) + "\n")
