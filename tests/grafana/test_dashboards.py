"""The dashboards as they stand in the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from boards import BOARDS, ROOT, board, of_panels, of_rules, panels, rules
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from grafana.source.__main__ import FOLDER, dashboards
from grafana.source.panels import FAILED
from xkiproxy.observability.metrics import Metrics
from xkiproxy.protocols.ekm import errors as ekm
from xkiproxy.protocols.xki import errors as xki
from xkiproxy.protocols.xks import errors as xks

NAMES = ("xkiproxy-kmi", "xkiproxy-overview", "xkiproxy-security")
TOO_LARGE = 501
UNITS = {"s", "reqps", "ops", "percentunit", "short"}

_METRIC = re.compile(r"\bxkiproxy_[a-z_]+")
_SUFFIX = re.compile(r"_(bucket|count|sum|total)$")


def test_what_is_committed_is_what_the_code_makes() -> None:
    """If not: `make dashboards`."""
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == dashboards()


def test_the_three_dashboards_are_there() -> None:
    assert tuple(path.stem for path in BOARDS) == NAMES


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_the_models_of_the_sdk_read_it_whole(path: Path) -> None:
    register_default_plugins()
    read = Dashboard.from_json(board(path))
    assert read.uid == path.stem
    assert json.loads(JSONEncoder().encode(read)) == board(path)


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_dashboard_has_its_variables(path: Path) -> None:
    variables = [variable["name"] for variable in board(path)["templating"]["list"]]
    assert variables == ["datasource", "namespace", "job", "instance", "keystore", "kmi"]


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_every_panel_says_what_is_good_and_has_its_unit(path: Path) -> None:
    found = panels(path)
    assert len({panel["id"] for panel in board(path)["panels"]}) == len(board(path)["panels"])
    for panel in found:
        assert "good" in panel["description"].lower() or "Dashed" in panel["description"], panel
        assert panel["targets"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        if panel["type"] != "state-timeline":
            assert unit(panel) in UNITS, panel["title"]
            times = {"_seconds_bucket", "_seconds_sum", "_timestamp_seconds"}
            expression = panel["targets"][0]["expr"]
            assert (unit(panel) == "s") == any(name in expression for name in times), panel


def unit(panel: dict[str, Any]) -> str:
    if panel["type"] == "heatmap":
        return str(panel["options"]["yAxis"]["unit"])
    return str(panel["fieldConfig"]["defaults"]["unit"])


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_panels_do_not_overlap(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board(path)["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place.get("x", 0), place.get("x", 0) + place["w"])
            for y in range(place.get("y", 0), place.get("y", 0) + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_every_metric_that_is_asked_for_exists_and_every_other_is_shown() -> None:
    asked = {
        _SUFFIX.sub("", name)
        for one in (*of_panels(), *of_rules())
        for name in _METRIC.findall(re.sub(r"\w*:\w+(:\w+)?", "", one.text))
    }
    there = set(Metrics().collection.snapshot())
    assert asked == there


def test_failures_of_ours_are_those_of_the_protocols() -> None:
    codes = {
        code
        for table in (xki.codes(), xks.codes(), ekm.codes())
        for status, found in table.items()
        for code in found
        if status >= 500 and status != TOO_LARGE
    }
    assert set(_codes(FAILED)) == codes
    for rule in rules("record"):
        if "code=~" in rule["expr"]:
            assert FAILED in rule["expr"]


def test_what_was_not_authenticated_or_over_a_quota_is_no_refusal_of_a_key() -> None:
    left_out = {
        code
        for table in (xki.codes(), xks.codes(), ekm.codes())
        for status in (401, 429)
        for code in table.get(status, ())
    }
    left_out |= {"InvalidAcsDate", "InvalidSignature", "AuthenticationFailedException"}
    counted = {rule["record"]: rule["expr"] for rule in rules("record")}
    for name, more in (("answered", set()), ("refused", {"OK", *_codes(FAILED)})):
        (codes,) = re.findall(r'code!~"([^"]+)"', counted[f"keystore:xkiproxy_{name}:rate5m"])
        assert set(codes.split("|")) == left_out | more


def _codes(matcher: str) -> list[str]:
    return matcher.removeprefix('code=~"').removesuffix('"').split("|")


@pytest.mark.parametrize("kind", ["datasources", "dashboards"])
def test_provisioning_files_are_there(kind: str) -> None:
    (path,) = (ROOT / "grafana" / "provisioning" / kind).glob("*.yml")
    read = yaml.safe_load(path.read_text())
    assert read["apiVersion"] == 1
    assert read["providers" if kind == "dashboards" else kind]
