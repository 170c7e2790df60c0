"""Damage at rest: every kind of file, flipped, cut or missing; what `verify` says of it, and the stage that reads it.

    python -m tests.chaos.damage --json benchmarks/results/damage.json

A row a kind and way: `file`, `way`; `verify`: whether `ddoq-ray verify` names the file and no other; `stage` that reads
it in a run that goes on from there, and `outcome`: `refused` (in words that name the file), `made anew` (the file is as
it was again), `not read` (the stage makes what it always makes, and the file is as damaged as before) or `accepted`.
Only the last is a fault. A row that is in the file is not made again.
"""

from __future__ import annotations

import json
import os
import posixpath
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import parser, provenance
from ddoq_ray.commands import verify
from ddoq_ray.execution.errors import user_error
from ddoq_ray.storage import layout
from ddoq_ray.storage.at_rest import Seen
from ddoq_ray.storage.folder import Folder
from tests.chaos.cells import Lab, content, lab
from tests.support.damage import KINDS as OF_EVERY_RUN
from tests.support.damage import WAYS, damage

COMMAND = "python -m tests.chaos.damage"
KINDS = OF_EVERY_RUN | {
    "packed validation shard": "data/val/val-000001.tar",
    "packed shard's record": "data/records/train-000001.json",
    "validation index": "data/val-shards.json",
}
# Kind of file -> the stage that reads it next; where none does, the one that would.
READ_BY = {
    "packed shard": "encode",
    "packed validation shard": "label",
    "packed shard's record": "encode",
    "index": "encode",
    "validation index": "evaluate",
    "class list": "encode",
    "latents": "quantize",
    "done record": "quantize",
    "held-out latents": "report",
    "codebook part": "synthesize",
    "part's record": "synthesize",
    "image shard": "label",
    "image shard's record": "label",
    "dataset card": "label",
    "chosen images": "label",
    "labels": "train",
    "labels' record": "train",
    "student's weights": "evaluate",
    "student's network": "evaluate",
    "student's curve": "report",
    "manifest": "label",
    "labels' manifest": "train",
    "student's manifest": "evaluate",
    "identity": "quantize",
    "rows": "report",
    "rows' record": "report",
    "results": "report",
    "page": "report",
    "configuration": "report",
}


def damaged_row(here: Lab, kind: str, way: str, place: Path) -> dict[str, Any]:
    """Damage a file of the finished run for `verify`, and of the run before the stage that reads it for that stage."""
    name, stage = KINDS[kind], READ_BY[kind]
    start = time.monotonic()
    _copy(here.base / "finished", place)
    damage(place / name, way)
    named = [d.file for d in verify.look(Folder(str(place)), Seen())[1]]
    before = here.base / stage
    _copy(before if (before / name).exists() else here.base / "finished", place)
    whole = damage(place / name, way)
    left = (place / name).read_bytes() if (place / name).exists() else None
    words = ""
    try:
        here.run(place, stage)
    except Exception as error:
        words = user_error(error) or ""
        # Without its manifest an output is not finished, and is told by its folder.
        of = posixpath.dirname(name) if way == "missing" and name.endswith(layout.MANIFEST) else name
        outcome = (
            "refused" if f"{place}/{of} " in words else f"refused in other words: {type(error).__name__}: {error}"[:300]
        )
    else:
        now = (place / name).read_bytes() if (place / name).exists() else None
        same = content(place, stage) == content(here.after(stage), stage)
        outcome = "accepted" if not same else "not read" if now == left else "made anew"
        # A log of times may be another one; what is checked by bytes is not.
        assert outcome != "made anew" or now == whole or stage in ("evaluate", "report"), (kind, way)
    return {
        "kind": kind,
        "file": name,
        "way": way,
        "verify": named == [name],
        "stage": stage,
        "outcome": outcome,
        "words": words.replace(str(place), "RUN"),
        "seconds": round(time.monotonic() - start, 1),
    }


def _copy(source: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=60.0, help="begin no row after so long")
    options.add_argument("--scratch", help="where the undisturbed run is kept for the next part; by default it is not")
    given = options.parse_args()
    file = Path(given.json or "damage.json")
    rows = json.loads(file.read_text()) if file.exists() else []
    there = {(row["kind"], row["way"]) for row in rows}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddoq-damage-") as own:
        scratch = Path(given.scratch or own)
        os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
        with lab(scratch / "base") as here:
            for kind, way in ((k, w) for k in KINDS for w in WAYS if (k, w) not in there):
                if time.monotonic() - start > 60 * given.minutes:
                    break
                row = damaged_row(here, kind, way, scratch / "damaged")
                rows.append(row | provenance() | {"command": COMMAND})
                file.write_text(json.dumps(rows, indent=1) + "\n")
                print(
                    f"{time.monotonic() - start:5.0f} s  {', '.join(str(value) for value in row.values())}", flush=True
                )
    wrong = [row for row in rows if not row["verify"] or row["outcome"] not in ("refused", "made anew", "not read")]
    print(f"{len(rows)} of {len(KINDS) * len(WAYS)} rows, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
