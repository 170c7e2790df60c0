"""Image shards made by an elastic pool of actors; those that an earlier run published are kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ddoq_ray.execution.pool import Elastic, run_elastic
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Progress
from ddoq_ray.stages.synthesize.jobs import Job
from ddoq_ray.stages.synthesize.shard_records import published
from ddoq_ray.storage.json_rows import Rows


@dataclass(frozen=True)
class _Left(Collection[Job]):
    """The jobs of some sets whose shards are not there, each made when it is given."""

    sets: Sequence[Sequence[Job]]
    missing: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return sum(map(len, self.missing))

    def __iter__(self) -> Iterator[Job]:
        return (jobs[index] for jobs, missing in zip(self.sets, self.missing, strict=True) for index in missing)

    def __contains__(self, job: object) -> bool:
        return any(job == mine for mine in self)


def made_shards(
    run: Run, stage: str, method: str, sets: Sequence[Sequence[Job]], spawn: Callable[[], Any], *, ahead: int = 0
) -> list[Rows]:
    """The records of the shards of each set, in order, once those that were not there are made.

    Args:
        stage: Whose pool and events these are.
        method: The word on the line of progress.
        sets: Jobs of a folder each, in the order of their units.
        spawn: Makes an actor whose ``run(job)`` publishes a shard and gives its record; it asks for what
            `cluster.decoder` says.
        ahead: As `Elastic` has it.
    """
    config = run.config
    records = {jobs[0].folder: Rows(len(jobs)) for jobs in sets if len(jobs)}
    with Progress(method, sum(len(job.unit) for jobs in sets for job in jobs), "images") as progress:
        for jobs in sets:
            there = published(run.dir, jobs)
            progress.already(sum(record["images"] for record in there.values()))
            for job in jobs if there else ():
                if job.name in there:
                    records[job.folder].put(job.unit.index, there[job.name])
        by_set = [records[jobs[0].folder] if len(jobs) else Rows(0) for jobs in sets]
        for job, record in run_elastic(
            spawn,
            _Left(sets, [rows.missing() for rows in by_set]),
            Elastic.of(
                config.cluster,
                stage,
                "decoder",
                min_workers=config.synthesizer.min_workers,
                max_workers=config.synthesizer.max_workers,
                ahead=ahead,
            ),
            name=lambda job: job.name,
            on_event=lambda event, **f: run.events.add(event, stage=stage, **f),
            progress=progress,
        ):
            records[job.folder].put(job.unit.index, record)
            progress.advance(record["images"], bytes=record["bytes"])
    return by_set
