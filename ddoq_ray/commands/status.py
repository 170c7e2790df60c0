"""``ddoq-ray status RUN``: where a run stands, from the files of its run directory alone."""

from __future__ import annotations

import dataclasses
import posixpath
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ddoq_ray import pipeline
from ddoq_ray.config.compose import parts_of
from ddoq_ray.config.run import STAGES, RunConfig
from ddoq_ray.config.run_directory import StatusConfig
from ddoq_ray.execution import lease
from ddoq_ray.execution.streams import emit
from ddoq_ray.stages.evaluate.step import Evaluate
from ddoq_ray.stages.report.step import Report
from ddoq_ray.stages.step import Step
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.at_rest import events, finished_stages
from ddoq_ray.storage.folder import Folder

EVENTS_SHOWN = 5
NOT_BEGUN = "not begun"

# Step -> what its units are called, and the files that are there when one is done.
UNITS = {
    "encode": ("shards", layout.DONE_RECORDS),
    "heldout": ("shards", layout.DONE_RECORDS),
    "quantize": ("parts", layout.CODEBOOK_RECORDS),
    "synthesize": ("image shards", layout.IMAGE_SHARDS),
    "select": ("image shards", layout.IMAGE_SHARDS),
    "recover": ("image shards", layout.IMAGE_SHARDS),
    "given": ("image shards", layout.IMAGE_SHARDS),
    "label": ("files", layout.LABEL_RECORDS),
}


def main(command: StatusConfig) -> None:
    """Print the run's state.

    Raises:
        ValueError: The folder is none of a run, or its configuration cannot be read.
    """
    run = Folder(command.folder)
    config = pipeline.recorded_config(run)
    emit("\n".join(lines(run, config, time.time())), sys.stdout)


def lines(run: Folder, config: RunConfig, now: float) -> Iterator[str]:
    """What is printed; `now` in seconds since 1970."""
    ipcs = sorted({part.ipc for part in parts_of(config)})
    yield f"{run.uri}: {config.dataset.title}, ipc {', '.join(map(str, ipcs))}, {', '.join(config.methods)}"
    yield _holder(run, now)
    finished = finished_stages(run)
    planned: dict[str, list[Step]] = {}
    everything = dataclasses.replace(config, stages=STAGES)  # the last command may have been one stage's
    for step in pipeline.steps(everything):
        if step.wanted(everything):
            planned.setdefault(step.name, []).append(step)
    for name, steps in planned.items():
        state = _state(run, name, steps, finished)
        if state != NOT_BEGUN or steps[0].stage in config.stages:
            yield f"{name:<10} {state}"
    told = list(events(run))[-EVENTS_SHOWN:]
    if told:
        yield "last events:"
    for event in told:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event.pop("time", 0)))
        what = event.pop("event", "")
        yield f"  {when} UTC  {what}: " + ", ".join(f"{key} {_short(value)}" for key, value in event.items())


def _holder(run: Folder, now: float) -> str:
    there = lease.read(run)
    if there is None:
        last = [e["event"] for e in events(run) if str(e.get("event", "")).startswith("run ")]
        return f"no run is at work; the last one's word was: {last[-1] if last else 'none'}"
    if not there["token"]:
        return f"{layout.LEASE} cannot be read: no run that follows its rules wrote it"
    whose = f"process {there['pid']} on {there['host']}, since {_hours(now - there['since'])}"
    gone = lease.why_stale(there)
    return f"held by {whose}, but {gone}: the same command goes on" if gone else f"a run is at work: {whose}"


def _state(run: Folder, name: str, steps: Sequence[Step], finished: set[str]) -> str:
    """What the steps of one kind have done."""
    if name in (Evaluate.name, Report.name):  # made anew in every run
        there = run.exists(posixpath.join(layout.REPORT, layout.EVALUATE if name == Evaluate.name else layout.RESULTS))
        return "done" if name in finished else "made by an earlier run, to be made anew" if there else NOT_BEGUN
    done, open_, seconds, items, unit = 0, [], 0.0, 0, ""
    for step in steps:
        artifact = step.artifact(run)
        manifest = artifact.manifest()
        if manifest is not None:
            done += 1
            seconds, items, unit = seconds + manifest["seconds"], items + manifest["items"], manifest["unit"]
        elif artifact.folder.exists(layout.STARTED):
            open_.append(artifact)
    made = f", {items:,} {unit} in {_hours(seconds)}" if done else ""
    if done == len(steps):
        return f"done{made}" if len(steps) == 1 else f"done, {done} of {len(steps)}{made}"
    if not open_ and not done:
        return NOT_BEGUN
    begun = "; ".join(f"{a.folder.uri.removeprefix(run.uri + '/')} {_units(run, name, a)}" for a in open_[:3])
    more = f"; {len(open_) - 3} more" if len(open_) > 3 else ""
    return f"{done} of {len(steps)} done{made}{'; at work: ' if open_ else ''}{begun}{more}"


def _units(run: Folder, name: str, artifact: Artifact) -> str:
    if name not in UNITS:
        return "begun"
    what, pattern = UNITS[name]
    count = len(artifact.folder.names(pattern))
    data = Artifact(run / layout.DATA, "prepare").manifest() if name == "encode" else None
    of = f" of {data['shards']:,}" if data else ""
    return f"{count:,}{of} {what}"


def _hours(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _short(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
