"""``ddoq-ray verify RUN``: every file of a run directory against the record of what was written."""

from __future__ import annotations

import dataclasses
import time

from ddoq_ray import pipeline
from ddoq_ray.config.run import STAGES, RunConfig
from ddoq_ray.config.run_directory import VerifyConfig
from ddoq_ray.execution import lease
from ddoq_ray.execution.workers import say
from ddoq_ray.storage import layout
from ddoq_ray.storage.at_rest import Damage, Seen, damaged, damaged_report, finished_stages, set_aside
from ddoq_ray.storage.folder import Folder


def main(command: VerifyConfig) -> None:
    """Look at every file; with `repair`, make anew what is damaged.

    Raises:
        ValueError: The folder is none of a run; or files are damaged, and named on lines before.
    """
    run = Folder(command.folder)
    start, seen = time.monotonic(), Seen()
    config, found = look(run, seen)
    for damage in found:
        say(f"verify     {run.path(damage.file)}: {damage.why}; `ddoq-ray {damage.command}` makes it anew")
    seconds = time.monotonic() - start
    rate = f"{seen.files:,} files, {seen.bytes / 1e6:,.1f} MB in {seconds:.1f} s"
    if not found:
        say(f"verify     {run.uri} is as it was written: {rate}")
        return
    if not command.repair:
        raise ValueError(
            f"{len(found)} of {seen.files:,} files of {run.uri} are damaged or missing, first {found[0].file}; "
            f"`ddoq-ray verify run_dir={command.folder} repair=true` sets them aside and makes them anew"
        )
    _repair(run, config, found)


def look(run: Folder, seen: Seen) -> tuple[RunConfig | None, list[Damage]]:
    """The recorded configuration, where it can be read, and the damage.

    Raises:
        ValueError: The folder is none of a run.
    """
    finished = finished_stages(run)
    found: list[Damage] = []
    config: RunConfig | None = None
    if not run.exists(layout.CONFIG) and not run.names(f"*/{layout.STARTED}"):
        raise ValueError(f"{run.uri} holds no run: expected a run directory, which has {layout.CONFIG} and data/")
    try:
        pipeline.recorded_text(run)
    except ValueError as error:
        if run.exists(layout.CONFIG) or finished:
            found.append(Damage(layout.CONFIG, str(error), "run", (layout.CONFIG,)))
    else:
        try:
            config = pipeline.recorded_config(run)
        except ValueError as error:
            say(f"verify     {layout.CONFIG} is of another version ({error}): what must be there is not known")
    found += damaged(run, _promised(config, finished), seen)
    found += damaged_report(run, finished, seen)
    return config, found


def _promised(config: RunConfig | None, finished: set[str]) -> dict[str, str]:
    """Place -> kind of the artifacts that the finished stages have left; held-out latents may have had no images."""
    if config is None:
        return {}
    done = dataclasses.replace(config, stages=tuple(s for s in STAGES if s in finished) or ("prepare",))
    return {
        step.place: step.name if step.name in layout.ARTIFACTS else step.stage
        for step in pipeline.steps(done)
        if step.stage in finished and step.wanted(done) and step.name not in ("heldout", "evaluate", "report")
    }


def _repair(run: Folder, config: RunConfig | None, found: list[Damage]) -> None:
    """Set the damaged files aside and run their stages as they were configured.

    Raises:
        ValueError: There is no configuration to run, or files are damaged again.
    """
    with lease.held(run):  # not below a run that is at work
        place = set_aside(run, found)
    say(f"verify     {len(found)} damaged or missing files; what was there is in {run.path(place)}")
    if config is None:
        raise ValueError(f"{run.path(layout.CONFIG)} cannot be read: run the command that made the run again")
    stages = {damage.command for damage in found if not damage.file.endswith(layout.STARTED)} & set(STAGES)
    if stages:
        pipeline.run(dataclasses.replace(config, run_dir=run.uri, stages=tuple(s for s in STAGES if s in stages)))
    _, left = look(run, Seen())
    if left:
        raise ValueError(
            f"{len(left)} files of {run.uri} are still not as they were written, first {left[0].file}: {left[0].why}"
        )
    say(f"verify     {run.uri} is whole again")
