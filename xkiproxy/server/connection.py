"""A client's connection: one request after the other, in HTTP/1.1.

The parser is aiohttp's (llhttp). Its request and response objects, its task for each connection and
its timers for each request are not used: they cost more than all of the proxy's own work. A request
that needs no waiting is answered in the round of the event loop that brought its last byte; one
that waits for a KMI is resumed by the future that it waits for. Time limits are looked at by the
listener, a few times a second for all connections, so that a request sets no timer.

A connection is in one of these states, each with its time limit:

    idle       nothing of a request has come                 idle_timeout
    head       a part of its headers                         header_timeout
    body       its headers, a part of its body               body_timeout
    busy       all of it; the gateway works                  (the operation's deadline)
    ending     the last answer is written, the rest of what  LINGER_SECONDS
               the client still sends is thrown away, since
               a reset would take the answer from it
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Coroutine
from enum import Enum, auto
from typing import Any, cast

from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpRequestParser, HttpVersion11, RawRequestMessage
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web import RequestPayloadError

from xkiproxy.config.models import ServerSettings
from xkiproxy.protocols.base import Trouble
from xkiproxy.server.gateway import Gateway
from xkiproxy.server.http import Answer, Renderer, Request

LINGER_SECONDS = 2.0

_log = logging.getLogger(__name__)

_MAX_PIPELINED = 4
"""With so many requests waiting on a connection no more of it is parsed, and nothing is read."""

_TOGETHER = 32
"""So many answers at most leave together.

Requests that have come in one round of the loop are first all read, then all worked on, then all
committed and answered: each of these runs in less than half of the time when it does not alternate
with the others (caches), and a write to the audit log, and the waking of a client's machine, are
shared. With 64 connections that is worth 40 percent. An answer waits for at most this many others,
which had come before it could have left; where one request comes alone, nothing is delayed.
"""

_AT_ONCE = 64
"""So many requests (some 4 milliseconds) are worked on in one go.

Under a flood of many connections more of them would not fit into a processor's second cache.
"""

_MAX_LINE_SIZE = 8190
_MAX_HEADERS = 32
_NEVER = float("inf")


class State(Enum):
    """See the module."""

    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    BUSY = auto()
    ENDING = auto()


# The hot path asks for these ten times a request: a member by its class's name costs 65 ns.
_IDLE, _HEAD, _BODY, _BUSY, _ENDING = State


class Shared:
    """What the connections of a listener have in common."""

    def __init__(
        self, gateway: Gateway, settings: ServerSettings, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.gateway = gateway
        self.loop = loop
        self.connections: set[Connection] = set()
        self.has_ended = False
        """Nothing is served any more: a handshake that ends now has come too late."""
        self.renderer = Renderer()
        self.max_connections = settings.max_connections
        self.max_body_bytes = settings.max_body_bytes
        self.idle_seconds = settings.idle_timeout_seconds
        self.head_seconds = settings.header_timeout_seconds
        self.body_seconds = settings.body_timeout_seconds
        self._arrived: list[tuple[Connection, Request]] = []
        self._departing: list[tuple[Connection, Answer]] = []

    def arrive(self, connection: Connection, request: Request) -> None:
        """Take a request that is whole; it is worked on once all that has come is read."""
        self._arrived.append((connection, request))
        if len(self._arrived) == 1:
            self.loop.call_soon(self._work)
        elif len(self._arrived) >= _AT_ONCE:
            # Under a flood the loop reads on and on, and what was left for later waits too long.
            self._work()

    def _work(self) -> None:
        """Work on what has arrived, one after the other."""
        arrived, self._arrived = self._arrived, []
        for connection, request in arrived:
            connection.run(request)

    def depart(self, connection: Connection, answer: Answer) -> None:
        """Let an answer leave, together with those that are ready at the same time."""
        self._departing.append((connection, answer))
        if len(self._departing) == 1:
            self.loop.call_soon(self._flush)
        elif len(self._departing) >= _TOGETHER:
            self._flush()

    def _flush(self) -> None:
        """Commit what came of the requests, then write their answers."""
        departing, self._departing = self._departing, []
        try:
            self.gateway.commit([answer for _, answer in departing])
        except Exception:
            # Whatever it was: without a record no answer may leave.
            _log.exception("answers could not be committed")
            for connection, _ in departing:
                connection.abort()
            return
        for connection, answer in departing:
            connection.answer(answer)

    def expire(self, now: float) -> None:
        """End what is over its time limit; `now` on the loop's clock."""
        for connection in [c for c in self.connections if c.expires < now]:
            connection.expire()


