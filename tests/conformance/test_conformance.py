"""The conformance suite against our own server: green as it is, red with a fault planted."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from harness import AWS_ID, AWS_SECRET, Proxy

from xkiproxy.conformance import report
from xkiproxy.conformance.case import CaseResult, Outcome
from xkiproxy.conformance.probe import Subject
from xkiproxy.conformance.runner import run, select, wires
from xkiproxy.conformance.wire import Credential
from xkiproxy.crypto.algorithms import Algorithm
from xkiproxy.crypto.operations import (
    Decrypt,
    Decrypted,
    Encrypt,
    Fault,
    Operation,
    OperationError,
    Result,
)
from xkiproxy.protocols.xki import acs4
from xkiproxy.protocols.xks import sigv4

WIRES = {wire.name: wire for wire in wires()}


def subject(proxy: Proxy, protocol: str, **changes: Any) -> Subject:
    def tls(with_certificate: bool) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(proxy.certificate))

    aws = protocol == "xks"
    credential = (
        Credential(AWS_ID, AWS_SECRET)
        if aws
        else Credential(proxy.cloud.access_key_id, proxy.cloud.secret)
    )
    found = Subject(
        f"https://localhost:{proxy.port}",
        f"/{'aws' if aws else 'demo'}{WIRES[protocol].base}",
        "aes256",
        (credential,),
        encrypt_only_key="encrypt-only",
        decrypt_only_key="decrypt-only",
        disabled_key="disabled",
        deadline=5,  # these machines are shared: whether it is kept is for the benchmark to say
        latency_requests=64,
        tls=tls,
    )
    return replace(found, **changes)


async def results(proxy: Proxy, protocol: str, *patterns: str) -> list[CaseResult]:
    wire = WIRES[protocol]
    return await run(subject(proxy, protocol), wire, select(wire, patterns))


def failed(found: list[CaseResult]) -> dict[str, str]:
    return {result.case.name: result.detail for result in found if result.outcome is Outcome.FAIL}


@pytest.mark.parametrize("protocol", WIRES)
async def test_our_server_is_green(proxy: Proxy, protocol: str) -> None:
    found = await results(proxy, protocol)
    assert failed(found) == {}
    skipped = {result.case.name for result in found if result.outcome is Outcome.SKIP}
    assert skipped <= {"signature.rotation", "transport.client-certificate"}
    assert len(found) > 45


class BadLane:
    """A lane in front of the right one that does something wrong."""

    def __init__(self, lane: Any, execute: Callable[[Any, Operation], Result]) -> None:
        self._lane = lane
        self._execute = execute
        self.close = lane.close

    def execute(self, operation: Operation) -> Result:
        return self._execute(self._lane, operation)


def tag_not_checked(lane: Any, operation: Operation) -> Result:
    try:
        result: Result = lane.execute(operation)
    except OperationError as error:
        if error.fault is not Fault.INVALID_CIPHERTEXT or not isinstance(operation, Decrypt):
            raise
        return Decrypted(operation.ciphertext[:-16], 1, Algorithm.AES_GCM, None)
    return result


def aad_ignored(lane: Any, operation: Operation) -> Result:
    if isinstance(operation, Encrypt | Decrypt):
        operation = replace(operation, aad=b"")
    result: Result = lane.execute(operation)
    return result


def constant_iv(lane: Any, operation: Operation) -> Result:
    if isinstance(operation, Encrypt) and operation.iv is None:
        operation = replace(operation, iv=bytes(12))
    result: Result = lane.execute(operation)
    return result


def tampering_decrypts(lane: Any, operation: Operation) -> Result:
    result: Result = lane.execute(operation)
    if isinstance(result, Decrypted):
        return replace(result, plaintext=result.plaintext[::-1])
    return result


@pytest.mark.parametrize("protocol", WIRES)
@pytest.mark.parametrize(
    ("fault", "seen_by"),
    [
        (tag_not_checked, {"gcm.tampered", "gcm.truncated", "gcm.aad", "key.foreign"}),
        (aad_ignored, {"gcm.aad"}),
        (constant_iv, {"gcm.fresh-iv"}),
        (tampering_decrypts, {"gcm.round-trip", "gcm.large"}),
    ],
)
async def test_a_key_manager_with_a_fault(
    proxy: Proxy, protocol: str, fault: Callable[[Any, Operation], Result], seen_by: set[str]
) -> None:
    proxy.lane.lane = BadLane(proxy.lane.lane, fault)  # type: ignore[assignment]
    found = failed(await results(proxy, protocol))
    assert set(found) >= seen_by
    assert "signature.right" not in found


async def test_a_stale_date_accepted(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acs4, "WINDOW_SECONDS", 1 << 40)
    monkeypatch.setattr(sigv4, "WINDOW_SECONDS", 1 << 40)
    for protocol in WIRES:
        found = failed(await results(proxy, protocol, "signature.*"))
        assert set(found) == {"signature.stale"}
        assert "came HTTP 200" in found["signature.stale"]


async def test_a_window_too_narrow(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acs4, "WINDOW_SECONDS", 60)
    monkeypatch.setattr(sigv4, "WINDOW_SECONDS", 60)
    for protocol in WIRES:
        assert set(failed(await results(proxy, protocol, "signature.*"))) == {"signature.window"}


async def test_a_replay_accepted(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.store.replay, "admit", lambda *_: True)
    found = failed(await results(proxy, "xki", "signature.*"))
    assert set(found) == {"signature.replay", "signature.nonce"}


@pytest.mark.parametrize("protocol", WIRES)
async def test_a_signature_not_checked(
    proxy: Proxy, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hmac.compare_digest", lambda *_: True)
    found = set(failed(await results(proxy, protocol, "signature.*")))
    assert {"signature.wrong", "signature.secret", "signature.body", "signature.path"} <= found


async def test_a_wrong_integrity_value(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "xkiproxy.keystores.keystore.envelope.integrity_value"
    monkeypatch.setattr(name, lambda *_: bytes(32))
    assert set(failed(await results(proxy, "xks"))) == {"encrypt.integrity"}


async def test_keys_that_are_other_than_was_said(proxy: Proxy) -> None:
    """The cases of the optional keys fail when those keys are ordinary ones."""
    for protocol, wire in WIRES.items():
        ordinary = subject(
            proxy, protocol, encrypt_only_key="aes256", decrypt_only_key="aes256",
            disabled_key="aes256", missing_key="aes256",
        )  # fmt: skip
        found = failed(await run(ordinary, wire, select(wire, ["key.*"])))
        wanted = {"key.encrypt-only", "key.decrypt-only", "key.disabled", "key.missing"}
        assert set(found) >= wanted


async def test_what_is_not_given_is_skipped(proxy: Proxy) -> None:
    for protocol, wire in WIRES.items():
        bare = subject(proxy, protocol, encrypt_only_key="", decrypt_only_key="", disabled_key="")
        found = await run(bare, wire, select(wire))
        skipped = {result.case.name for result in found if result.outcome is Outcome.SKIP}
        assert {"key.encrypt-only", "key.decrypt-only", "key.disabled", "key.foreign"} <= skipped
        assert failed(found) == {}


async def test_a_server_too_slow(proxy: Proxy) -> None:
    wire = WIRES["xki"]
    found = await run(subject(proxy, "xki", deadline=1e-6), wire, select(wire, ["latency.*"]))
    assert set(failed(found)) == {"latency.sequential", "latency.concurrent"}
    assert all("the deadline is 0.001 ms" in text for text in failed(found).values())


async def test_a_server_that_is_not_there(proxy: Proxy, free_port: int) -> None:
    for protocol, wire in WIRES.items():
        away = subject(proxy, protocol, origin=f"https://localhost:{free_port}")
        found = await run(away, wire, select(wire, ["transport.*", "gcm.*"]))
        passed = {result.case.name for result in found if result.outcome is Outcome.PASS}
        assert passed <= {"transport.old-tls"}


async def test_a_server_that_is_no_proxy(free_port: int) -> None:
    """Whatever comes back, a case fails and none breaks off."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = random.choice([b"<html>", b"[]", b"{}", b'{"Code": 7}', b"\xff"])
        status = random.choice([b"200 OK", b"401 No", b"404 No", b"400 No", b"500 No"])
        head = b"HTTP/1.1 %b\r\ncontent-length: %d\r\n" % (status, len(body))
        writer.write(random.choice([head + b"\r\n" + body, head, b"nonsense\r\n\r\n"]))
        writer.close()

    random.seed(1)
    async with await asyncio.start_server(answer, "127.0.0.1", free_port):
        for wire in WIRES.values():
            strange = Subject(
                f"http://127.0.0.1:{free_port}", wire.base, "k", (Credential("A" * 20, "s"),),
                disabled_key="d", encrypt_only_key="e", decrypt_only_key="d", latency_requests=16,
            )  # fmt: skip
            found = await run(strange, wire, select(wire))
            assert len(failed(found)) > 40


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_old_tls_is_seen(proxy: Proxy, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.set_ciphers("ALL:@SECLEVEL=0")

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        wire = WIRES["xki"]
        old = subject(proxy, "xki", origin=f"https://localhost:{port}")
        (result,) = await run(old, wire, select(wire, ["transport.old-tls"]))
    assert (result.outcome, result.detail[:16]) == (Outcome.FAIL, "agreed on TLSv1.")


async def test_reports(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.store.replay, "admit", lambda *_: True)
    found = await results(proxy, "xki", "signature.*", "transport.*")
    suite = ElementTree.fromstring(report.as_junit("xki", found))
    assert suite.get("failures") == "2"
    assert len(suite.findall("testcase")) == len(found) == int(suite.get("tests", 0))
    failures = {case.get("name"): case.find("failure") for case in suite.findall("testcase")}
    text = failures["replay"]
    assert text is not None
    assert "A request is accepted once." in str(text.text)
    document = json.loads(json.dumps(report.as_json("https://x", "xki", found)))
    assert (document["fail"], document["skip"]) == (2, 2)
    assert document["pass"] == len(found) - 4
    for secret in (proxy.cloud.secret, "a text of the conformance suite"):
        assert secret not in json.dumps(document)
