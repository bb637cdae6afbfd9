"""The public listener: aiohttp's HTTP machinery with our limits and our words for its errors."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from typing import Any

from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web import BaseRequest, RequestHandler, Server, StreamResponse

from xkiproxy.config.models import ServerSettings, split_address
from xkiproxy.server.gateway import Gateway

_log = logging.getLogger(__name__)

_BACKLOG = 2048
_LINGER_SECONDS = 2.0
_DRAIN_STEP_SECONDS = 0.02


class _Connection(RequestHandler):
    """A client's connection: a header that dribbles in has a time limit of its own."""

    __slots__ = ("_gateway", "_header_timeout", "_header_timer")

    def __init__(self, server: _HttpServer, **options: Any) -> None:
        super().__init__(server, **options)
        self._gateway = server.gateway
        self._header_timeout = server.header_timeout
        self._header_timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.is_waiting:
            # Bytes came, yet no whole header: someone is slow, or holds connections open.
            if self._header_timer is None:
                loop = asyncio.get_running_loop()
                self._header_timer = loop.call_later(self._header_timeout, self.force_close)
        elif self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
        super().connection_lost(exc)

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for a request's header."""
        return self._waiter is not None and not self._waiter.done()

    @property
    def is_idle(self) -> bool:
        """Whether nothing of a request has come."""
        return self.is_waiting and self._header_timer is None

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> StreamResponse:
        """Replaces aiohttp's page, which would tell of it, and its log, which would show bytes."""
        del request, message
        if status >= 500:
            _log.error("a request failed outside of the gateway", exc_info=exc)
        return self._gateway.answer_not_http()


class _HttpServer(Server):
    """Makes a connection object for each client."""

    def __init__(self, gateway: Gateway, settings: ServerSettings) -> None:
        super().__init__(
            gateway.handle,
            request_factory=self._new_request,
            access_log=None,
            keepalive_timeout=settings.idle_timeout_seconds,
            lingering_time=_LINGER_SECONDS,
            # A compressed body is not what was signed; it is refused as what it is, not JSON.
            auto_decompress=False,
        )
        self.gateway = gateway
        self.header_timeout = settings.header_timeout_seconds
        self._max_body_bytes = settings.max_body_bytes

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)

    def _new_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> BaseRequest:
        return BaseRequest(
            message, payload, protocol, writer, task, self._loop,
            client_max_size=self._max_body_bytes,
        )  # fmt: skip


class Listener:
    """The public address: opened, drained and closed as one."""

    def __init__(
        self, gateway: Gateway, settings: ServerSettings, context: ssl.SSLContext | None
    ) -> None:
        self._gateway = gateway
        self._settings = settings
        self._context = context
        self._http = _HttpServer(gateway, settings)
        self._server: asyncio.Server | None = None
        self.address: tuple[str, int] = ("", 0)

    async def open(self) -> None:
        """Bind and accept; raises OSError."""
        loop = asyncio.get_running_loop()
        timeouts: dict[str, Any] = {}
        if self._context is not None:
            timeouts["ssl_handshake_timeout"] = self._settings.handshake_timeout_seconds
        sock = bind(self._settings.listen)
        self._server = await loop.create_server(
            self._http, sock=sock, ssl=self._context, backlog=_BACKLOG, **timeouts
        )
        self.address = sock.getsockname()[:2]

    async def drain(self) -> None:
        """Stop accepting, let requests that have begun finish, and close all connections."""
        if self._server is None:
            return
        self._gateway.draining = True
        self._server.close()
        deadline = asyncio.get_running_loop().time() + self._settings.shutdown_timeout_seconds
        while self._http.connections and asyncio.get_running_loop().time() < deadline:
            for connection in self._http.connections:
                if isinstance(connection, _Connection) and connection.is_idle:
                    connection.force_close()
            await asyncio.sleep(_DRAIN_STEP_SECONDS)
        if self._http.connections:
            _log.warning("%d connections were cut off", len(self._http.connections))
        await self._http.shutdown(timeout=1.0)


def bind(address: str) -> socket.socket:
    """A listening TCP socket at "host:port"; raises OSError that names the address."""
    host, port = split_address(address)
    try:
        family, kind, protocol, _, resolved = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(resolved)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {address}: {error.strerror}") from None
    sock.setblocking(False)
    return sock
