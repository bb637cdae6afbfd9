"""Draws a dashboard as a picture: its panels at their places, filled by a Prometheus.

For where no Grafana is at hand. It knows the kinds of panels and units that `grafana/source` uses,
and shows all instances, key stores and KMIs.

Example: `python -m grafana.draw grafana/dashboards/xkiproxy-kmi.json --minutes 30 --output kmi.png`
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from grafana.prometheus import ask

REMARK = "drawn from the dashboard's expressions by grafana/draw.py, not by Grafana"

COLOURS = {"green": "#73bf69", "yellow": "#fade2a", "red": "#f2495c", "blue": "#5794f2"}
_LINES = (
    "#73bf69", "#f2cc0c", "#5794f2", "#ff780a", "#f2495c",
    "#8ab8ff", "#b877d9", "#37872d", "#fa6400", "#c4162a",
)  # fmt: skip
_BACKGROUND, _PANEL, _GRID, _TEXT, _FAINT = "#111217", "#181b1f", "#2c3037", "#ccccdc", "#8e8e9b"

_COLUMNS, _WIDTH, _CELL, _GAP = 24, 1440, 36, 8  # as Grafana counts; the others in pixels
_DPI = 100
_LEGEND_LINE, _LEGEND_LINES = 15, 4
_POINTS = 500

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Span:
    """What is asked: from `start` to `end` (Unix time), scraped every `scrape` seconds."""

    url: str
    start: float
    end: float
    scrape: float

    @property
    def step(self) -> float:
        """Seconds between two points."""
        return max(self.scrape, (self.end - self.start) / _POINTS)

    @property
    def times(self) -> Numbers:
        """Of all points."""
        return np.arange(self.start, self.end, self.step)

    def fill(self, expression: str) -> str:
        """An expression with Grafana's variables filled in; "all" for those of the dashboard."""
        rate = max(self.step + self.scrape, 4 * self.scrape)  # as Grafana's documentation says
        known = {
            "__rate_interval": f"{math.ceil(rate)}s",
            "__range": f"{math.ceil(self.end - self.start)}s",
            "namespace": ".*", "job": ".*", "instance": ".*", "keystore": ".*", "kmi": ".*",
        }  # fmt: skip
        return re.sub(r"\$(\w+)", lambda found: known[found[1]], expression)


@dataclass(frozen=True, slots=True)
class Series:
    """One line: what stands in the legend, its labels, a value for each time of the span."""

    name: str
    labels: dict[str, str]
    values: Numbers

    @property
    def last(self) -> float:
        """The last value that is one; NaN if none is."""
        there = self.values[np.isfinite(self.values)]
        return float(there[-1]) if there.size else math.nan


def series_of(panel: dict[str, Any], span: Span) -> list[Series]:
    """What the panel's expressions say; gaps are NaN. Raises PrometheusError."""
    found = []
    for target in panel["targets"]:
        data = ask(
            span.url, "query_range", query=span.fill(target["expr"]),
            start=str(span.start), end=str(span.end), step=str(span.step),
        )  # fmt: skip
        for result in data["result"]:
            values = np.full(len(span.times), math.nan)
            for when, text in result["values"]:
                values[min(round((when - span.start) / span.step), len(values) - 1)] = float(text)
            labels = result["metric"]
            name = _name(target["legendFormat"], labels)
            found.append(Series(name, labels, values))
    return found


def _name(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), legend)


# ---- units -------------------------------------------------------------------------------------


def _scaled(value: float, steps: tuple[tuple[float, str], ...]) -> str:
    size, name = next((step for step in steps if abs(value) >= step[0]), steps[-1])
    return f"{value / size:.3g}{name}"


_SECONDS = (
    (31557600, " years"), (86400, " days"), (3600, " hours"), (60, " min"),
    (1, " s"), (1e-3, " ms"), (1e-6, " µs"),
)  # fmt: skip
_COUNTS = ((1e9, " G"), (1e6, " M"), (1e3, " K"), (1, ""), (1e-3, " m"))

UNITS: dict[str, Callable[[float], str]] = {
    "s": lambda value: _scaled(value, _SECONDS),
    "reqps": lambda value: f"{value:.3g} req/s" if value < 1e3 else f"{value / 1e3:.3g}K req/s",
    "ops": lambda value: f"{value:.3g} ops/s" if value < 1e3 else f"{value / 1e3:.3g}K ops/s",
    "percentunit": lambda value: f"{100 * value:.4g}%",
    "short": lambda value: _scaled(value, _COUNTS),
}


