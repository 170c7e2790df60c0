"""What `plan` says of a run of published size."""

from __future__ import annotations

import pytest
from support.published import sizes_of

from ddoq_ray import pipeline
from ddoq_ray.commands.plan import Plan, _bytes


@pytest.mark.parametrize(
    "experiment, ipc, pixels",
    [("imagenet-1k-sd", 1, None), ("imagenet-1k-sd", 50, "9.83 GB"), ("imagenet-21k-p", 20, "41.1 GB")],
)
def test_pixels_that_teachers_share_are_told_where_they_are_many(experiment: str, ipc: int, pixels: str | None) -> None:
    sizes, made = sizes_of(experiment, ipc), Plan()
    _bytes(made, sizes.config, pipeline.steps(sizes.config), sizes)
    told = [line for line in made.lines if "object store" in line]
    assert len(told) == (pixels is not None), made.lines
    assert pixels is None or (f"share {pixels}" in told[0] and "on its disk" in told[0])
