"""What Prometheus may read of a run: Ray's metrics `ddoq_*`, of the counts and events that a run has anyway.

Ray's agent on the driver's node exports them among Ray's own, as `ray_ddoq_...`; counters end in `_total`. Nothing is
measured for them: about once a second they are told what the progress lines know (`console.watchers`), and of each
event (`Events.hear`). Where no agent exports them, none is made.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import ray
from ray.util.metrics import Counter, Gauge

from ddoq_ray.execution import console
from ddoq_ray.execution.console import Progress

TAGS = ("run", "stage")
COUNTERS = {
    "items": "Items that this run has finished, by stage (images, shards, views, parts, students)",
    "bytes": "Bytes of what this run has published, by stage",
    "seconds": "Seconds for which the stage has been at work",
    "quarantined": "Samples that were refused",
    "requeued": "Units that were given to another worker after a death",
    "workers_lost": "Workers that died",
}
GAUGES = {
    "queue_depth": "Items that are not finished",
    "workers": "Workers that are ready, of a stage with a pool of its own",
    "distortion": "Mean squared distance of a latent to its centroid, over the codebook parts that are finished",
}
HEARD = {"unit requeued": "requeued", "worker lost": "workers_lost"}  # event -> counter


class Metrics:
    """The metrics of one run.

    Attributes:
        run: Its name, a tag of each.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self._counters = {name: Counter(f"ddoq_{name}", words, tag_keys=TAGS) for name, words in COUNTERS.items()}
        self._gauges = {name: Gauge(f"ddoq_{name}", words, tag_keys=TAGS) for name, words in GAUGES.items()}
        self._told: WeakKeyDictionary[Progress, dict[str, float]] = WeakKeyDictionary()

    def look(self, progress: Progress) -> None:
        """Tell what a progress line knows now."""
        tags, told = self._tags(progress.stage), self._told.setdefault(progress, {})
        now = {
            **{name: amount for name, amount in progress.measured.items() if name in COUNTERS},
            "items": float(progress.done - progress.before),
            "seconds": time.monotonic() - progress.start,
        }
        for name, amount in now.items():
            if amount > told.get(name, 0.0):
                self._counters[name].inc(amount - told.get(name, 0.0), tags)
                told[name] = amount
        left = None if progress.total is None else float(progress.total - progress.done)
        levels = {"queue_depth": left, "workers": progress.workers, "distortion": progress.measured.get("distortion")}
        for name, level in levels.items():
            if level is not None:
                self._gauges[name].set(level, tags)

    def hear(self, event: str, **facts: Any) -> None:
        """Count an event."""
        if event in HEARD:
            self._counters[HEARD[event]].inc(1, self._tags(str(facts.get("stage", ""))))

    def _tags(self, stage: str) -> dict[str, str]:
        return {"run": self.run, "stage": stage}


def exported() -> bool:
    """Whether an agent on this node exports metrics."""
    here = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == here and node.get("MetricsExportPort") for node in ray.nodes())


@contextlib.contextmanager
def published(run: str) -> Iterator[Callable[..., None]]:
    """Metrics of a run, while the block runs in a Ray session: what is to hear of its events."""
    if not exported():
        yield lambda event, **facts: None
        return
    metrics = Metrics(run)
    console.watchers.append(metrics.look)
    try:
        yield metrics.hear
    finally:
        console.watchers.remove(metrics.look)
