"""Inline SVG for the report page: line charts with a seed band, dots with whiskers, legend samples.

Colours are not written here: every mark carries a class `s-<slot>` and the page's style sheet gives the slot a
colour for the light and for the dark scheme. Lines also differ by their dashes, so that colour is never alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

DASHES = {
    "own": "",
    "a": "7 3",
    "b": "2 3",
    "c": "9 3 2 3",
    "d": "4 2",
    "e": "7 2 2 2 2 2",
    "f": "5 3",
    "g": "2 2",
    "h": "10 2",
    "i": "9 2 5 2",
    "j": "3 3",
    "k": "6 2 2 2",
    "l": "4 4",
    "random": "1 3",
    "full": "12 4",
}

_WIDTH, _HEIGHT = 480, 300
FEW_POINTS = 8
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 14, 40


@dataclass(frozen=True)
class Series:
    """One line: the mean over seeds at each epoch and the band around it."""

    label: str
    slot: str
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Axis:
    """The horizontal axis.

    Attributes:
        label: Word under it.
        log: Whether equal steps are equal factors; all values are above 0 then.
        text: What stands at a tick.
    """

    label: str = "epoch"
    log: bool = False
    text: Callable[[float], str] = "{:g}".format

    def at(self, value: float) -> float:
        """Where a value is, in units in which the axis is straight."""
        return math.log10(value) if self.log else value

    def ticks(self, low: float, high: float) -> list[float]:
        """Values to mark between two: whole numbers; of a logarithmic axis at most six round ones, else its ends."""
        if not self.log:
            return [v for v in ticks(low, high) if float(v).is_integer()] or [low]
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1,)):
            found = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
            if len(found) <= 6:
                break
        return found[:: max(1, -(-len(found) // 6))] or sorted({low, high})


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round tick values (1, 2 or 5 times a power of ten apart) that lie within [low, high]."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= wanted)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _limits(series: Sequence[Series], floor: float | None, ceiling: float | None) -> tuple[float, float]:
    low = min(min(s.low) for s in series)
    high = max(max(s.high) for s in series)
    pad = 0.06 * (high - low) or max(abs(high) * 0.1, 0.5)
    low, high = low - pad, high + pad
    if floor is not None:
        low = max(low, floor)
    if ceiling is not None:
        high = min(high, ceiling)
    return (low, high) if high > low else (low, low + 1.0)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    axis: Axis = Axis(),
    unit: str = "",
    floor: float | None = None,
    ceiling: float | None = None,
) -> Markup:
    """Draw mean lines with seed bands.

    Args:
        series: lines in order of importance; the first one is drawn last, on top.
        title: the chart's accessible name.
        axis: the horizontal one.
        unit: put behind the labels of the vertical axis.
        floor: lowest value the vertical axis may show.
        ceiling: highest value the vertical axis may show.

    Returns:
        One <svg> element, or an empty string where no series has a point.
    """
    series = [s for s in series if len(s.x) > 0]
    if not series:
        return Markup("")
    y_low, y_high = _limits(series, floor, ceiling)
    x_first, x_last = min(min(s.x) for s in series), max(max(s.x) for s in series)
    x_low, x_high = axis.at(x_first), axis.at(x_last)
    if x_high <= x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5

    def px(x: float) -> float:
        return _LEFT + (axis.at(x) - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        y = min(max(y, y_low), y_high)
        return _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    ends = "; ".join(f"{s.label} ends at {s.mean[-1]:.4g}{unit}" for s in series)
    name = escape(f"{title}. {ends}.")
    out = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">']
    out += [_y_tick(value, py(value), unit) for value in ticks(y_low, y_high)]
    out += [_under_axis(axis.text(value), px(value), _BOTTOM - 18) for value in axis.ticks(x_first, x_last)]
    out.append(_under_axis(axis.label, (_LEFT + _WIDTH - _RIGHT) / 2, 4))
    out += [_band(s, px, py) for s in reversed(series)]
    out += [_line(s, px, py) for s in reversed(series)]
    out += [_dot(s, px(x), py(y)) for s in reversed(series) for x, y in _marked(s)]
    out.append("</svg>")
    return Markup("".join(out))


def _y_tick(value: float, y: float, unit: str) -> str:
    """A line across the chart, and its value before it."""
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}{escape(unit)}</text>'
    )


def _under_axis(text: str, x: float, above_bottom: int) -> str:
    y = _HEIGHT - above_bottom
    return f'<text class="tick" x="{x:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>'


def _band(s: Series, px: Callable[[float], float], py: Callable[[float], float]) -> str:
    if all(low == high for low, high in zip(s.low, s.high, strict=True)):
        return ""
    upper = [f"{px(x):.1f},{py(y):.1f}" for x, y in zip(s.x, s.high, strict=True)]
    lower = [f"{px(x):.1f},{py(y):.1f}" for x, y in zip(s.x, s.low, strict=True)]
    return f'<polygon class="band s-{s.slot}" points="{" ".join(upper + lower[::-1])}"/>'


def _line(s: Series, px: Callable[[float], float], py: Callable[[float], float]) -> str:
    name = f"<title>{escape(s.label)}</title>"
    if len(s.x) == 1:
        return _dot(s, px(s.x[0]), py(s.mean[0]), name)
    points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(s.x, s.mean, strict=True))
    dash = DASHES.get(s.slot, "")
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline class="line s-{s.slot}" points="{points}"{dashed}>{name}</polyline>'


def _marked(s: Series) -> list[tuple[float, float]]:
    """The points of a line that has so few that each is told apart."""
    return list(zip(s.x, s.mean, strict=True)) if 1 < len(s.x) <= FEW_POINTS else []


def _dot(s: Series, x: float, y: float, inside: str = "") -> str:
    return f'<circle class="dot s-{s.slot}" cx="{x:.1f}" cy="{y:.1f}" r="4">{inside}</circle>'


def legend_sample(slot: str) -> Markup:
    """A short piece of a series' line, for the legend (decorative: the name stands beside it)."""
    dash = DASHES.get(slot, "")
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return Markup(
        '<svg class="sample" viewBox="0 0 28 10" aria-hidden="true">'
        f'<line class="line s-{slot}" x1="1" x2="27" y1="5" y2="5"{dashed}/></svg>'
    )


def dot_whisker(mean: float, std: float | None, low: float, high: float, slot: str) -> Markup:
    """A dot at the mean with a whisker of one standard deviation on the axis [low, high] (decorative)."""
    width, height, edge = 150, 16, 6

    def px(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return edge + min(max(share, 0.0), 1.0) * (width - 2 * edge)

    whisker = ""
    if std:
        whisker = f'<line class="whisker s-{slot}" x1="{px(mean - std):.1f}" x2="{px(mean + std):.1f}" y1="8" y2="8"/>'
    return Markup(
        f'<svg class="strip" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<line class="grid" x1="{edge}" x2="{width - edge}" y1="8" y2="8"/>{whisker}'
        f'<circle class="dot s-{slot}" cx="{px(mean):.1f}" cy="8" r="4"/></svg>'
    )
