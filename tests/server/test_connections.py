"""Connections at their worst: large, slow, torn and foreign; TLS as it must be; an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import ssl
import threading
from pathlib import Path

import pytest
from harness import Proxy, make_certificate

from xkiproxy.config.models import ServerSettings, TlsSettings
from xkiproxy.config.secrets import SecretSource
from xkiproxy.config.tls import TlsError, read_tls
from xkiproxy.protocols.base import Trouble
from xkiproxy.protocols.xki import XkiProtocol
from xkiproxy.protocols.xks import XksProtocol
from xkiproxy.server.connection import Connection
from xkiproxy.server.http import Request
from xkiproxy.server.tls import server_context

TLS_1_2 = ssl.TLSVersion.TLSv1_2
TLS_1_3 = ssl.TLSVersion.TLSv1_3


def trusting(proxy: Proxy) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(proxy.certificate))


async def connect(
    proxy: Proxy, context: ssl.SSLContext | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(
        "127.0.0.1", proxy.port, ssl=context or trusting(proxy), server_hostname="localhost"
    )


def connections(proxy: Proxy) -> set[Connection]:
    shared = proxy.listener._shared
    assert shared is not None
    return shared.connections


def request_bytes(proxy: Proxy, body: bytes, path: str = "", extra: bytes = b"") -> bytes:
    path = path or f"{proxy.base}/health"
    headers = proxy.cloud.headers(path, body)
    lines = [f"POST {path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [f"content-length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n" + extra + b"\r\n" + body


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes, dict]:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    length = next(
        int(line.split(b":")[1])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length")
    )
    return int(head.split()[1]), head, json.loads(await reader.readexactly(length))


async def test_keep_alive_and_new_connections(proxy: Proxy) -> None:
    for _ in range(2):
        reader, writer = await connect(proxy)
        for _ in range(3):
            writer.write(request_bytes(proxy, proxy.cloud.body()))
            assert (await read_answer(reader))[0] == 200
        writer.close()


async def test_many_requests_whose_bodies_come_later(proxy: Proxy) -> None:
    reader, writer = await connect(proxy)
    for _ in range(50):
        head, _, body = request_bytes(proxy, proxy.cloud.body()).partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n" + body[:5])
        await writer.drain()
        await asyncio.sleep(0.002)
        writer.write(body[5:])
        assert (await read_answer(reader))[0] == 200
    writer.close()


async def test_pipelined_requests_are_answered_in_order(proxy: Proxy) -> None:
    reader, writer = await connect(proxy)
    path = f"{proxy.base}/keys/missing/meta"
    writer.write(
        request_bytes(proxy, proxy.cloud.body())
        + request_bytes(proxy, proxy.cloud.body(), path)
        + request_bytes(proxy, proxy.cloud.body())
    )
    assert [(await read_answer(reader))[0] for _ in range(3)] == [200, 404, 200]
    writer.close()


async def test_a_thousand_requests_in_one_go(proxy: Proxy) -> None:
    """They are answered one by one and in order, and no more than a few are taken in at once."""
    reader, writer = await connect(proxy)
    paths = [f"{proxy.base}/nowhere-{number}" for number in range(1000)]
    writer.write(b"".join(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode() for path in paths))
    writer.write(request_bytes(proxy, proxy.cloud.body()))
    most = 0
    for _ in paths:
        assert (await read_answer(reader))[0] == 404
        most = max(most, *(len(connection._queue) for connection in connections(proxy)))
    assert (await read_answer(reader))[0] == 200
    assert most <= 16
    writer.close()


async def test_an_upgrade_is_not_followed(proxy: Proxy) -> None:
    reader, writer = await connect(proxy)
    upgrade = b"connection: upgrade\r\nupgrade: websocket\r\n"
    writer.write(request_bytes(proxy, proxy.cloud.body(), extra=upgrade) + b"\x81\x05hello")
    assert (await read_answer(reader))[0] == 200
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


async def test_a_head_request_gets_no_body(proxy: Proxy) -> None:
    reader, writer = await connect(proxy)
    writer.write(f"HEAD {proxy.base}/health HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    assert head.startswith(b"HTTP/1.1 405 ")
    writer.write(request_bytes(proxy, proxy.cloud.body()))
    assert (await read_answer(reader))[0] == 200
    writer.close()


async def test_http_1_0_is_answered_and_closed(proxy: Proxy) -> None:
    reader, writer = await connect(proxy)
    data = request_bytes(proxy, proxy.cloud.body()).replace(b" HTTP/1.1", b" HTTP/1.0", 1)
    writer.write(data)
    assert (await read_answer(reader))[0] == 200
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


async def test_a_client_that_does_not_read_its_answers(proxy: Proxy) -> None:
    """It is served as far as its window goes, holds no one up, and loses nothing."""
    reader, writer = await connect(proxy)
    writer.transport.pause_reading()
    count = 3000
    path = f"{proxy.base}/nowhere"
    writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode() * count)
    for _ in range(20):
        assert (await proxy.call("health")).status == 200
        await asyncio.sleep(0.01)
    writer.transport.resume_reading()
    for _ in range(count):
        assert (await read_answer(reader))[0] == 404
    writer.close()


async def test_a_client_that_reads_on_gets_all_its_answers(proxy: Proxy) -> None:
    """Its window is small, and it sends until the server has nowhere to write to."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", proxy.port))
    reader, writer = await asyncio.open_connection(
        sock=sock, ssl=trusting(proxy), server_hostname="localhost"
    )
    writer.transport.pause_reading()
    count = 0
    async with asyncio.timeout(60):
        while not any(connection._paused for connection in connections(proxy)):
            writer.write(f"GET {proxy.base}/nowhere HTTP/1.1\r\nhost: x\r\n\r\n".encode() * 100)
            count += 100
            await asyncio.sleep(0.01)
    writer.transport.resume_reading()
    for _ in range(count):
        assert (await read_answer(reader))[0] == 404
    writer.close()


