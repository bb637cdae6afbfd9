"""docs/metrics.md, from the metrics as the proxy makes them and from what asks for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from website.markdown import Undocumented, table
from xkiproxy.crypto.operations import Fault
from xkiproxy.kmi.base import BreakReason, KmiState
from xkiproxy.observability.metrics import Metrics
from xkiproxy.observability.series import Family
from xkiproxy.observability.timing import STAGES
from xkiproxy.protocols.base import REASONS
from xkiproxy.protocols.registry import PROTOCOLS

GRAFANA = Path(__file__).resolve().parents[1] / "grafana"

INTRODUCTION = """\
# Metrics

<!-- Written by `make references` from xkiproxy/observability. What is changed here is lost. -->

What `/metrics` of the admin listener has, for Prometheus; [monitoring](monitoring.md) has the
dashboards and alerts that are made of it. With several workers it is what all of them have counted,
also those that have ended; what a gauge is then, is said with it. Beside these there are
`process_...` and `python_info` of the process that is asked (with several workers that is their
supervisor), and `up` of Prometheus itself.

Names end in the unit: seconds; else it is a number of what the name says. A histogram
has `_bucket` (with `le`), `_sum` and `_count`. Counters begin at 0 with the process. No label has a
value that a client chose: each is from the configuration or from a table of the program.

"""

_LABELS_HEAD = """
## Labels

