"""Metrics as Prometheus reads them: from the endpoint of Ray's own agent."""

from __future__ import annotations

import re
import time
import urllib.request

import pytest
import ray

from ddoq_ray.execution import console, metrics
from ddoq_ray.execution.console import Progress

LINE = re.compile(r"ray_ddoq_(\w+?)(?:_total)?\{(.*)\} (\S+)")


def scraped() -> dict[tuple[str, str, str], float]:
    """(name, run, stage) -> value, of all nodes."""
    found = {}
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=10) as answer:
            for name, tags, value in LINE.findall(answer.read().decode()):
                labels = dict(re.findall(r'(\w+)="(.*?)"', tags))
                found[name, labels["run"], labels["stage"]] = float(value)
    return found


def test_prometheus_reads_what_a_run_counts(ray_here: None) -> None:
    with metrics.published("of-its-own") as hear:
        with Progress("encode", 1000, "images") as line:
            line.already(400)
            line.workers = 3
            line.advance(500, bytes=4000, quarantined=2)
            line.average("distortion", 1.5, 500)
        hear("unit requeued", stage="encode", unit="a", deaths=1)
        hear("stage finished", stage="encode")
    assert not console.watchers
    wanted = {"items": 500, "bytes": 4000, "quarantined": 2, "requeued": 1, "queue_depth": 100, "workers": 3}
    deadline = time.monotonic() + 60
    while True:
        found = {
            name: value for (name, run, stage), value in scraped().items() if (run, stage) == ("of-its-own", "encode")
        }
        if set(found) >= {*wanted, "distortion", "seconds"} or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert found.items() >= (wanted | {"distortion": 1.5}).items() and 0 < found["seconds"] < 60


def test_without_an_agent_there_is_silence(ray_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node | {"MetricsExportPort": 0} for node in ray.nodes()]
    monkeypatch.setattr(metrics.ray, "nodes", lambda: nodes)
    with metrics.published("run") as hear:
        assert not console.watchers
        hear("worker lost", stage="encode")