@pytest.mark.parametrize("count", range(1, 9))
async def test_after_any_number_of_pipelined_requests_a_connection_is_idle(
    proxy: Proxy, count: int
) -> None:
    reader, writer = await connect(proxy)
    writer.write(b"".join(whole_request(proxy) for _ in range(count)))
    assert [(await read_answer(reader))[0] for _ in range(count)] == [200] * count
    await asyncio.sleep(0.05)  # what the parser may have held back is asked for
    assert [connection.is_idle for connection in connections(proxy)] == [True]
    writer.write(b"POST / HT")
    async with asyncio.timeout(10):
        while any(connection.is_idle for connection in connections(proxy)):
            await asyncio.sleep(0.01)
    writer.close()


async def test_a_fault_of_ours_in_the_commit_closes_and_answers_nothing(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(answers: object) -> None:
        raise RuntimeError("planted")

    reader, writer = await connect(proxy)
    with monkeypatch.context() as patched:
        patched.setattr(proxy.gateway, "commit", fail)
        writer.write(request_bytes(proxy, proxy.cloud.body()))
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert await asyncio.wait_for(reader.read(), 10) == b""
    assert (await proxy.call("health")).status == 200
    writer.close()


async def test_a_whole_chunked_body_over_the_limit_leaves_the_connection_usable(
    proxy: Proxy,
) -> None:
    reader, writer = await connect(proxy)
    head = f"POST {proxy.base}/health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    size = 150 * 1024
    writer.write(head.encode() + b"%x\r\n" % size + b"x" * size + b"\r\n0\r\n\r\n")
    status, head_bytes, _ = await read_answer(reader)
    assert status == 413
    if b"connection: close" not in head_bytes.lower():
        writer.write(request_bytes(proxy, proxy.cloud.body()))
        assert (await read_answer(reader))[0] == 200
    writer.close()


async def test_the_body_of_the_last_of_many_pipelined_requests_is_read(proxy: Proxy) -> None:
    reader, writer = await connect(proxy)
    whole = b"".join(request_bytes(proxy, proxy.cloud.body()) for _ in range(15))
    last = request_bytes(proxy, proxy.cloud.body())
    writer.write(whole + last[:-40])
    await asyncio.sleep(0.1)
    writer.write(last[-40:])
    assert [(await read_answer(reader))[0] for _ in range(16)] == [200] * 16
    writer.close()


async def test_many_in_one_go_behind_one_whose_body_came_later(proxy: Proxy) -> None:
    reader, writer = await connect(proxy)
    for number in range(3, 8):
        first = whole_request(proxy)
        writer.write(first[:-20])
        await asyncio.sleep(0.05)
        rest = b"".join(whole_request(proxy) for _ in range(number))
        writer.write(first[-20:] + rest)
        answers = [(await read_answer(reader))[0] for _ in range(1 + number)]
        assert answers == [200] * (1 + number)
    writer.close()


def whole_request(proxy: Proxy) -> bytes:
    return request_bytes(proxy, proxy.cloud.body())


async def test_refused_requests_leave_nothing_behind(proxy: Proxy) -> None:
    """Memory: an exception that is raised again and again keeps every frame that it passed."""
    for trouble in Trouble:
        one, other = (protocol.refuse(trouble) for protocol in (XkiProtocol(), XkiProtocol()))
        assert one is not other
        assert XksProtocol().refuse(trouble) is not XksProtocol().refuse(trouble)
    reader, writer = await connect(proxy)
    gc.collect()
    before = sum(isinstance(thing, Request) for thing in gc.get_objects())
    for _ in range(200):
        writer.write(f"GET {proxy.base}/health HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        assert (await read_answer(reader))[0] == 405
    gc.collect()
    assert sum(isinstance(thing, Request) for thing in gc.get_objects()) <= before + 3
    writer.close()


async def test_a_body_of_the_limit_is_served(proxy: Proxy) -> None:
    body = proxy.cloud.body(Filler="")
    body = proxy.cloud.body(Filler="x" * (64 * 1024 - len(body)))
    assert len(body) == 64 * 1024
    path = f"{proxy.base}/health"
    assert (await proxy.post(path, body, proxy.cloud.headers(path, body))).status == 200
    body += b" "
    answer = await proxy.post(path, body, proxy.cloud.headers(path, body))
    assert (answer.status, answer.code) == (413, "RequestTooLarge")


async def test_a_large_body_is_refused_before_it_is_sent(proxy: Proxy) -> None:
    reader, writer = await connect(proxy)
    head = f"POST {proxy.base}/health HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n"
    writer.write(head.encode())
    status, answer, fields = await read_answer(reader)
    assert (status, fields["Code"]) == (413, "RequestTooLarge")
    assert b"connection: close" in answer.lower()
    writer.close()


async def test_a_large_body_without_a_length_is_refused_while_it_comes(proxy: Proxy) -> None:
    reader, writer = await connect(proxy)
    head = f"POST {proxy.base}/health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    writer.write(head.encode())
    for _ in range(20):
        writer.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
    assert (await read_answer(reader))[0] == 413
    writer.close()


async def test_expect_100_continue(proxy: Proxy) -> None:
    reader, writer = await connect(proxy)
    data = request_bytes(proxy, proxy.cloud.body(), extra=b"expect: 100-continue\r\n")
    head, _, body = data.partition(b"\r\n\r\n")
    writer.write(head + b"\r\n\r\n")
    interim = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    assert interim.startswith(b"HTTP/1.1 100")
    writer.write(body)
    assert (await read_answer(reader))[0] == 200
    writer.close()


@pytest.mark.parametrize(
    "garbage",
    [b"hello\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"\0" * 100,
     b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
     b"POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
     b"POST / HTTP/1.1\r\n" + b"a: " + b"x" * 20000 + b"\r\n\r\n"],
)  # fmt: skip
async def test_what_is_no_http(proxy: Proxy, garbage: bytes) -> None:
    reader, writer = await connect(proxy)
    writer.write(garbage)
    status, head, fields = await read_answer(reader)
    assert (status, fields["Code"]) in {(400, "InvalidRequest"), (404, "XkiNotFound")}
    assert b"aiohttp" not in head
    writer.close()


async def test_compressed_bodies_are_not_expanded(proxy: Proxy) -> None:
    path, body = f"{proxy.base}/health", b"\x1f\x8b" + bytes(50)
    headers = {**proxy.cloud.headers(path, body), "content-encoding": "gzip"}
    answer = await proxy.post(path, body, headers)
    assert (answer.status, answer.code) == (400, "InvalidRequest")


async def test_a_client_that_hangs_up_in_the_middle_of_a_body(proxy: Proxy) -> None:
    _, writer = await connect(proxy)
    writer.write(request_bytes(proxy, proxy.cloud.body())[:-20])
    await writer.drain()
    writer.transport.abort()
    assert (await proxy.call("health")).status == 200
    for _ in range(100):
        if proxy.sample("xkiproxy_requests_in_flight") == 0:
            break
        await asyncio.sleep(0.02)
    assert proxy.sample("xkiproxy_requests_in_flight") == 0


class TestSlowClients:
    """Time limits, made short here."""

    @pytest.fixture
    def server_settings(self, tmp_path: Path) -> ServerSettings:
        make_certificate(tmp_path)
        tls = TlsSettings(
            certificate=tmp_path / "server.crt",
            private_key=SecretSource(file=tmp_path / "server.key"),
        )
        return ServerSettings(
            listen="127.0.0.1:0",
            tls=tls,
            handshake_timeout_seconds=0.3,
            header_timeout_seconds=0.3,
            body_timeout_seconds=0.3,
            idle_timeout_seconds=0.6,
        )

    async def test_a_header_that_never_ends(self, proxy: Proxy) -> None:
        reader, writer = await connect(proxy)
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\n")
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()

    async def test_a_second_header_that_never_ends(self, proxy: Proxy) -> None:
        reader, writer = await connect(proxy)
        writer.write(request_bytes(proxy, proxy.cloud.body()))
        assert (await read_answer(reader))[0] == 200
        writer.write(b"POST / HT")
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()

    async def test_a_body_that_never_ends(self, proxy: Proxy) -> None:
        reader, writer = await connect(proxy)
        writer.write(request_bytes(proxy, proxy.cloud.body())[:-1])
        status, _, fields = await read_answer(reader)
        assert (status, fields["Code"]) == (400, "InvalidRequest")
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()

    async def test_an_idle_connection(self, proxy: Proxy) -> None:
        reader, writer = await connect(proxy)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()

    async def test_a_handshake_that_never_begins(self, proxy: Proxy) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


class TestTls:
    @pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
    async def test_versions_and_suites(self, proxy: Proxy, version: ssl.TLSVersion) -> None:
        context = trusting(proxy)
        context.minimum_version = context.maximum_version = version
        _, writer = await connect(proxy, context)
        suite = writer.get_extra_info("cipher")[0]
        assert suite in {"TLS_AES_256_GCM_SHA384", "ECDHE-ECDSA-AES256-GCM-SHA384"}
        writer.close()

    @pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
    async def test_tls_1_1_is_refused(self, proxy: Proxy) -> None:
        context = trusting(proxy)
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await connect(proxy, context)

    @pytest.mark.parametrize(
        "suite", ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-SHA384"]
    )
    async def test_other_suites_of_tls_1_2_are_refused(self, proxy: Proxy, suite: str) -> None:
        context = trusting(proxy)
        context.maximum_version = TLS_1_2
        context.set_ciphers(suite)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await connect(proxy, context)

    async def test_other_suites_of_tls_1_3_are_refused(self, proxy: Proxy) -> None:
        """Only the openssl command can be told to offer one suite of TLS 1.3."""
        process = await asyncio.create_subprocess_exec(
            "openssl", "s_client", "-connect", f"127.0.0.1:{proxy.port}", "-tls1_3",
            "-ciphersuites", "TLS_AES_128_GCM_SHA256", "-quiet",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        head = f"GET {proxy.base}/health HTTP/1.1\r\nhost: x\r\n\r\n".encode()
        out, _ = await asyncio.wait_for(process.communicate(head), 20)
        assert b"HTTP/1.1" not in out


class TestClientCertificates:
    """mTLS: who has no right certificate never has a connection."""

    @pytest.fixture
    def server_settings(self, tmp_path: Path) -> ServerSettings:
        make_certificate(tmp_path)
        authority = make_certificate(tmp_path, "ca", common_name="Test CA", dns_names=())
        stranger = make_certificate(tmp_path, "stranger-ca", common_name="Other", dns_names=())
        right = ("cks.kms.cn-hangzhou.example.com",)
        make_certificate(tmp_path, "right", dns_names=right, issuer=authority)
        make_certificate(tmp_path, "wrong-name", dns_names=("evil.example",), issuer=authority)
        make_certificate(tmp_path, "wrong-ca", dns_names=right, issuer=stranger)
        make_certificate(
            tmp_path, "by-common-name", common_name=right[0], dns_names=(), issuer=authority
        )
        make_certificate(
            tmp_path, "common-name-hidden", common_name=right[0], dns_names=("evil.example",),
            issuer=authority,
        )  # fmt: skip
        tls = TlsSettings(
            certificate=tmp_path / "server.crt",
            private_key=SecretSource(file=tmp_path / "server.key"),
            client_ca=tmp_path / "ca.crt",
            client_names=right,
        )
        return ServerSettings(listen="127.0.0.1:0", tls=tls)

    def context(self, proxy: Proxy, name: str, version: ssl.TLSVersion) -> ssl.SSLContext:
        context = trusting(proxy)
        context.minimum_version = context.maximum_version = version
        if name:
            folder = proxy.certificate.parent
            context.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")
        return context

    @pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
    @pytest.mark.parametrize("name", ["right", "by-common-name"])
    async def test_right_names(self, proxy: Proxy, name: str, version: ssl.TLSVersion) -> None:
        reader, writer = await connect(proxy, self.context(proxy, name, version))
        writer.write(request_bytes(proxy, proxy.cloud.body()))
        assert (await read_answer(reader))[0] == 200
        writer.close()

    @pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
    @pytest.mark.parametrize("name", ["", "wrong-name", "wrong-ca", "common-name-hidden"])
    async def test_everybody_else(self, proxy: Proxy, name: str, version: ssl.TLSVersion) -> None:
        # Under TLS 1.3 a client ends its handshake first: it learns of the refusal as it reads.
        async def ask() -> None:
            reader, writer = await connect(proxy, self.context(proxy, name, version))
            writer.write(request_bytes(proxy, proxy.cloud.body()))
            await read_answer(reader)

        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            await ask()
        assert proxy.records() == []


class TestBadTlsFiles:
    def settings(self, folder: Path, **changed: Path) -> TlsSettings:
        make_certificate(folder)
        make_certificate(folder, "other")
        files = {"certificate": folder / "server.crt", "private_key": folder / "server.key"}
        files.update(changed)
        key = SecretSource(file=files.pop("private_key"))
        return TlsSettings(private_key=key, **files)

    def open(self, settings: TlsSettings) -> None:
        server_context(settings, read_tls(settings))

    def test_missing_certificate(self, tmp_path: Path) -> None:
        with pytest.raises(TlsError, match="no\\.crt: No such file"):
            self.open(self.settings(tmp_path, certificate=tmp_path / "no.crt"))

    def test_key_of_another_certificate(self, tmp_path: Path) -> None:
        with pytest.raises(TlsError, match="is not the key of"):
            self.open(self.settings(tmp_path, private_key=tmp_path / "other.key"))

    def test_garbage(self, tmp_path: Path) -> None:
        garbage = tmp_path / "garbage"
        garbage.write_text("nothing")
        garbage.chmod(0o600)
        for name in ("certificate", "private_key", "client_ca"):
            with pytest.raises(TlsError, match="garbage"):
                self.open(self.settings(tmp_path, **{name: garbage}))

    def test_key_that_others_can_read(self, tmp_path: Path) -> None:
        settings = self.settings(tmp_path)
        (tmp_path / "server.key").chmod(0o644)
        with pytest.raises(Exception, match="chmod 0600"):
            self.open(settings)


async def test_drain_finishes_what_has_begun(proxy: Proxy) -> None:
    """A request whose body is still coming is answered; idle connections end; none are taken."""
    reader, writer = await connect(proxy)
    data = request_bytes(proxy, proxy.cloud.body())
    writer.write(data[:-10])
    idle_reader, idle_writer = await connect(proxy)
    while proxy.sample("xkiproxy_requests_in_flight") == 0:
        await asyncio.sleep(0.01)
    draining = asyncio.create_task(proxy.listener.drain())
    assert await asyncio.wait_for(idle_reader.read(), 10) == b""
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(data[-10:])
    status, head, _ = await read_answer(reader)
    assert status == 200
    assert b"connection: close" in head.lower()
    await asyncio.wait_for(draining, 10)
    writer.close()
    idle_writer.close()


async def test_drain_does_not_wait_for_a_client_that_ignores_the_end_of_tls(proxy: Proxy) -> None:
    """As pools of connections do: what comes on an idle one is read with its next answer."""
    ready, stop = threading.Event(), threading.Event()

    def idle() -> None:
        raw = socket.create_connection(("127.0.0.1", proxy.port))
        with trusting(proxy).wrap_socket(raw, server_hostname="localhost") as client:
            client.sendall(request)
            client.recv(4096)
            ready.set()
            stop.wait(30)

    request = whole_request(proxy)
    thread = asyncio.create_task(asyncio.to_thread(idle))
    try:
        await asyncio.to_thread(ready.wait, 10)
        await asyncio.wait_for(proxy.listener.drain(), 6)
    finally:
        stop.set()
        with contextlib.suppress(OSError):
            await thread
