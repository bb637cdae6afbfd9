"""Connections that come through a load balancer: its PROXY header is read before TLS begins.

An event loop's own server starts TLS at once, so connections are accepted here, and handed to the
loop once their header has been read. Not a byte after the header is taken from the socket.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from xkiproxy.config.models import ProxyProtocolSettings
from xkiproxy.server.networks import Networks
from xkiproxy.server.proxy_protocol import (
    MAX_SIZE,
    ProxyProtocolError,
    header_size,
    parse_header,
)

_log = logging.getLogger(__name__)

_NO_DESCRIPTOR_SECONDS = 0.5
"""A pause after a connection that could not be accepted, as for want of descriptors."""

Refuse = Callable[[str], None]
"""Counts a refused connection: `untrusted`, `malformed`, `timeout` or `limit`."""


class ProxiedServer:
    """Accepts from a listening socket; like asyncio's `Server` it has `close`."""

    def __init__(
        self,
        sock: socket.socket,
        settings: ProxyProtocolSettings,
        make_protocol: Callable[[str], asyncio.Protocol],
        refuse: Refuse,
        limit: int,
        **tls: Any,
    ) -> None:
        """Begin to accept, in a running event loop.

        `make_protocol` takes the client's address (empty: that of the connection). `limit`: so
        many connections at most may be without a header or within the TLS handshake. `tls`: what
        the loop's `connect_accepted_socket` takes.
        """
        self._loop = asyncio.get_running_loop()
        self._socket = sock
        self._trusted = Networks(settings.trusted)
        self._seconds = settings.timeout_seconds
        self._make_protocol = make_protocol
        self._refuse = refuse
        self._limit = limit
        self._tls = tls
        self._beginning: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        """Accept no more; what has been accepted goes on."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _listen(self) -> None:
        # No task that awaits `sock_accept`: one that is cancelled in the round in which it has
        # accepted a connection loses that, and servers are exchanged at every reload.
        self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        try:
            client, address = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # another process has it, or it is no more
        except OSError as error:
            _log.error("a connection cannot be accepted: %s", error.strerror)
            self._loop.remove_reader(self._socket)
            self._pause = self._loop.call_later(_NO_DESCRIPTOR_SECONDS, self._listen)
            return
        client.setblocking(False)
        if not self._trusted.admit(str(address[0])):
            self._turn_away(client, "untrusted", f"{address[0]} is no trusted balancer")
        elif len(self._beginning) >= self._limit:
            self._turn_away(client, "limit", "too many connections have just begun")
        else:
            task = self._loop.create_task(self._begin(client))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

    async def _begin(self, client: socket.socket) -> None:
        """Read the header, then let the connection be one as any other."""
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(self._seconds):
                header = await _read_header(client)
            if not header:  # nothing came: a balancer that looks whether the port is open
                client.close()
                return
            source = parse_header(header)
        except ProxyProtocolError as error:
            self._turn_away(client, "malformed", str(error))
        except TimeoutError:
            self._turn_away(client, "timeout", "its PROXY header did not come in time")
        except OSError:
            client.close()
        except BaseException:
            client.close()
            raise
        else:
            with suppress(OSError, ssl.SSLError):  # the handshake failed, or the client has gone
                await self._loop.connect_accepted_socket(
                    lambda: self._make_protocol(source), client, **self._tls
                )

    def _turn_away(self, client: socket.socket, reason: str, text: str) -> None:
        _log.debug("a connection is closed: %s", text)
        self._refuse(reason)
        client.close()


async def _read_header(client: socket.socket) -> bytes:
    """The header's bytes and none after it; empty if the connection ends before its first byte.

    Raises:
        ProxyProtocolError: what comes is none.
        OSError: the connection is no more.
    """
    header = b""
    while True:
        seen = await _peek(client, MAX_SIZE - len(header))
        if not seen:
            if header:
                raise ProxyProtocolError("the connection ends within the PROXY header")
            return b""
        size = header_size(header + seen)
        # All that has been seen belongs to a header that is not whole yet.
        missing = len(seen) if size is None else min(size - len(header), len(seen))
        header += client.recv(missing)
        if size == len(header):
            return header


async def _peek(client: socket.socket, size: int) -> bytes:
    """What has come, up to `size` bytes, left where it is; empty at the end."""
    while True:
        try:
            return client.recv(size, socket.MSG_PEEK)
        except BlockingIOError:
            await _readable(client)


async def _readable(client: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(client, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(client)
