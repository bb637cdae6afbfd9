"""The references in docs/ are what the code says, whole and current."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from website import commands, configuration, metrics
from website.__main__ import DOCS, references
from website.markdown import Undocumented
from xkiproxy.config.models import LogSettings, ServerSettings
from xkiproxy.config.secrets import SecretSource
from xkiproxy.observability.metrics import Metrics

ROOT = Path(__file__).parents[2]
CONFIGURATION = (DOCS / "configuration.md").read_text()


@pytest.mark.parametrize("name", ["configuration.md", "commands.md", "metrics.md"])
def test_the_page_is_what_the_code_says(name: str) -> None:
    """If not: make references."""
    assert (DOCS / name).read_text() == references()[name]


def row(key: str) -> list[str]:
    line = next(line for line in CONFIGURATION.splitlines() if line.startswith(f"| `{key}` |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("key", "value", "default"),
    [
        ("workers", "integer, 1 to 64", "`1`"),
        ("listen", "host:port", '`"0.0.0.0:8443"`'),
        ("handshake_timeout_seconds", "number, over 0, at most 3600", "`10`"),
        ("keyring", "path", "required"),
        ("pin", "[secret](#secrets)", "required"),
        ("plaintext", "boolean", "`false`"),
        ("version", '`"1.4"`, `"2.0"`, `"2.1"`', ""),
        ("name", "`^[a-z0-9][a-z0-9_-]{0,62}$`", "required"),
        ("trusted", "list of CIDR networks, at least 1", "required"),
        ("tls", "[table](#servertls)", ""),
        ("sink", "list of [tables](#auditsink)", "`[]`"),
        ("auth.approle.role_id", "string, 1 to 4096 characters", "required"),
        ("auth.kubernetes.role", "string, not empty", "required"),
        ("max_bytes", "integer, at least 0", "`268435456`"),
        ("ciphertext_format", '`"envelope"`, `"raw"`', '`"envelope"`'),
    ],
)
def test_types_bounds_and_defaults_are_those_of_the_models(
    key: str, value: str, default: str
) -> None:
    assert row(key)[1:3] == [value, default]


def test_a_meaning_is_the_docstring_below_its_field() -> None:
    assert configuration.meanings(LogSettings)["level"] == row("level")[3]


def test_tables_that_were_changed_by_hand_are_made_anew() -> None:
    changed = CONFIGURATION.replace("integer, 1 to 64", "any number").replace("| `listen`", "| `x`")
    assert changed != CONFIGURATION
    assert configuration.with_tables(changed) == CONFIGURATION


def test_a_field_without_a_docstring_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_workers(model: Any) -> dict[str, str]:
        found = meanings(model)
        if model is ServerSettings:
            del found["workers"]
        return found

    meanings = configuration.meanings
    monkeypatch.setattr(configuration, "meanings", without_workers)
    with pytest.raises(Undocumented, match=r"ServerSettings\.workers has no docstring"):
        configuration.with_tables(CONFIGURATION)


def test_a_section_without_a_table_is_refused() -> None:
    page = CONFIGURATION.replace("<!-- fields of LogSettings -->", "")
    with pytest.raises(Undocumented, match="has nothing of LogSettings"):
        configuration.with_tables(page)


def test_a_table_of_no_model_is_refused() -> None:
    page = CONFIGURATION.replace("fields of LogSettings", "fields of LogSetings")
    with pytest.raises(Undocumented, match="LogSetings, which is no model"):
        configuration.with_tables(page)


def test_secrets_are_described_too() -> None:
    assert set(configuration.meanings(SecretSource)) == set(SecretSource.model_fields)


def test_the_commands_do_not_depend_on_who_makes_the_page() -> None:
    strange = {
        "COLUMNS": "30", "TERM": "dumb", "HOME": "/somewhere", "LANG": "C",
        "XKIPROXY_CONFIG": "/somewhere/else.toml", "PYTHONPATH": str(ROOT),
        "PATH": os.environ["PATH"],
    }  # fmt: skip
    made = subprocess.run(
        [sys.executable, "-c", "from website.commands import page; print(page(), end='')"],
        cwd="/", env=strange, capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    assert made.stdout.decode() == (DOCS / "commands.md").read_text()


def test_a_default_of_nought_is_shown_and_one_of_nothing_is_not() -> None:
    page = (DOCS / "commands.md").read_text()
    assert "| `--limit` | integer, at least 0 | `0` |" in page
    assert "| `--json` | | | Print JSON, for programs. |" in page


def test_nothing_of_this_machine_is_in_them() -> None:
    for text in references().values():
        for own in (str(ROOT), str(Path.home()), sys.prefix, socket.gethostname()):
            assert len(own) < 6 or own not in text


def test_each_example_is_of_its_command() -> None:
    page = (DOCS / "commands.md").read_text()
    names = [command.name for command in commands.commands() if not command.is_group]
    assert len(names) > 20
    for name in names:
        section = re.split(r"^##+ ", page.partition(f"# `{name}`\n")[2], flags=re.MULTILINE)[0]
        usage, examples = re.findall(r"```sh\n(.*?)\n```", section, re.DOTALL)
        assert usage.startswith(f"{name} [OPTIONS]")
        assert re.search(rf"\b{name}\b", examples), (name, examples)
        assert not re.search("Examples?:", section)


def told(*, help_text: str | None, docstring: str) -> typer.Typer:
    app = typer.Typer()

    @app.callback()
    def main() -> None: ...

    def command(size: int = typer.Option(1, help=help_text)) -> None:
        del size

    app.command("cut", help=docstring)(command)
    return app


def test_a_command_with_all_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    app = told(help_text="How much.", docstring="Cut it.\n\nExample: xkiproxy cut --size 2")
    monkeypatch.setattr(commands.app, "make_app", lambda *_: app)
    assert "| `--size` | integer | `1` | How much. |" in commands.page()


@pytest.mark.parametrize(
    ("help_text", "docstring", "missing"),
    [
        (None, "Cut it.\n\nExample: xkiproxy cut", "xkiproxy cut --size has no help"),
        ("How much.", "Cut it.", "xkiproxy cut has no example"),
        ("How much.", "Example: xkiproxy cut", "xkiproxy cut has no help"),
    ],
)
def test_a_command_without_its_words_is_refused(
    monkeypatch: pytest.MonkeyPatch, help_text: str | None, docstring: str, missing: str
) -> None:
    app = told(help_text=help_text, docstring=docstring)
    monkeypatch.setattr(commands.app, "make_app", lambda *_: app)
    with pytest.raises(Undocumented, match=missing):
        commands.page()


def metric(name: str) -> list[str]:
    page = (DOCS / "metrics.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_metric_is_told_with_its_unit_and_with_what_asks_for_it() -> None:
    _, kind, labels, meaning, uses = metric("xkiproxy_request_duration_seconds")
    assert (kind, labels) == ("histogram", "`keystore`, `protocol`, `operation`")
    assert "In seconds. Buckets: 0.0001, " in meaning
    # By way of recorded series.
    assert "[XkiproxyLatencyBurnsFast](runbook.md#xkiproxylatencyburnsfast)" in uses
    assert "*Overview*" in uses
    assert metric("xkiproxy_shed_total")[1] == "counter"
    assert (
        "Of several workers: the smallest."
        in metric("xkiproxy_tls_certificate_expiry_timestamp_seconds")[3]
    )


def test_every_metric_is_asked_for_by_a_dashboard_or_an_alert() -> None:
    families = list(Metrics().collection.families())
    assert len(families) > 25
    for family in families:
        name = f"{family.name}_total" if family.kind == "counter" else family.name
        assert metric(name)[4], name


@pytest.mark.parametrize("label", ["keystore", "kmi_lanes.state"])
def test_a_label_without_words_is_refused(monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    monkeypatch.delitem(metrics.LABELS, label)
    with pytest.raises(Undocumented, match=f"has a label {label.rpartition('.')[2]} that"):
        metrics.page()


def test_words_of_a_label_that_is_no_more_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(metrics.LABELS, "tenant", "It was called so.")
    with pytest.raises(Undocumented, match="tenant"):
        metrics.page()
