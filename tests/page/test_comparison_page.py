"""A comparison's tables and its section of the page."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

import pytest

from ddoq_ray.core.comparison import lines_of
from ddoq_ray.page.charts import Axis
from ddoq_ray.page.comparison import beyond, csv_table, markdown_table, text_table
from ddoq_ray.page.render import render_page
from ddoq_ray.page.reported import reported

SCORES = {
    "ddoq": (60.0, 62.0, 61.0),
    "d4m": (58.0, 57.0, 60.0),
    "random": (50.0, 52.5, 51.0),
    "full": (90.0, 91.0, 92.0),
}


def results(**change: Any) -> dict[str, Any]:
    rows = [
        {
            "method": method, "ipc": ipc, "student": "convnet3", "size": 32, "teacher": "resnet56", "protocol": "rded",
            "labels": labels, "seed": seed, "top1_pct": top1 + ipc - 5 * (labels == "hard"), "train_images": 10 * ipc,
        }
        for labels in ("soft", "hard") for ipc in (1, 10) for method, scores in SCORES.items()
        for seed, top1 in enumerate(scores) if method != "full" or ipc == 10
    ]  # fmt: skip
    cost = {
        "images_bytes": 20_000.0, "labels_bytes": 4_000_000.0, "images_s": 12.5, "labels_s": 3.0, "train_s": 60.0,
        "train_device_s": 60.0, "device": "cpu",
    }  # fmt: skip
    lines = [line | cost | {"reported": reported("cifar10", line)} for line in lines_of(rows)]
    counts = {"train_images": 50_000, "classes": 10, "val_images": 5000, "val_refused": 0}
    comparison = {"lines": lines, "reference": "random"}
    return {"dataset": "cifar10", "own_method": "ddoq", "counts": counts, "comparison": comparison} | change


def test_the_table_on_the_terminal() -> None:
    text = text_table(results())
    assert text.isascii()
    row = next(line for line in text.splitlines() if line.startswith("ddoq") and "  10 " in line and "soft" in line)
    # Differences from random: 10, 9.5, 10 points; mean 9.83, std 0.289, t(0.975; 2) = 4.303.
    assert "71.00 +- 1.00" in row and "+9.83 [+9.12, +10.55]" in row
    random = next(line for line in text.splitlines() if line.startswith("random") and "  10 " in line)
    assert "46.3 (Qin et al., NeurIPS 2024, table 2" in random
    assert "teacher resnet56" in text.splitlines()[0] and "teacher" not in text.splitlines()[1]
    assert "all" in next(line for line in text.splitlines() if line.startswith("full"))


def test_markdown_and_csv_hold_the_same_lines() -> None:
    found = results()
    table = [line for line in markdown_table(found).splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in table}) == 1
    rows = list(csv.DictReader(io.StringIO(csv_table(found))))
    lines = found["comparison"]["lines"]
    assert len(rows) == len(table) - 1 == len(lines) == 14
    for row, line in zip(rows, lines, strict=True):
        assert float(row["mean_pct"]) == line["mean_pct"] and row["method"] == line["method"]
        assert (row["against_mean_pct"] == "") == (line["against"] is None)
    assert rows[0]["ior_pct"] and float(rows[0]["hlr_pct"]) == 96.0 - 57.0  # means of full and of ddoq, both hard


def test_the_page_shows_what_differs_and_draws_it() -> None:
    page = render_page(results(), [])
    assert "Methods side by side" in page and "Accuracy of students" not in page and "Training curves" not in page
    assert page.count('<svg class="chart"') == 6  # three axes, for soft and for hard labels
    assert "Qin et al., NeurIPS 2024" in page and "DD-Ranking" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "Methods side by side" not in render_page({"dataset": "digits"}, [])


def test_without_the_reference_nothing_is_said_of_differences() -> None:
    alone = results()
    for line in alone["comparison"]["lines"]:
        line["against"] = None
    assert "against" not in text_table(alone) and "Against" not in render_page(alone, [])


def test_a_difference_is_marked_only_beyond_its_interval() -> None:
    line: dict[str, Any] = {"against": {"mean_pct": 1.0, "low_pct": 0.2, "high_pct": 1.8}}
    assert beyond(line) == "up"
    line["against"] |= {"low_pct": -0.1}
    assert beyond(line) == ""
    line["against"] |= {"mean_pct": -1.0, "low_pct": -1.5, "high_pct": -0.5}
    assert beyond(line) == "down"
    line["against"] |= {"low_pct": None, "high_pct": None}
    assert beyond(line) == beyond({"against": None}) == ""


def test_figures_of_another_setting_are_not_shown() -> None:
    line = {"student": "convnet3", "labels": "soft", "method": "random", "ipc": 10}
    assert [found["top1_pct"] for found in reported("CIFAR10", line)] == [46.3]
    for change in ({"ipc": 20}, {"student": "resnet18"}, {"labels": "hard"}, {"method": "herding"}):
        assert reported("cifar10", line | change) == []
    assert reported("mine", line) == []


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (1, 50, [1, 2, 5, 10, 20, 50]),
        (1, 1, [1]),
        (3e4, 9e6, [1e5, 1e6]),
        (3, 4, [3, 4]),
        (763.9, 838.1, [763.9, 838.1]),
        (1, 1e9, [1, 1e2, 1e4, 1e6, 1e8]),
    ],
)
def test_ticks_of_a_logarithmic_axis(low: float, high: float, told: list[float]) -> None:
    assert Axis(log=True).ticks(low, high) == pytest.approx(told)
