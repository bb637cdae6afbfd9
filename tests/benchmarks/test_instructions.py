"""The gate of the hot path: it holds, and it notices what it is there for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import instructions
from benchmarks.instructions import Budget, GateError, count, judge, read_budget, this_build
from benchmarks.parts import PARTS, REFERENCE

COUNTS = {REFERENCE: 1000.0, "xki-encode": 200.0, "perform": 400.0}
RECORDED = Budget(
    this_build(), instructions._libraries(), {REFERENCE: 1.0, "xki-encode": 0.2, "perform": 0.4}
)
ELSEWHERE = replace(RECORDED, build="2.7.18, a machine, a compiler")

# Half a minute on two cores of its own, much longer where other tests run at the same time.
counts_instructions = pytest.mark.timeout(400)


def slower(part: str, factor: float) -> Mapping[str, float]:
    return {**COUNTS, part: COUNTS[part] * factor}


# ---- the gate itself ----------------------------------------------------------------------------


@counts_instructions
def test_the_hot_path_keeps_within_its_budget() -> None:
    good, table = judge(count(list(PARTS)), read_budget())
    assert good, f"\n{table}"


@counts_instructions
def test_a_slower_part_is_noticed() -> None:
    counts = count(["xki-authenticate"], planted="xki-authenticate")
    good, table = judge(counts, read_budget())
    assert not good
    assert "xki-authenticate" in table
    assert "OVER" in table


# ---- its judgement ------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 0.96, 1.0, 1.029])
def test_within_the_budget(factor: float) -> None:
    good, table = judge(slower("perform", factor), RECORDED)
    assert good
    assert "OVER" not in table


def test_over_the_budget() -> None:
    good, table = judge(slower("perform", 1.031), RECORDED)
    assert not good
    line = next(line for line in table.splitlines() if line.startswith("perform"))
    assert line.split() == ["perform", "412", "0.412", "0.400", "+3.1%", "OVER"]
    assert "over the budget by more than 3%" in table


def test_what_has_become_cheaper_is_to_be_recorded() -> None:
    _, table = judge(slower("perform", 0.9), RECORDED)
    assert "--record" in table


@pytest.mark.parametrize(("factor", "good"), [(1.14, True), (1.16, False)])
def test_another_build_of_python_has_a_wider_tolerance(factor: float, good: bool) -> None:
    judged, table = judge(slower("perform", factor), ELSEWHERE)
    assert judged is good
    assert ELSEWHERE.build in table
    assert "the tolerance is therefore 15% instead of 3%" in table


def test_another_library_is_named_when_a_part_is_over() -> None:
    budget = replace(RECORDED, libraries={"aiohttp": "0.1"})
    _, table = judge(slower("perform", 1.2), budget)
    assert "recorded with aiohttp 0.1" in table


def test_a_part_without_a_budget_fails() -> None:
    good, table = judge({**COUNTS, "audit": 1.0}, RECORDED)
    assert not good
    assert "NOT RECORDED" in table


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.1, 1)])
def test_the_exit_status(
    factor: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["instructions"])
    monkeypatch.setattr(instructions, "count", lambda _: slower("perform", factor))
    monkeypatch.setattr(instructions, "read_budget", lambda: RECORDED)
    assert instructions.main() == status
    assert ("OVER" in capsys.readouterr().out) is bool(status)


# ---- the file -----------------------------------------------------------------------------------


@pytest.fixture
def budget_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "budget.json"
    path.write_text("[]")
    monkeypatch.setattr(instructions, "BUDGET", path)
    return path


def test_recording_leaves_other_builds_alone(budget_file: Path) -> None:
    other = {"build": ELSEWHERE.build, "libraries": {}, "ratios": {"perform": 9.0}}
    budget_file.write_text(json.dumps([other]))
    assert read_budget().build == ELSEWHERE.build
    instructions.record(COUNTS)
    assert other in json.loads(budget_file.read_text())
    budget = read_budget()
    assert (budget.build, budget.ratios) == (this_build(), RECORDED.ratios)


def test_no_budget_at_all(budget_file: Path) -> None:
    with pytest.raises(GateError, match="--record"):
        read_budget()


def test_every_recorded_build_has_all_parts() -> None:
    for entry in json.loads(instructions.BUDGET.read_text()):
        assert list(entry["ratios"]) == list(PARTS)


def test_a_counter_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(GateError, match="valgrind is not installed"):
        count([REFERENCE])
