"""What a finished run wrote, by the names of its steps: what a plan is held against."""

from __future__ import annotations

from pathlib import Path

from ddoq_ray import pipeline
from ddoq_ray.config import RunConfig

COUNTED = (".parquet", ".tar", ".safetensors")


def on_disk(config: RunConfig) -> dict[str, int]:
    """Bytes of each kind of step's files, with the records that are as many as they."""
    run = Path(config.folder)
    there: dict[str, int] = {}
    for step in pipeline.steps(config):
        files = [
            p
            for p in (run / step.place).rglob("*")
            if p.suffix in COUNTED or p.match("part-*.json") or p.match("labels-*.json")
        ]
        if step.name == "prepare":
            files = [p for p in files if p.parent.name == "train"]
        if size := sum(p.stat().st_size for p in files):
            there[step.name] = there.get(step.name, 0) + size
    return there
