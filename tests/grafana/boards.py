"""What stands in the dashboards and rules of the repository, for the tests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
BOARDS = sorted((ROOT / "grafana" / "dashboards").glob("*.json"))
RULES = sorted((ROOT / "grafana" / "rules").glob("*.yml"))

_THRESHOLD = re.compile(
    r"\s(?:==|!=|<=|>=|<|>)\s*(?:[\d.]+ \* )?(?:\((?:[^()]|\([^()]*\))*\)|[\d.]+)"
)
_FACTOR = re.compile(r"(< [\d.]+) \* 86400|(> [\d.]+) \* 86400")


class Expression(NamedTuple):
    """An expression of Prometheus, and where it stands."""

    where: str
    text: str


def board(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def panels(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in board(path)["panels"] if panel["type"] != "row"]


def rules(kind: str) -> list[dict[str, Any]]:
    """All rules of a kind, `record` or `alert`."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def of_panels() -> Iterator[Expression]:
    """Every expression of every panel, with values for its variables."""
    for path in BOARDS:
        for panel in panels(path):
            for target in panel["targets"]:
                where = f"{path.stem}: {panel['title']}: {target['legendFormat']}"
                yield Expression(where, _filled(target["expr"]))


def of_rules() -> Iterator[Expression]:
    """Every expression of every rule; of an alert what it compares, without the thresholds."""
    for rule in rules("record"):
        yield Expression(rule["record"], rule["expr"])
    for rule in rules("alert"):
        yield Expression(rule["alert"], without_thresholds(rule["expr"]))


def without_thresholds(expression: str) -> str:
    """An alert's expression that says all that it looks at, whether it is well or not."""
    return _THRESHOLD.sub("", _FACTOR.sub("> 1", expression))


def _filled(expression: str) -> str:
    values = {
        "$__rate_interval": "30s",
        "$__range": "1h",
        "$namespace": ".*",
        "$job": ".*",
        "$instance": ".*",
        "$keystore": ".*",
        "$kmi": ".*",
    }
    for name, value in values.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression
