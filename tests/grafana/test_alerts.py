"""The rules by promtool: each alert fires when it should and only then; each has its section."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from boards import ROOT, RULES, rules, without_thresholds

TESTS = sorted((ROOT / "grafana" / "rules" / "tests").glob("*.yml"))
RUNBOOK = ROOT / "docs" / "runbook.md"
ALERTS = {rule["alert"]: rule for rule in rules("alert")}

_TESTED = re.compile(r'alertname="(\w+)"')
_PARTS = ("**Meaning.**", "**Likely causes.**", "**Look at.**", "**Do.**")


def promtool(*arguments: str) -> None:
    done = subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_valid() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", *map(str, RULES))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should(path: Path) -> None:
    promtool("test", "rules", str(path))


def test_each_alert_is_shown_firing_and_silent() -> None:
    shown: dict[str, set[bool]] = {name: set() for name in ALERTS}
    for path in TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for asked in test["promql_expr_test"]:
                (name,) = _TESTED.findall(asked["expr"])
                shown[name].add(bool(asked["exp_samples"]))
    assert {name for name, outcomes in shown.items() if outcomes != {True, False}} == set()


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_to_do(name: str) -> None:
    rule: dict[str, Any] = ALERTS[name]
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    texts = rule["annotations"]
    assert set(texts) == {"summary", "description", "runbook_url"}
    page, _, anchor = texts["runbook_url"].partition("#")
    assert page.endswith("/docs/runbook.md")
    assert anchor == name.lower()
    sections = re.split(r"^## ", RUNBOOK.read_text(), flags=re.MULTILINE)
    (section,) = [text for text in sections if text.partition("\n")[0] == name]
    assert [part for part in _PARTS if section.count(part) != 1] == []


def test_the_runbook_has_no_section_of_an_alert_that_is_no_more() -> None:
    titles = re.findall(r"^## (Xkiproxy\w+)$", RUNBOOK.read_text(), flags=re.MULTILINE)
    assert sorted(titles) == sorted(ALERTS)


def test_thresholds_are_found() -> None:
    """What `test_prometheus` asks of an alert compares nothing any more."""
    for name, rule in ALERTS.items():
        assert not re.search(r"[<>]|==", without_thresholds(rule["expr"])), name
