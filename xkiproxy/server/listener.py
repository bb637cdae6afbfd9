"""The public listener: opened, watched over and drained as one."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from contextlib import suppress
from typing import Any

from xkiproxy.config.models import ServerSettings, split_address
from xkiproxy.server.connection import Connection, Shared
from xkiproxy.server.gateway import Gateway
from xkiproxy.server.proxied import ProxiedServer

_log = logging.getLogger(__name__)

_BACKLOG = 2048
_DRAIN_STEP_SECONDS = 0.02
_WATCH_SECONDS = 1.0
"""Time limits of connections are looked at that often, or more often where one is short."""


class Listener:
    """The public address."""

    def __init__(
        self,
        gateway: Gateway,
        settings: ServerSettings,
        context: ssl.SSLContext | None,
        *,
        shares_port: bool = False,
    ) -> None:
        self._shares_port = shares_port
        self._gateway = gateway
        self._settings = settings
        self._context = context
        self._shared: Shared | None = None
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | ProxiedServer | None = None
        self._watch: asyncio.Task[None] | None = None
        self.address: tuple[str, int] = ("", 0)

    async def open(self) -> None:
        """Bind and accept; raises OSError."""
        loop = asyncio.get_running_loop()
        self._socket = bind(self._settings.listen, shares_port=self._shares_port)
        self._shared = Shared(self._gateway, self._settings, loop)
        self._server = await self._accept(self._shared)
        self._watch = loop.create_task(_watch_over(self._shared))
        self.address = self._socket.getsockname()[:2]

    async def use(self, context: ssl.SSLContext | None) -> None:
        """Meet new connections with another context; raises OSError, and then nothing changes."""
        if self._shared is None or self._server is None:
            return
        before, self._context = self._context, context
        try:
            server = await self._accept(self._shared)
        except BaseException:
            self._context = before
            raise
        # Both accept from the same queue of the kernel: no client notices.
        self._server.close()
        self._server = server

    async def _accept(self, shared: Shared) -> asyncio.Server | ProxiedServer:
        tls: dict[str, Any] = {"ssl": self._context}
        if self._context is not None:
            tls["ssl_handshake_timeout"] = self._settings.handshake_timeout_seconds
        assert self._socket is not None  # noqa: S101 - open() comes first
        sock = self._socket.dup()
        behind = self._settings.proxy_protocol
        if behind is None:
            return await shared.loop.create_server(
                lambda: Connection(shared), sock=sock, backlog=_BACKLOG, **tls
            )
        sock.setblocking(False)
        sock.listen(_BACKLOG)
        return ProxiedServer(
            sock,
            behind,
            lambda source: Connection(shared, source),
            self._gateway.count_unproxied_connection,
            self._settings.max_connections,
            **tls,
        )

    async def drain(self) -> None:
        """Stop accepting, let requests that have begun finish, and close all connections."""
        if self._server is None or self._shared is None or self._watch is None:
            return
        self._gateway.draining = True
        self._server.close()
        if self._socket is not None:
            self._socket.close()
        connections = self._shared.connections
        deadline = asyncio.get_running_loop().time() + self._settings.shutdown_timeout_seconds
        while connections and asyncio.get_running_loop().time() < deadline:
            for connection in [c for c in connections if c.is_idle]:
                connection.finish()
            await asyncio.sleep(_DRAIN_STEP_SECONDS)
        self._shared.has_ended = True
        if connections:
            _log.warning("%d connections were cut off", len(connections))
        for connection in list(connections):
            connection.abort()
        self._watch.cancel()
        with suppress(asyncio.CancelledError):
            await self._watch


async def _watch_over(shared: Shared) -> None:
    """Let every connection end that is over its time limit."""
    shortest = min(shared.idle_seconds, shared.head_seconds, shared.body_seconds)
    pause = min(_WATCH_SECONDS, shortest / 4)
    while True:
        await asyncio.sleep(pause)
        shared.expire(shared.loop.time())


def bind(address: str, *, shares_port: bool = False) -> socket.socket:
    """A TCP socket bound to "host:port"; raises OSError that names the address.

    `shares_port`: other processes of this user may bind to it too (SO_REUSEPORT), and the kernel
    spreads the connections over those that listen.
    """
    host, port = split_address(address)
    try:
        family, kind, protocol, _, resolved = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shares_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(resolved)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {address}: {error.strerror}") from None
    sock.setblocking(False)
    return sock