def _defaults(panel: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = panel.get("fieldConfig", {}).get("defaults", {})
    return found


def shown(value: float, panel: dict[str, Any]) -> str:
    """A value in the panel's unit, with its decimals. Raises ValueError for an unknown unit."""
    defaults = _defaults(panel)
    unit = defaults.get("unit") or panel["options"].get("yAxis", {}).get("unit", "short")
    if unit not in UNITS:
        raise ValueError(f"panel {panel['title']!r}: the unit {unit!r} is none of {list(UNITS)}")
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0%" if unit == "percentunit" else "0"
    if unit == "percentunit" and "decimals" in defaults:
        return f"{100 * value:.{defaults['decimals']}f}%"
    return UNITS[unit](value)


def _steps(panel: dict[str, Any]) -> list[tuple[float, str]]:
    steps = _defaults(panel).get("thresholds", {}).get("steps", [])
    return [
        (-math.inf if step["value"] is None else step["value"], COLOURS[step["color"]])
        for step in steps
    ]


def _colour(value: float, panel: dict[str, Any]) -> str:
    return [_FAINT, *(colour for least, colour in _steps(panel) if value >= least)][-1]


# ---- panels ------------------------------------------------------------------------------------
# Each fills the inside of a panel, and is given axes in pixels of it.


@dataclass(frozen=True, slots=True)
class Place:
    """The inside of a panel in a figure: left, bottom, width and height in pixels."""

    figure: Figure
    x: float
    y: float
    w: float
    h: float

    def axes(self, left: float = 0, bottom: float = 0, right: float = 0, top: float = 0) -> Axes:
        """Axes with these margins."""
        width, height = self.figure.get_size_inches() * _DPI
        return self.figure.add_axes(
            (
                (self.x + left) / width, (self.y + bottom) / height,
                (self.w - left - right) / width, (self.h - bottom - top) / height,
            ),
            facecolor="none",
        )  # fmt: skip

    def text(self, x: float, y: float, text: str, **options: Any) -> None:
        """A text, from the lower left corner on."""
        width, height = self.figure.get_size_inches() * _DPI
        options = {"color": _TEXT, "size": 8, **options}
        self.figure.text((self.x + x) / width, (self.y + y) / height, text, **options)


def _over_time(axes: Axes, span: Span) -> None:
    axes.set_xlim(span.start, span.end)
    every = next(s for s in (10, 30, 60, 300, 900, 3600, 86400) if 7 * s >= span.end - span.start)
    ticks = np.arange(math.ceil(span.start / every) * every, span.end, every)
    labels = [f"{datetime.fromtimestamp(tick, UTC):%H:%M:%S}" for tick in ticks]
    axes.set_xticks(ticks, labels)
    axes.tick_params(colors=_FAINT, labelsize=7, length=0)
    axes.spines[:].set_visible(False)


def _time_series(panel: dict[str, Any], found: list[Series], span: Span, place: Place) -> None:
    custom, top = _defaults(panel)["custom"], 0.0
    columns = 2 if place.w > _WIDTH / 3 or len(found) > _LEGEND_LINES else 1
    lines = min(math.ceil(len(found) / columns), _LEGEND_LINES)
    axes = place.axes(left=64, bottom=24 + _LEGEND_LINE * (lines + 1), right=8, top=4)
    base = np.zeros(len(span.times))
    for number, one in enumerate(found):
        values, under = one.values, np.zeros(len(span.times))
        if custom.get("stacking", {}).get("mode") == "normal":
            values, under = base + np.nan_to_num(values), base
            base = values
        colour = _LINES[number % len(_LINES)]
        axes.plot(span.times, values, color=colour, linewidth=1.1)
        axes.fill_between(
            span.times, under, values, color=colour, alpha=custom["fillOpacity"] / 100, linewidth=0
        )
        top = max(top, np.nanmax(values, initial=0.0, where=np.isfinite(values)))
    axes.set_ylim(0, _defaults(panel).get("max") or 1.1 * top or 1)
    for least, colour in _steps(panel):
        if 0 < least < axes.get_ylim()[1]:
            axes.axhline(least, color=colour, linewidth=0.9, linestyle=(0, (6, 4)))
    ticks = axes.get_yticks()[::2] if len(axes.get_yticks()) > 7 else axes.get_yticks()
    axes.set_yticks(
        [tick for tick in ticks if tick <= axes.get_ylim()[1]],
        [shown(tick, panel) for tick in ticks if tick <= axes.get_ylim()[1]],
    )
    axes.grid(color=_GRID, linewidth=0.6)
    _over_time(axes, span)
    _legend(panel, found, place, columns, lines)


def _legend(
    panel: dict[str, Any], found: list[Series], place: Place, columns: int, lines: int
) -> None:
    width = place.w / columns
    for column in range(columns):
        for text, x in (("last", width - 84), ("max", width - 22)):
            place.text(
                column * width + x, _LEGEND_LINE * lines + 3, text, size=7, color=_FAINT, ha="right"
            )
    for number, one in enumerate(found[: columns * lines]):
        x, y = number // lines * width, _LEGEND_LINE * (lines - 1 - number % lines) + 3
        place.text(x + 6, y, "━", color=_LINES[number % len(_LINES)], size=8)
        place.text(x + 24, y, one.name, size=7.5)
        place.text(x + width - 84, y, shown(one.last, panel), size=7.5, ha="right")
        most = np.nanmax(one.values, initial=-math.inf, where=np.isfinite(one.values))
        place.text(x + width - 22, y, shown(float(most), panel), size=7.5, ha="right")
    if len(found) > columns * lines:
        more = f"{len(found) - columns * lines} more are drawn"
        place.text(6, _LEGEND_LINE * lines + 3, more, size=7, color=_FAINT)


def _stat(panel: dict[str, Any], found: list[Series], span: Span, place: Place) -> None:
    (one,) = found
    colour = _colour(one.last, panel)
    axes = place.axes(top=0.6 * place.h)
    axes.fill_between(span.times, one.values, color=colour, alpha=0.2, linewidth=0)
    axes.plot(span.times, one.values, color=colour, linewidth=1)
    axes.set_xlim(span.start, span.end)
    axes.set_axis_off()
    middle = {"ha": "center", "va": "center"}
    text = shown(one.last, panel)
    place.text(place.w / 2, 0.58 * place.h, text, size=22, color=colour, weight="bold", **middle)


def _bars(panel: dict[str, Any], found: list[Series], _span: Span, place: Place) -> None:
    most = max((one.last for one in found), default=0.0)
    most = max([most, *(least for least, _ in _steps(panel))]) or 1.0
    height = min(36.0, place.h / max(1, len(found)))
    axes = place.axes(left=0.3 * place.w, right=0.25 * place.w)
    axes.set_xlim(0, most)
    axes.set_ylim(-place.h / height, 0)
    for number, one in enumerate(found):
        colour = _colour(one.last, panel)
        axes.barh(-number - 0.5, most, 0.7, color=_GRID)
        axes.barh(-number - 0.5, one.last, 0.7, color=colour, alpha=0.8)
        y = place.h - (number + 0.5) * height
        place.text(0.29 * place.w, y, one.name, ha="right", va="center")
        text = shown(one.last, panel)
        place.text(0.77 * place.w, y, text, color=colour, va="center", size=11, weight="bold")
    axes.set_axis_off()


def _timeline(panel: dict[str, Any], found: list[Series], span: Span, place: Place) -> None:
    (mapping,) = _defaults(panel)["mappings"]
    names = mapping["options"]
    axes = place.axes(left=150, bottom=44, right=8, top=4)
    for number, one in enumerate(found):
        for value, name in names.items():
            there = np.append(one.values == float(value), [False]).astype(int)
            edges = np.diff(there, prepend=0)
            for first, end in zip(
                np.flatnonzero(edges > 0), np.flatnonzero(edges < 0), strict=True
            ):
                span_of = [(span.times[first], (end - first) * span.step)]
                axes.broken_barh(
                    span_of, (-number - 0.9, 0.8), color=COLOURS[name["color"]], alpha=0.8
                )
    axes.set_ylim(-max(1, len(found)), 0)
    axes.set_yticks([-number - 0.5 for number in range(len(found))], [one.name for one in found])
    _over_time(axes, span)
    for number, name in enumerate(names.values()):
        place.text(150 + 110 * number, 6, "■", color=COLOURS[name["color"]])
        place.text(164 + 110 * number, 6, name["text"])


def _heatmap(panel: dict[str, Any], found: list[Series], span: Span, place: Place) -> None:
    ordered = sorted(found, key=lambda one: float(one.labels["le"]))
    counts = np.diff([one.values for one in ordered], axis=0, prepend=0)
    axes = place.axes(left=64, bottom=30, right=8, top=4)
    colours = colormaps["Spectral_r"].with_extremes(bad=_PANEL)
    shades = np.ma.masked_where(~(counts > 1e-9), counts)
    axes.pcolormesh(
        span.times, np.arange(len(ordered)) + 0.5, shades, cmap=colours, shading="nearest"
    )
    labels = [float(one.labels["le"]) for one in ordered]
    texts = ["more" if math.isinf(label) else shown(label, panel) for label in labels]
    every = max(1, len(texts) // 8)
    axes.set_yticks(np.arange(1, len(texts) + 1)[::every], texts[::every])
    axes.grid(axis="y", color=_GRID, linewidth=0.4)
    _over_time(axes, span)


KINDS: dict[str, Callable[[dict[str, Any], list[Series], Span, Place], None]] = {
    "timeseries": _time_series,
    "stat": _stat,
    "bargauge": _bars,
    "state-timeline": _timeline,
    "heatmap": _heatmap,
}


# ---- the whole ---------------------------------------------------------------------------------


def draw(board: dict[str, Any], span: Span, rows: Collection[str] = ()) -> Figure:
    """A dashboard as a figure; `rows` are the titles of those to draw, all if there are none.

    Raises:
        ValueError: a kind of panel or a unit that is not known here; it names both.
        PrometheusError: an expression has no answer.
    """
    chosen, lowest = _chosen(board, rows)
    height = _CELL * lowest + 40
    figure = Figure(figsize=(_WIDTH / _DPI, height / _DPI), dpi=_DPI, facecolor=_BACKGROUND)
    whole = Place(figure, 0, 0, _WIDTH, height)
    whole.text(_GAP, height - 26, board["title"], size=13, weight="bold")
    whole.text(_WIDTH - _GAP, height - 24, REMARK, color=_FAINT, ha="right")
    for panel, y in chosen:
        grid = panel["gridPos"]
        top = height - 40 - _CELL * y
        if panel["type"] == "row":
            whole.text(_GAP, top - 24, panel["title"], size=10, weight="bold")
            continue
        cell = _WIDTH / _COLUMNS
        _draw_panel(panel, span, Place(
            figure, grid.get("x", 0) * cell + _GAP / 2, top - _CELL * grid["h"] + _GAP / 2,
            grid["w"] * cell - _GAP, _CELL * grid["h"] - _GAP,
        ))  # fmt: skip
    return figure


def _chosen(
    board: dict[str, Any], rows: Collection[str]
) -> tuple[list[tuple[dict[str, Any], int]], int]:
    """The panels of these rows with how far down each is drawn, and where the last one ends."""
    chosen: list[tuple[dict[str, Any], int]] = []
    wanted, shift, lowest = True, 0, 0
    for panel in board["panels"]:
        y = panel["gridPos"].get("y", 0)
        if panel["type"] == "row":
            wanted = not rows or panel["title"] in rows
            shift = y - lowest
        if wanted:
            chosen.append((panel, y - shift))
            lowest = max(lowest, y - shift + panel["gridPos"]["h"])
    return chosen, lowest


def _draw_panel(panel: dict[str, Any], span: Span, place: Place) -> None:
    if panel["type"] not in KINDS:
        kind = panel["type"]
        raise ValueError(f"panel {panel['title']!r}: the type {kind!r} is none of {list(KINDS)}")
    whole = place.axes()
    whole.set_axis_off()
    whole.add_patch(Rectangle((0, 0), 1, 1, facecolor=_PANEL, edgecolor=_GRID))
    place.text(8, place.h - 18, panel["title"], size=9, weight="bold")
    found = series_of(panel, span)
    inside = Place(place.figure, place.x, place.y + 4, place.w, place.h - 28)
    if any(math.isfinite(one.last) for one in found):
        KINDS[panel["type"]](panel, found, span, inside)
    else:
        shown(0, panel)  # an unknown unit is an error all the same
        inside.text(place.w / 2, inside.h / 2, "No data", color=_FAINT, size=11, ha="center")


def save(figure: Figure, path: Path) -> None:
    """As a PNG of 256 colours."""
    figure.savefig(path)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def main(
    dashboard: Annotated[Path, typer.Argument(help="Of grafana/dashboards.")],
    output: Annotated[Path, typer.Option(help="The PNG to write.")],
    prometheus: Annotated[str, typer.Option(help="Its address.")] = "http://127.0.0.1:9090",
    minutes: Annotated[float, typer.Option(help="How far back.")] = 60.0,
    scrape: Annotated[float, typer.Option(help="Seconds between two scrapes.")] = 15.0,
    row: Annotated[list[str] | None, typer.Option(help="Only this row; may be repeated.")] = None,
) -> None:
    """Draw a dashboard from what a Prometheus has."""
    now = time.time()
    span = Span(prometheus, now - 60 * minutes, now, scrape)
    save(draw(json.loads(dashboard.read_text()), span, row or ()), output)


if __name__ == "__main__":
    typer.run(main)
