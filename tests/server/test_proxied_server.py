"""A server behind a load balancer that sends PROXY headers: a real haproxy, and raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import http.client
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from test_end_to_end import BASE, wait_for
from test_proxy_protocol import V4, version_2
from test_workers import Workers

from xkiproxy.config.models import ProxyProtocolSettings
from xkiproxy.server.proxied import ProxiedServer

_HAPROXY = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
_CLIENT = "127.0.0.2"


class Balanced(Workers):
    """An installation that wants PROXY headers of 127.0.0.1."""

    def __init__(self, directory: Path, workers: int) -> None:
        super().__init__(directory, workers)
        with self.config.open("a") as file:
            file.write('source_networks = ["127.0.0.2/32", "192.168.0.1/32", "127.0.0.1/32"]\n')
            file.write('[server.proxy_protocol]\ntrusted = ["127.0.0.1/32"]\ntimeout_seconds = 1\n')

    def refused(self, reason: str) -> float:
        return self.sample("xkiproxy_proxy_protocol_refused_total", reason=reason)

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), 10, source_address=(source, 0))
        sock.settimeout(10)
        return sock

    def health(self, port: int, source: str = _CLIENT) -> int:
        """The status of a call through a balancer on `port`."""
        path, body = f"{BASE}/health", self.cloud.body()
        connection = http.client.HTTPSConnection(
            "localhost", port, context=self.trust, timeout=30, source_address=(source, 0)
        )
        with contextlib.closing(connection):
            connection.request("POST", path, body, self.cloud.headers(path, body))
            return connection.getresponse().status

    def health_on(self, sock: socket.socket) -> int:
        """The status of a call on a connection whose header has been sent."""
        path, body = f"{BASE}/health", self.cloud.body()
        with self.trust.wrap_socket(sock, server_hostname="localhost") as secured:
            connection = http.client.HTTPConnection("localhost", self.port)
            connection.sock = secured
            connection.request("POST", path, body, self.cloud.headers(path, body))
            return connection.getresponse().status


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Balanced]:
    made = Balanced(tmp_path / "demo", request.param)
    made.start()
    yield made
    made.stop()


@pytest.fixture(params=["send-proxy", "send-proxy-v2"])
def balancer(request: pytest.FixtureRequest, server: Balanced, tmp_path: Path) -> Iterator[int]:
    """The port of a real haproxy in front of the server."""
    assert _HAPROXY, "haproxy is missing: run tests/system-packages.sh"
    port = free_port()
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "defaults\n mode tcp\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n"
        f"listen all\n bind 127.0.0.1:{port}\n"
        f" server proxy 127.0.0.1:{server.port} {request.param} check inter 100ms\n"
    )
    with (tmp_path / "haproxy.log").open("w") as log:
        process = subprocess.Popen([_HAPROXY, "-db", "-f", str(config)], stdout=log, stderr=log)
    wait_for(lambda: _is_open(port))
    yield port
    process.terminate()
    process.wait(timeout=20)


def _is_open(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_haproxy_passes_the_clients_address_on(server: Balanced, balancer: int) -> None:
    assert server.health(balancer) == 200
    assert server.records()[-1]["source"] == _CLIENT
    assert server.health(balancer, "127.0.0.3") == 403  # in none of the source networks
    denied = [record for record in server.records() if record.get("reason") == "source_network"]
    assert [record["source"] for record in denied] == ["127.0.0.3"]
    time.sleep(0.5)  # haproxy looks after its servers meanwhile
    server.run("reload")
    assert server.health(balancer) == 200
    assert server.refused("malformed") == 0


@pytest.mark.parametrize("header", [
    b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n", version_2(V4)
])  # fmt: skip
def test_a_header_in_single_bytes_and_one_with_the_first_bytes_of_tls(
    server: Balanced, header: bytes
) -> None:
    with server.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in header:
            sock.sendall(bytes([byte]))
            time.sleep(0.001)
        assert server.health_on(sock) == 200
    assert server.records()[-1]["source"] == "192.168.0.1"
    with server.connect() as sock:
        _together(sock, header, server)


def _together(sock: socket.socket, header: bytes, server: Balanced) -> None:
    """The header and the client's hello in one write."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    secured = server.trust.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        secured.do_handshake()
    sock.sendall(header + outgoing.read())
    while True:
        try:
            secured.do_handshake()
        except ssl.SSLWantReadError:
            data = sock.recv(1 << 16)
            assert data
            incoming.write(data)
        else:
            return


def test_a_balancer_that_speaks_for_itself(server: Balanced) -> None:
    for header in (version_2(b"", command=0x20, family=0), b"PROXY UNKNOWN\r\n"):
        with server.connect() as sock:
            sock.sendall(header)
            assert server.health_on(sock) == 200
        assert server.records()[-1]["source"] == "127.0.0.1"