"""


def _list(values: Any) -> str:
    return ", ".join(f"`{value}`" for value in values)


LABELS = {
    "keystore": "The key store's name; empty for requests and connections that named none.",
    "protocol": f"{_list(PROTOCOLS)}.",
    "operation": "The call as the path has it: `encrypt`, ...; empty where `keystore` is.",
    "kmi.operation": "What a KMI was asked for: `encrypt`, `decrypt`, `random`, ...",
    "code": "The error's code in the words of the protocol, or `OK`.",
    "stage": f"{_list(STAGES)}.",
    "auth_failures.reason": (
        f"{_list(REASONS)}: see the [runbook](runbook.md#xkiproxysignaturefailures)."
    ),
    "shed.reason": (
        "`overload`, `replay_window`, `connections`, `quota_all`, `quota_key`, `quota_principal`."
    ),
    "proxy_protocol_refused.reason": "`untrusted`, `malformed`, `timeout`, `limit`.",
    "kmi_lane_restarts.reason": f"{_list(BreakReason)}.",
    "kmi": "The KMI's name.",
    "kmi_state.state": f"{_list(KmiState)}.",
    "kmi_lanes.state": "`idle`, `busy`, `starting`, `failed`.",
    "kmi_operations.outcome": "`ok`; `cancelled`, of a hedge that lost; or what went wrong:"
    f" {_list(f.name.lower() for f in Fault)}.",
    "kmi_hedges.outcome": "`won`: the second KMI's answer came first; `lost`.",
    "reloads.outcome": "`ok`, `failed`.",
    "from": "The KMI that the key store prefers.",
    "to": "The KMI that served.",
    "listener": "`public`: the one for the cloud.",
    "part": "`audit`, `catalog`.",
    "sink": "The audit sink: `file`, or what the configuration calls it.",
    "version": "The proxy's version.",
}
"""What a label says, of all metrics or of one (its name without `xkiproxy_`), or of a group."""

_UNITS = {"_timestamp_seconds": "In seconds since 1970.", "_seconds": "In seconds."}
_MERGED = {"max": "the largest", "min": "the smallest", "add": "the sum"}
_NAME = re.compile(r"\b(xkiproxy_[a-z_]+|\w+:xkiproxy_\w+:\w+)")
_RULE = re.compile(r"- (alert|record): (\S+)\n(.*?)(?=- (?:alert|record|name): |\Z)", re.DOTALL)
_SUFFIX = re.compile(r"_(bucket|count|sum|total)$")


def page() -> str:
    """The whole page; raises Undocumented for a metric or a label without its words."""
    families = list(Metrics().collection.families())
    uses = _uses()
    rows = [_row(family, uses.get(family.name, [])) for family in families]
    return (
        INTRODUCTION
        + table(("metric", "type", "labels", "meaning", "asked for by"), rows)
        + _LABELS_HEAD
        + table(("label", "of", "values"), _labels(families))
    )


def _row(family: Family[Any], uses: list[str]) -> tuple[str, str, str, str, str]:
    if not family.documentation:
        raise Undocumented(f"{family.name} says nothing of itself")
    return (
        f"`{_name(family)}`",
        family.kind,
        _list(family.label_names),
        _meaning(family),
        ", ".join(uses),
    )


def _name(family: Family[Any]) -> str:
    return f"{family.name}_total" if family.kind == "counter" else family.name


def _meaning(family: Family[Any]) -> str:
    said = [family.documentation]
    said += [words for end, words in _UNITS.items() if family.name.endswith(end)][:1]
    if family.kind == "gauge":
        said.append(f"Of several workers: {_MERGED[family.merge.__name__]}.")
    if family.bounds:
        said.append(f"Buckets: {', '.join(map(_plain, family.bounds))}.")
    return " ".join(said)


def _plain(number: float) -> str:
    return f"{number:f}".rstrip("0").rstrip(".")


def _labels(families: list[Family[Any]]) -> Iterator[tuple[str, str, str]]:
    """A row for each meaning of a label, with the metrics that have it so."""
    found: dict[str, list[str]] = {}
    for family in families:
        for label in family.label_names:
            found.setdefault(_key(family, label), []).append(f"`{_name(family)}`")
    if unused := LABELS.keys() - found.keys():
        raise Undocumented(f"website/metrics.py tells of labels that are no more: {unused}")
    for key, metrics in found.items():
        yield f"`{key.rpartition('.')[2]}`", ", ".join(metrics), LABELS[key]


def _key(family: Family[Any], label: str) -> str:
    """The most special of what is said of a label of this metric."""
    name = family.name.removeprefix("xkiproxy_")
    for key in (f"{name}.{label}", f"{name.partition('_')[0]}.{label}", label):
        if key in LABELS:
            return key
    raise Undocumented(f"{family.name} has a label {label} that website/metrics.py says nothing of")


def _uses() -> dict[str, list[str]]:
    """The dashboards and alerts that ask for each metric, also by way of a recorded series."""
    found: dict[str, list[str]] = {}
    recorded: dict[str, set[str]] = {}
    for kind, name, text in _rules():
        names = _metrics(text, recorded)
        if kind == "record":
            recorded[name] = names
        for metric in names if kind == "alert" else ():
            found.setdefault(metric, []).append(f"[{name}](runbook.md#{name.lower()})")
    shown: dict[str, list[str]] = {}
    for path in sorted((GRAFANA / "dashboards").glob("*.json")):
        board = json.loads(path.read_text(encoding="utf-8"))
        asked = [t["expr"] for panel in board["panels"] for t in panel.get("targets", ())]
        for metric in _metrics("\n".join(asked), recorded):
            shown.setdefault(metric, []).append(f"*{board['title'].rpartition('/ ')[2]}*")
    return {metric: shown.get(metric, []) + found.get(metric, []) for metric in shown | found}


def _rules() -> Iterator[tuple[str, str, str]]:
    """`record` or `alert`, its name, and all that is said of it; those that are recorded first."""
    for name in ("recording.yml", "alerts.yml"):
        for match in _RULE.finditer((GRAFANA / "rules" / name).read_text(encoding="utf-8")):
            yield match[1], match[2], match[3]


def _metrics(text: str, recorded: dict[str, set[str]]) -> set[str]:
    """The metrics that expressions ask for."""
    found: set[str] = set()
    for name in _NAME.findall(text):
        found |= recorded.get(name, {_SUFFIX.sub("", name)})
    return found
