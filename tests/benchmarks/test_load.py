"""The load generator: what it sends is right, and what it is answered is counted rightly."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from alibabacloud_gateway_pop.client import Client as AlibabaSigner
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from cloud import SHA256
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.load import LoadError, LoadResult, Material, Plan, Target, Workload, run_load
from benchmarks.load.client import ParseError, parse_answer
from benchmarks.load.requests import Request, RequestMaker, Supply
from benchmarks.load.results import histogram_of, merge
from benchmarks.load.run import Generator
from benchmarks.servers import BareServer, ProxyServer
from xkiproxy.keystores.credentials import Credential
from xkiproxy.keystores.signing_keys import CachedSigningKeys
from xkiproxy.protocols.base import SignedRequest
from xkiproxy.protocols.xki import acs4
from xkiproxy.protocols.xks import sigv4

ID, SECRET = "BETWEENABCDEFGHIJKLM", "PqTjvwAWKC+nZpMbw/yJkQ2s0mTUXb3dLHgRfVnc1xE="
HOST = "127.0.0.1:8443"
XKI = Workload("xki", "/demo", "demo-key", ID, SECRET, HOST, plaintexts=3)
XKS = replace(XKI, protocol="xks", path="/demo-xks")
BLOB = {"CiphertextBlob": "AAAAAAAA", "Iv": "AAAAAAAAAAAAAAAA", "Algorithm": "AES_GCM"}
PARTS = {"ciphertext": "AAAA", "initializationVector": "AAAA", "authenticationTag": "AAAA"}
MATERIAL = {"xki": Material((BLOB,) * 3, (6, 12)), "xks": Material((PARTS,) * 3, (3, 3, 3))}


# ---- requests -----------------------------------------------------------------------------------


def parsed(request: Request) -> SignedRequest:
    """What a server sees of it."""
    head, _, body = request.raw.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    method, path, version = first.decode().split(" ")
    assert version == "HTTP/1.1"
    headers = [(name, value.strip()) for name, _, value in (li.partition(b":") for li in lines)]
    assert int(dict(headers)[b"content-length"]) == len(body)
    return SignedRequest(method, path, "", headers, body)


def made(workload: Workload, count: int = 12) -> list[Request]:
    return RequestMaker(workload, MATERIAL[workload.protocol]).make(count)


@pytest.mark.parametrize("call", ["encrypt", "decrypt", "mixed"])
@pytest.mark.parametrize("workload", [XKI, XKS])
def test_requests_verify(workload: Workload, call: Any) -> None:
    verify = {"xki": acs4.verify, "xks": sigv4.verify}[workload.protocol]
    keys = CachedSigningKeys([Credential(ID, SECRET, "2026-01-01T00:00:00Z")])
    requests = made(replace(workload, call=call))
    identities = [verify(parsed(request), keys, time.time()) for request in requests]
    assert {identity.access_key_id for identity in identities} == {ID}
    assert len({request.raw for request in requests}) == len(requests)
    if workload.protocol == "xki":
        assert len({identity.nonce for identity in identities}) == len(requests)


def test_a_request_holds_its_plaintext() -> None:
    for request in made(replace(XKS, call="mixed")):
        body = json.loads(parsed(request).body)
        if request.call == "encrypt":
            assert base64.b64decode(body["plaintext"]) == XKS.plaintext(request.number)
        else:
            assert body.items() >= PARTS.items()
    assert len({XKS.plaintext(number) for number in range(3)}) == 3


def test_xks_requests_are_signed_as_botocore_signs() -> None:
    for request in made(replace(XKS, call="mixed")):
        seen = parsed(request)
        headers = {name.decode(): value.decode() for name, value in seen.headers}
        authorization = headers.pop("authorization")
        kept = {name: headers[name] for name in ("content-type", "host", "x-amz-date")}
        aws = AWSRequest("POST", f"https://{HOST}{seen.path}", data=seen.body, headers=kept)
        aws.context["timestamp"] = kept["x-amz-date"]
        signer = SigV4Auth(Credentials(ID, SECRET), "kms-xks-proxy", "us-east-1")
        to_sign = signer.string_to_sign(aws, signer.canonical_request(aws))
        assert authorization.endswith(f", Signature={signer.signature(to_sign, aws)}")


def test_xki_requests_are_signed_as_alibaba_cloud_signs() -> None:
    for request in made(replace(XKI, call="mixed")):
        seen = parsed(request)
        headers = {name.decode(): value.decode() for name, value in seen.headers}
        authorization = headers.pop("authorization")
        del headers["content-length"]
        date = headers["x-acs-date"][:8]
        key = AlibabaSigner().get_signingkey(SHA256, SECRET, "kms", "cn-hangzhou", date)
        assert authorization == AlibabaSigner().get_authorization(
            seen.path, "POST", {}, headers, SHA256, headers["x-acs-content-sha256"],
            ID, key, "kms", "cn-hangzhou", date,
        )  # fmt: skip


def test_the_key_follows_the_day() -> None:
    maker = RequestMaker(XKI)
    keys = CachedSigningKeys([Credential(ID, SECRET, "2026-01-01T00:00:00Z")])
    for day in (1, 2):
        now = datetime(2026, 1, day, 23, 59, 59, tzinfo=UTC).timestamp()
        acs4.verify(parsed(maker.make(1, now)[0]), keys, now)


def test_supply_that_runs_out_signs_more_and_says_so() -> None:
    supply = Supply(RequestMaker(XKI), 3)
    taken = {supply.next().raw for _ in range(3)}
    assert supply.signed_late == 0
    taken |= {supply.next().raw for _ in range(20)}
    assert len(taken) == 23
    assert supply.signed_late == 32


# ---- answers ------------------------------------------------------------------------------------

GOOD = b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 2\r\n\r\n{}"


def test_answer_is_read_by_its_length() -> None:
    assert parse_answer(GOOD) == (200, b"{}", True)
    assert parse_answer(GOOD.replace(b"Server: x", b"Connection: close")) == (200, b"{}", False)
    for end in range(len(GOOD)):
        assert parse_answer(GOOD[:end]) is None


@pytest.mark.parametrize(
    "data",
    [
        GOOD + b"x",
        GOOD.replace(b"Content-Length: 2\r\n", b""),
        GOOD.replace(b"Length: 2", b"Length: -2"),
        GOOD.replace(b"Length: 2", b"Length: "),
        GOOD.replace(b"Server: x", b"Content-Length: 2"),
        GOOD.replace(b"Server: x", b"Transfer-Encoding: chunked"),
        GOOD.replace(b"HTTP/1.1", b"HTTP/1.0"),
        GOOD.replace(b"200", b"2x0"),
        b"\x15\x03\x03\x00",
    ],
)
def test_what_is_no_answer_is_an_error(data: bytes) -> None:
    with pytest.raises(ParseError):
        parse_answer(data)


# ---- results ------------------------------------------------------------------------------------


def test_results_go_through_json_and_merge() -> None:
    one = LoadResult(
        ok=3, wrong=1, errors={"500 x": 2}, seconds=2.0, cpu_seconds=0.5, checked=1,
        histogram=histogram_of(array("q", [1_000_000, 2_000_000, 70_000_000_000])),
    )  # fmt: skip
    again = LoadResult.from_json(json.loads(one.dumps()))
    assert again.to_json() == one.to_json()
    both = merge([one, again])
    assert (both.ok, both.wrong, both.errors, both.total) == (6, 2, {"500 x": 4}, 12)
    assert (both.seconds, both.cpu_seconds, both.rate) == (2.0, 1.0, 3.0)
    assert both.latency_us(50) == pytest.approx(2000, rel=0.001)
    assert both.latencies_us()["max"] == pytest.approx(60e6, rel=0.001)


# ---- faults -------------------------------------------------------------------------------------

Behaviour = Callable[[int, bytes], tuple[float, bytes | None]]
"""From the number of a request and its bytes to (seconds to wait, the answer or None for none)."""


def answer(status: int, fields: dict[str, str]) -> bytes:
    body = json.dumps(fields).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def plain(number: int, _: bytes) -> tuple[float, bytes | None]:
    """The right answers: the plaintexts come in turn."""
    text = base64.b64encode(XKI.plaintext(0)).decode()
    return 0.0, answer(200, {"Plaintext": text})


class _Faulty(asyncio.Protocol):
    def __init__(self, behave: Behaviour, count: Iterator[int]) -> None:
        self._behave, self._count = behave, count

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        delay, reply = self._behave(next(self._count), data)
        if reply is not None:
            asyncio.get_running_loop().call_later(delay, self._write, reply)

    def _write(self, reply: bytes) -> None:
        if reply:
            self._transport.write(reply)
        else:
            self._transport.abort()


@asynccontextmanager
async def faulty(behave: Behaviour) -> AsyncIterator[Target]:
    counter = count()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Faulty(behave, counter), "127.0.0.1", 0)
    async with server:
        yield Target("127.0.0.1", server.sockets[0].getsockname()[1])


async def measured(target: Target, **changes: Any) -> LoadResult:
    """A short load from this process: decrypts of one plaintext, unless changed."""
    workload = replace(XKI, call=changes.pop("call", "decrypt"), plaintexts=1)
    fields = {"connections": 4, "seconds": 0.3, "warm_up": 0.0, "ahead": 5000, "grace": 0.3}
    generator = Generator(Plan(target, workload, **{**fields, **changes}), MATERIAL["xki"])
    await generator.open()
    result = await generator.run(time.perf_counter_ns())
    await generator.check(result)
    return result


@pytest.mark.parametrize("rate", [None, 400.0])
async def test_faults_are_counted_and_are_no_success(rate: float | None) -> None:
    def behave(number: int, data: bytes) -> tuple[float, bytes | None]:
        if number % 10 == 3:
            return 0.0, answer(200, {"Plaintext": base64.b64encode(bytes(32)).decode()})
        if number % 10 == 5:
            return 0.0, answer(500, {"Code": "InternalServerError"})
        if number % 10 == 7:
            return 0.0, b""  # the connection is cut
        if number % 10 == 8:
            return 0.0, b"nonsense\r\n\r\n"
        return plain(number, data)

    async with faulty(behave) as target:
        result = await measured(target, rate=rate)
    tenth = pytest.approx(result.total / 10, abs=4)
    assert result.wrong == tenth
    assert result.errors == {
        "500 InternalServerError": tenth,
        "connection lost": tenth,
        "no HTTP answer: no status line": tenth,
    }
    assert result.ok == pytest.approx(result.total * 6 / 10, abs=8)
    assert result.ok == result.histogram.get_total_count()
    assert result.reconnects > 0
    if rate:
        assert result.total == 120


async def test_answers_that_do_not_come_are_errors() -> None:
    def falls_silent(number: int, data: bytes) -> tuple[float, bytes | None]:
        return (0.0, None) if number > 20 else plain(number, data)

    async with faulty(falls_silent) as target:
        closed = await measured(target)
    async with faulty(falls_silent) as target:
        opened = await measured(target, rate=200)
    assert (closed.ok, closed.errors) == (21, {"no answer": 4})
    assert (opened.ok, opened.errors) == (21, {"no answer": 4, "never sent": 35})


async def test_a_target_that_goes_away_is_counted() -> None:
    async with faulty(lambda *_: (0.0, b"")) as target:
        plan = Plan(target, replace(XKI, plaintexts=1), 4, 0.3, warm_up=0.0, ahead=10)
        generator = Generator(plan, MATERIAL["xki"])
        await generator.open()
    result = await generator.run(time.perf_counter_ns())
    assert result.ok == 0
    assert result.errors.pop("connection lost") == 4
    # Four connections try again every 50 ms, fewer on a busy machine, and never in a busy loop.
    assert 4 <= result.errors.pop("connect: ConnectionRefusedError") <= 28
    assert not result.errors


async def test_ciphertext_of_another_size_is_an_error() -> None:
    reply = answer(200, {**BLOB, "CiphertextBlob": "AAAA"})
    async with faulty(lambda *_: (0.0, reply)) as target:
        result = await measured(target, call="encrypt", seconds=1.5)
    assert (result.ok, set(result.errors)) == (0, {"bad ciphertext"})


async def test_ciphertexts_that_decrypt_to_something_else_are_wrong() -> None:
    """They look right while the load runs: only the decrypts afterwards tell."""

    def behave(_: int, data: bytes) -> tuple[float, bytes | None]:
        if b"/encrypt " in data:
            return 0.0, answer(200, BLOB)
        return 0.0, answer(200, {"Plaintext": base64.b64encode(bytes(32)).decode()})

    async with faulty(behave) as target:
        result = await measured(target, call="encrypt", rate=400, sample_every=10)
    assert (result.ok, result.wrong, result.checked) == (108, 12, 12)


async def test_open_loop_shows_a_stall_in_every_request_it_delays() -> None:
    began: list[float] = []

    def stalls(number: int, data: bytes) -> tuple[float, bytes | None]:
        """From 0.2 to 0.4 s after the first request nothing is answered."""
        began.append(time.monotonic())
        elapsed = began[-1] - began[0]
        delay = 0.4 - elapsed if 0.2 <= elapsed < 0.4 else 0.0
        return delay, plain(number, data)[1]

    def slow(result: LoadResult) -> int:
        """How many took more than 50 ms."""
        latencies = result.histogram.get_recorded_iterator()
        return sum(
            item.count_added_in_this_iter_step
            for item in latencies
            if item.value_iterated_to > 50_000
        )

    async with faulty(stalls) as target:
        opened = await measured(target, rate=500, seconds=0.6)
        assert opened.errors == {}
        assert opened.ok == 300
        assert slow(opened) > 60  # of the 75 that were due in the first 150 ms of it
        assert opened.waited > 60
        assert opened.latencies_us()["max"] > 180_000
        began.clear()
        closed = await measured(target, seconds=0.6)
        assert slow(closed) <= 8  # it hides all but one for each connection


# ---- against servers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxy() -> Iterator[ProxyServer]:
    with ProxyServer() as server:
        yield server


def is_clean(result: LoadResult) -> bool:
    return result.ok > 100 and not result.wrong and not result.errors and result.checked > 0


async def test_closed_loop_against_a_proxy(proxy: ProxyServer) -> None:
    plan = Plan(proxy.target, proxy.workload("xki", "mixed"), 8, 1.0, warm_up=0.1, sample_every=10)
    result = await run_load(plan, 2, probe=proxy.cpu_seconds)
    assert is_clean(result), result
    assert 1.0 <= result.seconds < 1.5
    assert result.server_cpu_seconds["server"] > 0.1
    assert 10 < result.cpu_us_per_request()["generator"] < 2000
    assert proxy.rss_bytes()["server"] > 10 << 20


async def test_open_loop_against_a_proxy(proxy: ProxyServer) -> None:
    workload = proxy.workload("xks", "mixed", size=4096)
    plan = Plan(proxy.target, workload, 8, 1.0, rate=200, warm_up=0.1, sample_every=10)
    result = await run_load(plan, 2, progress=False)
    assert is_clean(result), result
    assert result.ok == 200
    assert result.seconds < 1.5


async def test_wrong_credential_is_told_before_the_load(proxy: ProxyServer) -> None:
    workload = replace(proxy.workload("xki"), secret="another")
    with pytest.raises(LoadError, match="401"):
        await run_load(Plan(proxy.target, workload))


def test_command_line(proxy: ProxyServer, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    arguments = [
        "load", "--url", proxy.url, "--protocol", "xks", "--path", "/demo-xks", "--ca",
        str(proxy.certificate), "--credentials", str(proxy.credentials_file("xks")),
        "--seconds", "0.3", "--warm-up", "0", "--connections", "2", "--json", str(file),
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    result = LoadResult.from_json(json.loads(file.read_text())["xks encrypt"])
    assert result.ok > 0
    assert f"{result.rate:,.0f}" in done.output


@pytest.mark.parametrize("tls", [False, True])
async def test_bare_server(tls: bool) -> None:
    with BareServer(tls=tls) as server:
        for protocol in ("xki", "xks"):
            plan = Plan(server.target, server.workload(protocol, "mixed"), 2, 0.2, warm_up=0)
            assert is_clean(await run_load(plan, progress=False))
