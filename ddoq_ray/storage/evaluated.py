"""What the stage evaluate measured: its rows, and the record that it publishes after them."""

from __future__ import annotations

import json
from typing import Any

from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import FILES, NotAsWritten, as_recorded, checked, repair
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.manifests import ResultRow


def evaluated(report: Folder) -> tuple[dict[str, Any] | None, list[ResultRow]]:
    """(record, rows) of a report's folder; (None, []) where nothing was evaluated.

    Raises:
        ValueError: One of the two is damaged, or is missing beside the other.
    """
    record = read_record(report, layout.EVALUATE, "evaluate")
    if record is None:
        if report.exists(layout.ROWS):  # rows that nothing vouches for
            raise ValueError(f"{report.path(layout.EVALUATE)} is missing although it was written; {repair('evaluate')}")
        return None, []
    return record, json.loads(as_recorded(report, layout.ROWS, record.get(FILES, {}).get(layout.ROWS), "evaluate"))


def read_record(report: Folder, name: str, command: str) -> dict[str, Any] | None:
    """A record of a report's folder; None where there is none.

    Raises:
        ValueError: It is damaged.
    """
    try:
        return checked(report.read(name))
    except FileNotFoundError:
        return None
    except NotAsWritten as error:
        raise ValueError(f"{report.path(name)} is damaged: {error}; {repair(command)}") from None
