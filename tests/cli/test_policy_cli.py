"""`xkiproxy policy`: check, schema and test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_site import Outcome, Run, Site

from xkiproxy.crypto.algorithms import Usage
from xkiproxy.crypto.operations import KeyState, no_such_key
from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog

POLICY = """\
@id("payroll")
permit(principal == Principal::"arn:payroll", action == Action::"decrypt", resource is Key)
when {
  context has source_vpc && context.source_vpc == "vpc-1" &&
  resource.hasTag("environment") && resource.getTag("environment") == "production"
};
permit(principal, action == Action::"random", resource);
"""

Try = Callable[..., str]


@pytest.fixture
def folder(site: Site) -> Path:
    made = site.directory / "policies"
    made.mkdir()
    (made / "demo.cedar").write_text(POLICY)
    with site.config.open("a") as file:
        file.write('policies = "policies"\n')
    labels = (("environment", "production"),)
    entry = CatalogEntry("local", "k", KeyState.ENABLED, Usage.BOTH, 0.0, None, labels)
    SqliteCatalog(site.directory / "catalog.db").put(entry)
    return made


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("words", "decision", "reason"),
    [
        ("decrypt --key k --principal arn:payroll --context source_vpc=vpc-1", "allow", "payroll"),
        ("decrypt --key k --principal arn:payroll", "deny", "no policy permits it"),
        ("encrypt --key k --principal arn:payroll --context source_vpc=vpc-1", "deny", None),
        ("decrypt --key other --principal arn:payroll --context source_vpc=vpc-1", "deny", None),
        (
            "decrypt --key k --principal arn:payroll --context source_vpc=vpc-1 --label a=b",
            "deny",
            None,
        ),
        ("random", "allow", "demo.cedar#2"),
        ("random --source ::1 --time 2026-11-23T12:00:00Z", "allow", None),
    ],
)
def test_what_a_request_would_get(
    run: Run, site: Site, words: str, decision: str, reason: str | None
) -> None:
    said = run("policy", "test", *words.split(), "--json", "--config", site.config).json()
    assert said["decision"] == decision
    if reason is not None:
        assert said["reason"] == reason
    for expected in ("allow", "deny"):
        done = run("policy", "test", *words.split(), "--expect", expected, "--config", site.config)
        assert done.status == (decision != expected)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("decrypt", "--key"),
        ("random --key k", "--key"),
        ("decrypt --key k --context sorce_vpc=1", "'sorce_vpc'"),
        ("random --context mode=GCM", "'mode'"),
        ("decrypt --key k --context source_vpc", "NAME=VALUE"),
        ("decrypt --key k --time soon", "--time"),
        ("decrypt --key k --source here", "--source"),
    ],
)
def test_misuse(run: Run, site: Site, words: str, said: str) -> None:
    done = run("policy", "test", *words.split(), "--config", site.config)
    assert done.status == 2
    assert said in done.err


ANY = "permit(principal, action, resource);\n"


@pytest.mark.parametrize("has_policies", [True, False])
@pytest.mark.parametrize("action", ["encrypt", "decrypt", "meta"])
def test_a_key_that_is_none_of_its_key_store_is_not_there(
    run: Run, site: Site, action: str, has_policies: bool
) -> None:
    """As the server says of it (`test_key_patterns_server`), whatever the policies say."""
    with site.config.open("a") as file:
        file.write('keys = ["payroll-*", "cards"]\n' + 'policies = "policies"\n' * has_policies)
    if has_policies:
        (site.directory / "policies").mkdir()
        (site.directory / "policies" / "any.cedar").write_text(ANY)

    def test(key: str, *options: str) -> Outcome:
        words = ("policy", "test", action, "--key", key, *options, "--config", site.config)
        return run(*words)

    for key in ("k", "cards-2", "my-payroll-1", "Cards"):
        assert test(key, "--json").json() == {"decision": "deny", "reason": no_such_key().message}
        asked = test(key, "--expect", "allow")
        assert asked.status == 1
        assert f"key {key} is none of the keys of key store demo" in asked.err
        assert test(key, "--expect", "deny").status == 0
    for key in ("payroll-1", "cards"):
        if has_policies:
            assert test(key, "--json").json() == {"decision": "allow", "reason": "any.cedar#1"}
        else:
            assert "has no policies" in test(key).err


def test_check_lists_policies_or_names_mistakes(run: Run, site: Site, folder: Path) -> None:
    listed = run("policy", "check", "--json", "--config", site.config).json()
    assert [(row["policy"], row["line"]) for row in listed] == [("payroll", 1), ("demo.cedar#2", 7)]
    (folder / "demo.cedar").write_text("permit(principal, action\n, resorce);")
    for words in (["policy", "check"], ["check"]):
        done = run(*words, "--config", site.config)
        assert done.status == 1
        assert "demo.cedar:2: " in done.out + done.err
    (folder / "demo.cedar").write_text(POLICY)
    other = run("policy", "check", folder, "--config", site.directory / "none.toml")
    assert other.status == 0


def test_without_policies(run: Run, site: Site) -> None:
    assert "no key store has policies" in run("policy", "check", "--config", site.config).err
    asked = run("policy", "test", "random", "--config", site.config)
    assert (asked.status, "has no policies" in asked.err) == (1, True)


def test_schema_and_help(run: Run) -> None:
    assert "entity Key in [KeyStore, Kmi]" in run("policy", "schema").out
    for command in ("check", "schema", "test"):
        assert f"xkiproxy policy {command}" in run("policy", command, "--help").out