class Connection(BaseProtocol):
    """See the module."""

    __slots__ = (
        "_body", "_broken", "_head", "_is_full", "_is_last", "_queue", "_request", "_shared",
        "_source", "expires", "state",
    )  # fmt: skip

    def __init__(self, shared: Shared, source: str = "") -> None:
        """`source`: the client's address, where the connection's own is that of a balancer."""
        # The parser pauses a stream at twice its limit, which no body that we take reaches.
        parser = HttpRequestParser(
            self,
            shared.loop,
            shared.max_body_bytes,
            max_line_size=_MAX_LINE_SIZE,
            max_field_size=_MAX_LINE_SIZE,
            max_headers=_MAX_HEADERS,
            max_msg_queue_size=_MAX_PIPELINED,
            payload_exception=RequestPayloadError,
            # A compressed body is not what was signed; it is refused as what it is, not JSON.
            auto_decompress=False,
        )
        super().__init__(shared.loop, parser)
        self._shared = shared
        self._queue: deque[tuple[RawRequestMessage, StreamReader]] = deque()
        self._request: Request | None = None
        self._head: RawRequestMessage | None = None
        self._body: StreamReader = EMPTY_PAYLOAD
        self._source = source
        self._is_full = False
        """The parser has stopped, and may hold what has been read already."""
        self._is_last = False
        """Nothing after what has been read is HTTP."""
        self._broken = False
        """And what came last was none either."""
        self.state = _IDLE
        self.expires = _NEVER

    # ---- asyncio.Protocol ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self._source and (peer := transport.get_extra_info("peername")):
            self._source = str(peer[0])
        if self._shared.has_ended:
            self.abort()
            return
        if len(self._shared.connections) >= self._shared.max_connections:
            self._shared.gateway.count_refused_connection()
            self.abort()
            return
        self._shared.connections.add(self)
        self.expires = self._loop.time() + self._shared.idle_seconds

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._shared.connections.discard(self)
        self._queue.clear()
        if self.state is _BODY:
            self._shared.gateway.in_flight -= 1
        self.state = _ENDING

    def data_received(self, data: bytes) -> None:
        state = self.state
        if state is _ENDING or self._is_last:
            return
        try:
            messages, upgraded, _ = self._parser.feed_data(data)  # type: ignore[union-attr]
        except HttpProcessingError:
            # What the parser refused has no length: nothing after it can be read.
            self._is_last = self._broken = True
        else:
            if messages:
                self._queue.extend(messages)
            elif state is _IDLE and data and not self._queue and not self._paused:
                self.state = _HEAD
                self.expires = self._loop.time() + self._shared.head_seconds
            if upgraded:
                self._is_last = True
        # One fewer: of a request that was begun before its body had come, the parser never learns
        # that it was taken, and may stop here and hold the rest.
        if len(self._queue) >= _MAX_PIPELINED - 1:
            self._is_full = True
            self._pause_transport_reading()
        if state is not _BUSY and not self._paused:
            self._advance()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.state is not _BUSY:
            self._advance()

    # ---- what aiohttp's streams ask for ------------------------------------------------------

    def pause_reading(self) -> None:
        """A body is over twice the limit: it will be refused when its turn comes."""
        self._is_full = True
        self._pause_transport_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Asked for whenever a body is taken; reading was never paused then."""

    # ---- requests --------------------------------------------------------------------------

    def _advance(self) -> None:
        """Go on with what has been read: begin a request, or take its body."""
        state = self.state
        if state is _BUSY or state is _ENDING or self._paused:
            return
        if state is not _BODY:
            if not self._queue:
                if self._broken:
                    self._answer_broken()
                return
            self._begin(*self._queue.popleft())
            self._parser.message_consumed()  # type: ignore[union-attr]
        request = cast(Request, self._request)
        if not self._body.is_eof() or self._body.exception() is not None:
            request.trouble = request.trouble or self._trouble_of_body()
            if request.trouble is None:
                return
        elif self._body.total_bytes > self._shared.max_body_bytes:
            request.trouble = Trouble.TOO_LARGE
        else:
            request.body = self._body.read_nowait()
        self.state = _BUSY
        self.expires = _NEVER
        self._shared.arrive(self, request)

    def _answer_broken(self) -> None:
        """All that was HTTP is answered; what came last was none."""
        self.state = _BUSY
        self._head = None
        self._shared.depart(self, self._shared.gateway.answer_not_http())

    def _begin(self, head: RawRequestMessage, body: StreamReader) -> None:
        """The headers of a request have come."""
        gateway = self._shared.gateway
        gateway.in_flight += 1
        self._head, self._body = head, body
        request = Request(head.method, head.path, head.raw_headers, self._source, gateway.clock())
        self._request = request
        self.state = _BODY
        if head.method != "POST":
            request.trouble = Trouble.METHOD_NOT_ALLOWED
        elif not body.is_eof():
            self._await_body(request, head)

    def _await_body(self, request: Request, head: RawRequestMessage) -> None:
        """A part of the body is still to come, if it may."""
        self._resume_transport_reading()  # it may have been paused for the requests before this
        self.expires = self._loop.time() + self._shared.body_seconds
        if int(head.headers.get("Content-Length", 0)) > self._shared.max_body_bytes:
            request.trouble = Trouble.TOO_LARGE
        elif head.headers.get("Expect", "").lower() == "100-continue":
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _trouble_of_body(self) -> Trouble | None:
        """What is wrong with a body that is not whole, if more of it would not help."""
        if self._body.total_bytes > self._shared.max_body_bytes:
            return Trouble.TOO_LARGE
        if self._body.exception() is not None or self._broken:
            return Trouble.NOT_HTTP
        return None

    def run(self, request: Request) -> None:
        """Let the gateway work on a request."""
        self._step(self._shared.gateway.handle(request))

    def _step(
        self, work: Coroutine[Any, Any, Answer], _: asyncio.Future[Any] | None = None
    ) -> None:
        """Run a request up to the next future that it waits for, or to its end.

        This is what an asyncio.Task does, without one: most requests wait for nothing, and a task
        costs as much as the signature.
        """
        try:
            future = work.send(None)
        except StopIteration as done:
            self._shared.gateway.in_flight -= 1
            self._request = None
            self._shared.depart(self, done.value)
        except (Exception, asyncio.CancelledError):
            _log.exception("a request failed outside of the gateway")
            self._shared.gateway.in_flight -= 1
            self.abort()
        else:
            step = functools.partial(self._step, work)
            if future is None:  # asyncio.sleep(0)
                self._loop.call_soon(step)
            else:
                future._asyncio_future_blocking = False
                future.add_done_callback(step)

    def answer(self, answer: Answer) -> None:
        """Write an answer that has been committed, unless the client has gone."""
        if self.transport is None:
            return
        head, render = self._head, self._shared.renderer.render
        if head is None:  # what came was no HTTP
            self._write(render(answer, close=True))
            self._end(whole=False)
            return
        whole = self._body.is_eof()
        close = (
            head.should_close
            or not whole
            or head.version < HttpVersion11
            or self._shared.gateway.draining
            or (self._is_last and not self._broken and not self._queue)
        )
        self._write(render(answer, close=close, without_body=head.method == "HEAD"))
        if close:
            self._end(whole)
            return
        self.state = _IDLE
        self.expires = self._loop.time() + self._shared.idle_seconds
        if self._queue:
            # Not at once: a client that sends many requests in one go must not hold up the others.
            self._loop.call_soon(self._advance)
        elif self._is_full:
            self._is_full = False
            self._resume_transport_reading()
            self._loop.call_soon(self.data_received, b"")
        elif self._broken:
            self._answer_broken()

    def _write(self, data: bytes) -> None:
        cast(asyncio.Transport, self.transport).write(data)

    # ---- time and the end ------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether nothing of a request has come."""
        return self.state is _IDLE and not self._queue

    def expire(self) -> None:
        """The time limit of its state is over."""
        if self.state is _BODY and self._request is not None and not self._paused:
            self._request.trouble = Trouble.BODY_TIMEOUT
            self._advance()
        else:
            self.abort()

    def abort(self) -> None:
        """Close the connection now; what was not sent is lost."""
        if self.transport is not None:
            self.transport.abort()

    def close(self) -> None:
        """Close the connection once what was written is sent."""
        if self.transport is not None:
            self.transport.close()

    def finish(self) -> None:
        """Close an idle connection: soon, even if its client does not answer that TLS ends."""
        self._end(whole=True)

    def _end(self, whole: bool) -> None:
        """No further request; `whole`: the client has nothing left to send of the last one."""
        self.state = _ENDING
        self.expires = self._loop.time() + LINGER_SECONDS
        if whole:
            self.close()
        else:
            self._resume_transport_reading()