def test_who_is_turned_away(server: Balanced) -> None:
    good = b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"
    cases = [
        ("127.0.0.1", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "malformed", 1),
        ("127.0.0.1", b"PROXY TCP4 1.2.3.4 nowhere 1 2\r\n", "malformed", 2),
        ("127.0.0.1", version_2(V4, command=0x2F), "malformed", 3),
        ("127.0.0.1", b"", "timeout", 1),
        ("127.0.0.1", good[:19], "timeout", 2),
        ("127.0.0.2", good, "untrusted", 1),
    ]
    for source, data, reason, count in cases:
        with server.connect(source) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(data)
            assert sock.recv(1) == b""  # closed, without a word
        wait_for(lambda reason=reason, count=count: server.refused(reason) == count)
    assert server.records() == []  # none became a request


def test_without_a_balancer_there_is_no_tls(server: Balanced) -> None:
    with server.connect() as sock, pytest.raises((ssl.SSLError, ConnectionError)):
        server.trust.wrap_socket(sock, server_hostname="localhost")
    wait_for(lambda: server.refused("malformed") == 1)


def _sockets(pid: int) -> int:
    """How many a process has open; SQLite keeps a file or two more now and then."""
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += str(descriptor.readlink()).startswith("socket:")
    return count


def test_nothing_is_left_of_connections_that_fail(tmp_path: Path) -> None:
    server = Balanced(tmp_path / "demo", 1)
    server.start()
    try:
        assert server.process is not None
        sockets = functools.partial(_sockets, server.process.pid)
        before = sockets()
        header = b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"
        for data in (b"", header[:9], header + b"no TLS at all\r\n", header, b"nothing of it"):
            for _ in range(20):
                with server.connect() as sock:
                    sock.sendall(data)
        wait_for(lambda: sockets() <= before)
        # An end within a header is malformed, an end before it no fault of anybody.
        wait_for(lambda: server.refused("malformed") == 40)
        with server.connect() as sock:
            sock.sendall(header)
            assert server.health_on(sock) == 200
    finally:
        server.stop()


class _Greeting(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        transport.write(b"hello")


@pytest.mark.parametrize("comes_first", [True, False])
async def test_a_connection_that_comes_with_the_exchange_is_not_lost(comes_first: bool) -> None:
    """One of the two servers greets it, whichever of both the loop meets first in a round."""
    loop = asyncio.get_running_loop()
    settings = ProxyProtocolSettings.model_validate({"trusted": ["127.0.0.1/32"]})
    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as stack:
        listening.setblocking(False)
        servers: list[ProxiedServer] = []

        def exchange() -> None:
            ours.recv(1)
            sock = listening.dup()
            sock.setblocking(False)
            servers.append(ProxiedServer(
                sock, settings, lambda _: _Greeting(), lambda _: None, 10, ssl=None
            ))  # fmt: skip
            for server in servers[:-1]:
                server.close()

        ours, theirs = (stack.enter_context(sock) for sock in socket.socketpair())
        loop.add_reader(ours, exchange)
        stack.callback(loop.remove_reader, ours)
        theirs.send(b".")
        await asyncio.sleep(0.1)
        for _ in range(3):
            # The loop waits meanwhile: both are there when it looks.
            if not comes_first:
                theirs.send(b".")
            client = stack.enter_context(socket.create_connection(listening.getsockname()))
            client.sendall(b"PROXY UNKNOWN\r\n")
            if comes_first:
                theirs.send(b".")
            client.setblocking(False)
            assert await asyncio.wait_for(loop.sock_recv(client, 5), 10) == b"hello"
        assert len(servers) == 4
        servers[-1].close()


async def test_without_descriptors_it_accepts_later(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listening(socket.socket):
        fails = 2

        def accept(self) -> tuple[socket.socket, Any]:
            if self.fails:
                self.fails -= 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().accept()

    monkeypatch.setattr("xkiproxy.server.proxied._NO_DESCRIPTOR_SECONDS", 0.05)
    settings = ProxyProtocolSettings.model_validate({"trusted": ["127.0.0.1/32"]})
    sock = Listening()
    sock.setblocking(False)
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    server = ProxiedServer(sock, settings, lambda _: _Greeting(), lambda _: None, 10, ssl=None)
    with socket.create_connection(sock.getsockname()) as client:
        client.sendall(b"PROXY UNKNOWN\r\n")
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        assert await asyncio.wait_for(loop.sock_recv(client, 5), 10) == b"hello"
    sock.fails = 1
    with socket.create_connection(sock.getsockname()):
        await asyncio.sleep(0.02)
        server.close()  # while it pauses
    await asyncio.sleep(0.1)
