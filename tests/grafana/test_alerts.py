"""The rules by promtool: each alert fires when it should and only then; each has its section."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from boards import BOARDS, ROOT, RULES, panels, rules, without_thresholds

from xkiproxy.cli.app import COMMANDS, make_app

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


def test_the_panels_that_the_runbook_names_are_there() -> None:
    titles = {panel["title"] for path in BOARDS for panel in panels(path)}
    text = re.sub(r"```.*?```|`[^`]*`", "", RUNBOOK.read_text(), flags=re.DOTALL)
    named = {" ".join(name.split()) for name in re.findall(r'"([A-Z][^"]+)"', text)}
    assert len(named) > 10
    assert named - titles == set()


def test_the_commands_that_the_runbook_names_are_there() -> None:
    """With their options."""
    used = re.findall(r"xkiproxy ((?:[a-z][a-z-]+ ?)+)([^`\n]*)[`\n]", _code(RUNBOOK.read_text()))
    assert len(used) > 20
    for words, rest in used:
        command: Any = typer.main.get_command(make_app(*COMMANDS))
        for word in words.split():
            if not hasattr(command, "commands"):
                break  # an argument
            assert word in command.commands, words
            command = command.commands[word]
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options, (words, rest)


def _code(text: str) -> str:
    """What stands in code, a line each."""
    found = re.findall(r"```sh\n(.*?)```|`([^`]+)`", text, flags=re.DOTALL)
    lines = "\n".join(block or inline.replace("\n", " ") for block, inline in found) + "\n"
    return re.sub(r"#.*|^(?!xkiproxy ).*", "", lines, flags=re.MULTILINE)


def test_thresholds_are_found() -> None:
    """What `test_prometheus` asks of an alert compares nothing any more."""
    for name, rule in ALERTS.items():
        assert not re.search(r"[<>]|==", without_thresholds(rule["expr"])), name
