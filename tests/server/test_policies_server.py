"""Policies in a running server: what passes, what is refused, what is written down, reloads."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import cloud
import pytest
from test_end_to_end import wait_for
from test_workers import Workers

POLICY = """\
@id("payroll-decrypts-in-its-vpc")
permit(principal == Principal::"acs:ram::1:role/payroll", action == Action::"decrypt", resource)
when { context has source_vpc && context.source_vpc == "vpc-payroll" };

@id("all-encrypt")
permit(principal, action == Action::"encrypt", resource);
"""


class Guarded(Workers):
    """An installation whose key store has policies."""

    def __init__(self, directory: Path, workers: int) -> None:
        super().__init__(directory, workers)
        (directory / "policies").mkdir()
        self.policy.write_text(POLICY)
        with self.config.open("a") as file:
            file.write('policies = "policies"\n')

    @property
    def policy(self) -> Path:
        return self.directory / "policies" / "demo.cedar"


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Guarded]:
    made = Guarded(tmp_path / "demo", request.param)
    made.start()
    yield made
    made.stop()


def asked_by(monkeypatch: pytest.MonkeyPatch, principal: str, vpc: str) -> None:
    metadata = {**cloud.METADATA, "PrincipalArn": principal, "SourceVpc": vpc}
    monkeypatch.setattr(cloud, "METADATA", metadata)


PAYROLL = ("acs:ram::1:role/payroll", "vpc-payroll")


def test_one_request_passes_and_another_does_not(
    server: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, made = server.encrypt(b"for payroll")
    assert status == 200
    blob = {name: made[name] for name in ("CiphertextBlob", "Iv")}
    asked_by(monkeypatch, *PAYROLL)
    status, answer = server.call("decrypt", "demo-key", **blob)
    assert base64.b64decode(answer["Plaintext"]) == b"for payroll"
    asked_by(monkeypatch, PAYROLL[0], "vpc-other")
    status, answer = server.call("decrypt", "demo-key", **blob)
    assert (status, answer["Code"]) == (403, "AccessForbidden")
    assert "vpc" not in answer["Message"]
    assert "policy" not in answer["Message"]
    assert server.call("health")[0] == 200  # nobody is kept from asking that
    denied = server.records()[-1]
    denials = [record for record in server.records() if record.get("reason") == "policy"]
    assert [record["policy"] for record in denials] == ["no policy permits it"]
    assert denials[0]["source_vpc"] == "vpc-other"
    assert "plaintext" not in str(denied).lower()
    assert server.sample("xkiproxy_auth_failures_total", reason="policy") == 1
    said = server.run(
        "policy", "test", "decrypt", "--key", "demo-key", "--principal", PAYROLL[0],
        "--context", "source_vpc=vpc-other", "--expect", "deny",
    ).stdout  # fmt: skip
    assert "no policy permits it" in said
    server.run(
        "policy", "test", "decrypt", "--key", "demo-key", "--principal", PAYROLL[0],
        "--context", f"source_vpc={PAYROLL[1]}", "--expect", "allow",
    )  # fmt: skip


def test_policies_change_on_reload_and_a_broken_one_changes_nothing(
    server: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.encrypt(b"x")[0] == 200
    server.policy.write_text(POLICY + "\nforbid(principal, action, resorce);")
    refused = server.run("reload", status=1)
    assert "demo.cedar:8: " in refused.stderr
    assert {server.encrypt(b"x")[0] for _ in range(8)} == {200}
    server.policy.write_text(
        POLICY + '\n@id("nothing") forbid(principal, action, resource)'
        ' when { context.time > datetime("2026-01-01") };'
    )
    assert "key store demo has other policies" in server.run("reload").stdout
    assert {server.encrypt(b"x")[0] for _ in range(8)} == {403}
    assert server.records()[-1].get("policy", "nothing") == "nothing"
    assert "nothing" in {record.get("policy") for record in server.records()}


def test_a_file_whose_name_is_no_utf_8_is_named_all_the_same(server: Guarded) -> None:
    """Its name goes through JSON: to the audit log, to /status, between processes, to programs."""
    odd = server.policy.with_name("caf\udce9.cedar")
    odd.write_text("permit(principal, action, resorce);")
    assert "caf\\udce9.cedar:1: " in server.run("reload", status=1).stderr
    assert server.status()["reload"]["problems"][0].count("caf\\udce9.cedar:1: ") == 1
    assert "caf\\udce9.cedar:1: " in server.admin("")[1]
    assert {server.encrypt(b"x")[0] for _ in range(8)} == {200}
    assert "reload_failed" in {record.get("event") for record in server.records()}
    checked = json.loads(server.run("check", "--json", status=1).stdout)
    assert "caf\\udce9.cedar:1: " in checked[0]["what"]
    odd.write_text("forbid(principal, action, resource);")
    server.run("reload")
    assert {server.encrypt(b"x")[0] for _ in range(8)} == {403}
    assert "caf\\udce9.cedar#1" in {record.get("policy") for record in server.records()}


def test_labels_decide_within_a_second(server: Guarded) -> None:
    server.policy.write_text(
        "permit(principal, action, resource is Key) when"
        ' { resource.hasTag("environment") && resource.getTag("environment") == "production" };'
    )
    server.run("reload")
    assert {server.encrypt(b"x")[0] for _ in range(8)} == {403}
    server.run("keys", "label", "demo-key", "environment=production")
    wait_for(lambda: {server.encrypt(b"x")[0] for _ in range(8)} == {200})
