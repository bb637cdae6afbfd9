"""Running scenarios, and what is printed, written and drawn of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.load.results import LoadError
from benchmarks.scenarios import SCENARIOS, Outcome, Pace

_MANY = 12


async def run_suite(names: Sequence[str], pace: Pace) -> dict[str, Any]:
    """Run scenarios and return everything as JSON has it; progress goes to standard error.

    One that cannot be finished is a failure, and the others are run all the same.
    """
    done: dict[str, Any] = {}
    for position, name in enumerate(names, 1):
        print(f"{position}/{len(names)} {name}", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            outcome = await SCENARIOS[name](pace)
        except LoadError as error:
            print(f"  {name} failed: {error}", file=sys.stderr, flush=True)
            outcome = Outcome(failures={f"not finished: {error}": 1})
        done[name] = {
            "figures": [figure.to_json() for figure in outcome.figures],
            "curves": outcome.curves,
            "failures": outcome.failures,
            "loads": outcome.loads,
            "seconds": round(time.monotonic() - began, 1),
        }
    return {
        "machine": {
            "cpus": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "system": platform.system(),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "scenarios": done,
    }


def failures(results: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Wrong answers and errors, by scenario."""
    found = {name: entry["failures"] for name, entry in results["scenarios"].items()}
    return {name: kinds for name, kinds in found.items() if kinds}


def table(results: dict[str, Any]) -> str:
    """A line for each figure: measured, how far its rounds went, wanted, reached or not."""
    rows = [("", "measured", "rounds", "target", "")]
    remarks = []
    for entry in results["scenarios"].values():
        for figure in entry["figures"]:
            reached = {True: "reached", False: "MISSED", None: ""}[figure["met"]]
            spread = _spread(figure["rounds"])
            row = (figure["name"], f"{figure['value']:.2f}", spread, figure["wanted"], reached)
            rows.append(row)
            if figure["remark"]:
                remarks.append(f"{figure['name']}: {figure['remark']}")
    return "\n".join([*_aligned(rows), "", *remarks]).rstrip()


def _spread(rounds: Sequence[float]) -> str:
    """From the lowest to the highest; of many the middle half, since some are always disturbed."""
    if len(rounds) < 2:
        return ""
    if len(rounds) < _MANY:
        return f"{min(rounds):.2f} to {max(rounds):.2f}"
    low, _, high = statistics.quantiles(rounds, n=4)
    return f"{low:.2f} to {high:.2f} (half of {len(rounds)})"


def compare(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Two results side by side, with the change in percent."""
    rows = [("", one["date"][:10], other["date"][:10], "change")]
    values = _values(other)
    for name, value in _values(one).items():
        if name in values:
            change = f"{100 * (values[name] / value - 1):+.1f} %" if value else ""
            rows.append((name, f"{value:.2f}", f"{values[name]:.2f}", change))
    return "\n".join(_aligned(rows))


def _values(results: dict[str, Any]) -> dict[str, float]:
    figures = [f for entry in results["scenarios"].values() for f in entry["figures"]]
    return {figure["name"]: figure["value"] for figure in figures}


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def write(results: dict[str, Any], file: Path) -> None:
    """Everything, as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")


def plot(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the curves as PNG files; returns them."""
    import matplotlib  # noqa: PLC0415 - slow to load

    matplotlib.use("Agg")
    drawn: list[Path] = []
    entry = results["scenarios"].get("curves")
    if entry is None:
        return drawn
    labels = {
        "throughput": ("connections", "requests a second", "Throughput over TLS"),
        "latency": ("offered requests a second", "ms from the intended time",
                    "Latency over TLS, SoftHSM"),
    }  # fmt: skip
    for kind, (x_label, y_label, title) in labels.items():
        lines = {n.partition(": ")[2]: p for n, p in entry["curves"].items() if n.startswith(kind)}
        drawn.append(_draw(lines, x_label, y_label, title, folder / f"{kind}.png"))
    return drawn


def _draw(
    lines: dict[str, list[tuple[float, float]]], x_label: str, y_label: str, title: str, file: Path
) -> Path:
    from matplotlib import pyplot  # noqa: PLC0415 - slow to load

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    if x_label == "connections":
        axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return file
