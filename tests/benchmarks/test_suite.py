"""The benchmark's table, comparison and plots, from canned results and from a very short run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import suite
from benchmarks.load.results import LoadError, LoadResult
from benchmarks.scenarios import SCENARIOS, Figure, Outcome, Pace


def results(*figures: Figure, date: str = "2026-01-02T03:04:05") -> dict[str, Any]:
    entry = {"figures": [f.to_json() for f in figures], "curves": {}, "failures": {}}
    return {"machine": {}, "date": date, "scenarios": {"one": entry}}


@pytest.mark.parametrize(
    ("rounds", "wanted", "met"),
    [
        ([0.5, 0.7, 0.6], ">= 0.60", True),
        ([0.5, 0.7, 0.59], ">= 0.60", False),
        ([5.0], "<= 5", True),
        ([5.1], "<= 5", False),
        ([0.0], "<= 0", True),
        ([1.0], "", None),
    ],
)
def test_the_median_of_the_rounds_counts(rounds: list[float], wanted: str, met: bool) -> None:
    assert Figure("x", rounds, wanted).is_met is met


def test_the_table_shows_what_was_missed() -> None:
    text = suite.table(
        results(
            Figure("good", [0.7, 0.8], ">= 0.60", "a remark"),
            Figure("bad", [9.0], "<= 5"),
            Figure("plain", [1.0]),
        )
    )
    lines = text.splitlines()
    assert lines[1].split() == ["good", "0.75", "0.70", "to", "0.80", ">=", "0.60", "reached"]
    assert lines[2].split() == ["bad", "9.00", "<=", "5", "MISSED"]
    assert lines[3].split() == ["plain", "1.00"]
    assert "good: a remark" in text


def test_two_results_side_by_side() -> None:
    before = results(Figure("a", [2.0]), Figure("gone", [1.0]))
    after = results(Figure("a", [3.0]), Figure("new", [1.0]), date="2026-02-03T00:00:00")
    lines = suite.compare(before, after).splitlines()
    assert lines[0].split() == ["2026-01-02", "2026-02-03", "change"]
    assert lines[1].split() == ["a", "2.00", "3.00", "+50.0", "%"]
    assert len(lines) == 2


def test_what_a_flood_leaves_over_is_no_failure_and_all_else_is() -> None:
    outcome = Outcome()
    outcome.count(LoadResult(errors={"never sent": 5, "no answer": 2}), flood=True)
    outcome.count(LoadResult(errors={"429 TooManyRequests": 5, "503 X": 1}), flood=True)
    assert outcome.failures == {}
    outcome.count(LoadResult(errors={"504 Timeout": 1}), flood=True)
    assert outcome.failures == {"504 Timeout": 1}
    assert [load["errors"] for load in outcome.loads][-1] == {"504 Timeout": 1}
    outcome.failures.clear()
    outcome.count(LoadResult(errors={"never sent": 5, "500 X": 1}, wrong=2))
    assert outcome.failures == {"never sent": 5, "500 X": 1, "wrong plaintext": 2}


def test_plots(tmp_path: Path) -> None:
    canned = results()
    canned["scenarios"]["curves"] = {
        "figures": [],
        "failures": {},
        "curves": {
            "throughput: bare": [(1.0, 10.0), (4.0, 20.0)],
            "latency: p99": [(100.0, 1.0), (200.0, 2.0)],
        },
    }
    drawn = suite.plot(canned, tmp_path / "plots")
    assert [file.name for file in drawn] == ["throughput.png", "latency.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in drawn)
    assert suite.plot(results(), tmp_path) == []


def test_a_scenario_that_cannot_be_finished_takes_nothing_from_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def works(_: Pace) -> Outcome:
        return Outcome([Figure("good", [1.0])])

    async def fails(_: Pace) -> Outcome:
        raise LoadError("the server has gone")

    monkeypatch.setattr(suite, "SCENARIOS", {"a": fails, "b": works})
    found = asyncio.run(suite.run_suite(["a", "b"], Pace(0.1, 1, 1, 0.1, 1)))
    assert suite.failures(found) == {"a": {"not finished: the server has gone": 1}}
    assert "good" in suite.table(found)


def test_a_short_run(tmp_path: Path) -> None:
    """Real servers and loads; the figures are there, whatever they are."""
    pace = Pace(0.3, 1, 1000, 0.3, 1)
    found = asyncio.run(suite.run_suite(["software-vs-bare", "xks-vs-xki"], pace))
    assert suite.failures(found) == {}
    suite.write(found, tmp_path / "run" / "results.json")
    read = json.loads((tmp_path / "run" / "results.json").read_text())
    figures = [f for entry in read["scenarios"].values() for f in entry["figures"]]
    ratios = [figure["value"] for figure in figures if "change" not in figure["name"]]
    assert len(ratios) == 2
    assert min(ratios) > 0
    assert len(figures) == 3
    assert set(read["scenarios"]) < set(SCENARIOS)


def test_of_many_rounds_the_middle_half_is_shown() -> None:
    few, many = Figure("few", [1.0, 2.0, 9.0]), Figure("many", [0.1, *[1.0] * 9, 2.0, 9.0])
    entry = {"figures": [few.to_json(), many.to_json()]}
    said = suite.table({"scenarios": {"one": entry}})
    assert "1.00 to 9.00" in said
    assert "1.00 to 1.00 (half of 12)" in said
