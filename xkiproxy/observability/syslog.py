"""Syslog messages of RFC 5424 over TCP with octet counting (RFC 6587) or TLS (RFC 5425).

A socket is written to directly and never blocks: what `send` has accepted is the kernel's, and
goes out even if this process is killed.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from xkiproxy.observability.audit import AuditError
from xkiproxy.observability.outlet import Wire, reason

FACILITIES = (
    "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv",
    "ftp", "ntp", "audit", "alert", "clock", "local0", "local1", "local2", "local3", "local4",
    "local5", "local6", "local7",
)  # fmt: skip
"""By their numbers (RFC 5424, 6.2.1)."""

_INFORMATIONAL = 6
_READ_SIZE = 1 << 16
_SEND_BUFFER = 256 << 10
"""Of the kernel (which takes the double): a server that stalls is to be noticed soon."""


def syslog_frame(facility: str, app_name: str, procid: str) -> Callable[[Sequence[bytes]], bytes]:
    """What makes messages of lines: each line is the MSG of one, unchanged, without a BOM."""
    priority = FACILITIES.index(facility) * 8 + _INFORMATIONAL
    host = _printable(socket.gethostname(), 255)
    names = f"{host} {_printable(app_name, 48)} {_printable(procid, 128)} audit -"

    def frame(lines: Sequence[bytes]) -> bytes:
        now = datetime.now(UTC)
        head = f"<{priority}>1 {now:%Y-%m-%dT%H:%M:%S.%f}Z {names} ".encode("ascii")
        size = len(head)
        return b"".join([b"%d %b%b" % (size + len(line), head, line) for line in lines])

    return frame


def _printable(text: str, size: int) -> str:
    """A field of the header: printable ASCII without blanks; `-` is none (RFC 5424, 6)."""
    return re.sub(r"[^!-~]", "_", text)[:size] or "-"


@dataclass(frozen=True, slots=True)
class SyslogServer:
    """Where a syslog server is, and how long it may take."""

    host: str
    port: int
    connect_seconds: float
    ack_seconds: float
    """After so long without an acknowledgement the kernel gives a connection up."""
    make_context: Callable[[], ssl.SSLContext] | None = None
    """For TLS; called for every connection, so that renewed certificates are used."""
    server_name: str = ""

    async def connect(self) -> Wire:
        """A new connection; raises OSError or AuditError with the address in its text."""
        where = f"{self.host}:{self.port}"
        try:
            async with asyncio.timeout(self.connect_seconds):
                return await self._connect()
        except TimeoutError:
            text = f"{where}: no connection within {self.connect_seconds:g} s"
            raise AuditError(text) from None
        except OSError as error:
            raise AuditError(f"{where}: {reason(error)}") from None

    async def _connect(self) -> Wire:
        context = None if self.make_context is None else self.make_context()
        sock = await self._open_socket()
        try:
            if context is None:
                return _TcpWire(sock)
            sock = context.wrap_socket(
                sock, server_hostname=self.server_name or self.host, do_handshake_on_connect=False
            )
            await _shake_hands(sock)
            return _TlsWire(sock)
        except BaseException:
            sock.close()
            raise

    async def _open_socket(self) -> socket.socket:
        """A connected socket to the first address that answers."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        failure: OSError | None = None
        for family, kind, protocol, _, address in found:
            sock = socket.socket(family, kind, protocol)
            try:
                self._prepare(sock)
                await loop.sock_connect(sock, address)
            except OSError as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        if failure is None:
            raise OSError("the name has no address")
        code = failure.errno
        # asyncio's own text repeats the address.
        raise failure if code is None else OSError(code, os.strerror(code))

    def _prepare(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        milliseconds = int(self.ack_seconds * 1000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        # A server that has gone without a word is found out while there is nothing to send, too.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        seconds = max(1, int(self.ack_seconds))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)


class _TcpWire:
    """A socket that never blocks."""

    tells_its_end = True

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.fileno = sock.fileno
        self.send = sock.send

    def receive(self) -> bool:
        """See `Wire`: a syslog server says nothing, but it may end."""
        return bool(self._socket.recv(_READ_SIZE))

    def close(self) -> None:
        """See `Wire`: a socket closed with something unread would take back what was sent."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
            while self._socket.recv(_READ_SIZE):
                pass
        finally:
            self._socket.close()


class _TlsWire:
    """The same with TLS."""

    tells_its_end = True

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._socket = sock
        self.fileno = sock.fileno
        self.send = sock.send

    def receive(self) -> bool:
        """See `Wire`: tickets and the like are read by the way."""
        return bool(self._socket.recv(_READ_SIZE))

    def close(self) -> None:
        """See `Wire`: with a close_notify (RFC 5425, 4.4), whose answer is not waited for."""
        sock = self._socket
        try:
            with suppress(OSError, ValueError):
                sock.unwrap()
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        finally:
            sock.close()


async def _shake_hands(sock: ssl.SSLSocket) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            sock.do_handshake()
        except ssl.SSLWantReadError:
            ready = asyncio.Event()
            loop.add_reader(sock.fileno(), ready.set)
            try:
                await ready.wait()
            finally:
                loop.remove_reader(sock.fileno())
        except ssl.SSLWantWriteError:
            await asyncio.sleep(0.01)  # a new connection has room; if not, soon
        else:
            return
