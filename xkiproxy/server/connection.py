"""A client's connection: one request after the other, in HTTP/1.1.

The parser is aiohttp's (llhttp). Its request and response objects, its task for each connection and
its timers for each request are not used: they cost more than all of the proxy's own work. A request
that needs no waiting is answered within the call that received its last byte; one that waits for a
KMI is resumed by the future that it waits for. Time limits are looked at by the listener, a few
times a second for all connections, so that a request sets no timer.

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
from aiohttp.streams import StreamReader
from aiohttp.web import RequestPayloadError

from xkiproxy.config.models import ServerSettings
from xkiproxy.protocols.base import Trouble
from xkiproxy.server.gateway import Gateway
from xkiproxy.server.http import Answer, Renderer, Request

LINGER_SECONDS = 2.0

_log = logging.getLogger(__name__)

_MAX_PIPELINED = 16
"""With more requests waiting on a connection nothing is read from it."""

_TOGETHER = 8
"""So many answers at most leave together.

A write to the audit log and a write that wakes the client's side cost as much as a third of a
request. Where requests are waiting already, they are made for several answers at once; where none
is, nothing is delayed.
"""

_MAX_LINE_SIZE = 8190
_NEVER = float("inf")


class State(Enum):
    """See the module."""

    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    BUSY = auto()
    ENDING = auto()


class Departure:
    """An answer on its way out; `whole`: the client has nothing left to send of its request."""

    __slots__ = ("answer", "close", "connection", "whole", "without_body")

    def __init__(
        self, connection: Connection, answer: Answer, close: bool, whole: bool, without_body: bool
    ) -> None:
        self.connection = connection
        self.answer = answer
        self.close = close
        self.whole = whole
        self.without_body = without_body


class Shared:
    """What the connections of a listener have in common."""

    def __init__(
        self, gateway: Gateway, settings: ServerSettings, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.gateway = gateway
        self.loop = loop
        self.connections: set[Connection] = set()
        self.renderer = Renderer()
        self._departures: list[Departure] = []
        self.max_body_bytes = settings.max_body_bytes
        self.limits = {
            State.IDLE: settings.idle_timeout_seconds,
            State.HEAD: settings.header_timeout_seconds,
            State.BODY: settings.body_timeout_seconds,
            State.BUSY: _NEVER,
            State.ENDING: LINGER_SECONDS,
        }

    def send(self, departure: Departure) -> None:
        """Let an answer leave, together with those that are ready at the same time."""
        self._departures.append(departure)
        if len(self._departures) == 1:
            self.loop.call_soon(self.flush)
        elif len(self._departures) >= _TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Commit what came of the requests, then write their answers."""
        departures, self._departures = self._departures, []
        self.gateway.commit([departure.answer for departure in departures])
        for departure in departures:
            departure.connection.depart(departure)

    def expire(self, now: float) -> None:
        """End what is over its time limit; `now` on the loop's clock."""
        for connection in [c for c in self.connections if c.expires < now]:
            connection.expire()


class Connection(BaseProtocol):
    """See the module."""

    __slots__ = (
        "_body", "_broken", "_head", "_is_last", "_queue", "_request", "_shared", "_source",
        "expires", "state",
    )  # fmt: skip

    def __init__(self, shared: Shared) -> None:
        # The parser pauses a stream at twice its limit, which no body that we take reaches.
        parser = HttpRequestParser(
            self,
            shared.loop,
            shared.max_body_bytes,
            max_line_size=_MAX_LINE_SIZE,
            max_field_size=_MAX_LINE_SIZE,
            payload_exception=RequestPayloadError,
            # A compressed body is not what was signed; it is refused as what it is, not JSON.
            auto_decompress=False,
        )
        super().__init__(shared.loop, parser)
        self._shared = shared
        self._queue: deque[tuple[RawRequestMessage, StreamReader]] = deque()
        self._request: Request | None = None
        self._head: RawRequestMessage | None = None
        self._body: StreamReader | None = None
        self._source = ""
        self._is_last = False
        """Nothing after what has been read is HTTP."""
        self._broken = False
        """And what came last was none either."""
        self.state = State.IDLE
        self.expires = _NEVER

    # ---- asyncio.Protocol ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self._source = str(peer[0]) if peer else ""
        self._shared.connections.add(self)
        self._become(State.IDLE)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._shared.connections.discard(self)
        self._queue.clear()
        if self._request is not None:
            self._shared.gateway.in_flight -= 1
            self._request = self._body = None
        self.state = State.ENDING

    def data_received(self, data: bytes) -> None:
        if self.state is State.ENDING or self._is_last:
            return
        assert self._parser is not None  # noqa: S101 - BaseProtocol may have none; this has
        try:
            messages, upgraded, _ = self._parser.feed_data(data)
        except HttpProcessingError:
            # What the parser refused has no length: nothing after it can be read.
            self._is_last = self._broken = True
        else:
            self._queue.extend(messages)
            self._is_last = upgraded
        if self.state is State.BUSY or self._paused:
            if len(self._queue) > _MAX_PIPELINED:
                self._pause_transport_reading()
            return
        self._advance()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.state is not State.BUSY:
            self._advance()

    # ---- what aiohttp's streams ask for ------------------------------------------------------

    def pause_reading(self) -> None:
        """A body is over twice the limit: it will be refused when its turn comes."""
        self._pause_transport_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Asked for whenever a body is taken; reading was never paused then."""

    # ---- requests --------------------------------------------------------------------------

    def _advance(self) -> None:
        """Go on with what has been read: begin a request, its body, or wait for more."""
        if self.transport is None or self.state in {State.BUSY, State.ENDING} or self._paused:
            return
        if self._request is None:
            if not self._queue:
                self._wait()
                return
            self._begin(*self._queue.popleft())
        request, body = self._request, self._body
        if request is None or body is None:
            return
        if request.trouble is None and not self._take_body(request, body):
            if self.state is not State.BODY:
                self._become(State.BODY)
            return
        self._run(request)

    def _wait(self) -> None:
        """Nothing whole is there: for how long may the client take?"""
        if self._broken:
            self._refuse_unreadable()
        elif self.state is State.IDLE:
            self._become(State.HEAD)

    def _begin(self, head: RawRequestMessage, body: StreamReader) -> None:
        gateway = self._shared.gateway
        request = Request(head.method, head.path, head.raw_headers, self._source, gateway.clock())
        gateway.in_flight += 1
        self._request, self._head, self._body = request, head, body
        request.trouble = self._trouble_of(head)
        expects = head.headers.get("Expect", "").lower() == "100-continue"
        if expects and request.trouble is None and not body.is_eof():
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _trouble_of(self, head: RawRequestMessage) -> Trouble | None:
        """What is wrong as soon as the headers are there."""
        if head.method != "POST":
            return Trouble.METHOD_NOT_ALLOWED
        length = head.headers.get("Content-Length")
        if length is not None and int(length) > self._shared.max_body_bytes:
            return Trouble.TOO_LARGE
        return None

    def _take_body(self, request: Request, body: StreamReader) -> bool:
        """Whether there is no more to wait for: the body is whole, too large, or broken."""
        if body.total_bytes > self._shared.max_body_bytes:
            request.trouble = Trouble.TOO_LARGE
        elif body.exception() is not None or (self._broken and not body.is_eof()):
            request.trouble = Trouble.NOT_HTTP
        elif not body.is_eof():
            return False
        else:
            request.body = body.read_nowait()
        return True

    def _run(self, request: Request) -> None:
        self.state = State.BUSY
        self.expires = _NEVER
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
            self._finish(done.value)
        except Exception:
            _log.exception("a request failed outside of the gateway")
            self._end_request()
            self.abort()
        else:
            step = functools.partial(self._step, work)
            if future is None:  # asyncio.sleep(0)
                self._loop.call_soon(step)
            else:
                future._asyncio_future_blocking = False
                future.add_done_callback(step)

    def _finish(self, answer: Answer) -> None:
        head, body = self._head, self._body
        self._end_request()
        if head is None or body is None:  # the client has gone; its record is written all the same
            self._shared.send(Departure(self, answer, close=True, whole=True, without_body=True))
            return
        whole = body.is_eof()
        close = (
            head.should_close
            or head.version < HttpVersion11
            or not whole
            or self._shared.gateway.draining
            or (self._is_last and not self._broken and not self._queue)
        )
        without_body = head.method == "HEAD"
        self._shared.send(Departure(self, answer, close, whole, without_body))

    def depart(self, departure: Departure) -> None:
        """Write an answer that has been committed."""
        if self.transport is None:
            return
        answer, close = departure.answer, departure.close
        render = self._shared.renderer.render
        self._write(render(answer, close=close, without_body=departure.without_body))
        if close:
            self._end(departure.whole)
            return
        self._become(State.IDLE)
        if self._queue:
            # Not at once: a client that sends many requests in one go must not hold up the others.
            self._loop.call_soon(self._advance)
            if len(self._queue) <= _MAX_PIPELINED // 2:
                self._resume_transport_reading()

    def _end_request(self) -> None:
        if self._request is not None:
            self._shared.gateway.in_flight -= 1
        self._request = self._head = self._body = None

    def _refuse_unreadable(self) -> None:
        answer = self._shared.gateway.answer_not_http()
        self.state = State.BUSY
        self._shared.send(Departure(self, answer, close=True, whole=False, without_body=False))

    def _write(self, data: bytes) -> None:
        cast(asyncio.Transport, self.transport).write(data)

    # ---- time and the end ------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether nothing of a request has come."""
        return self.state is State.IDLE and not self._queue

    def expire(self) -> None:
        """The time limit of its state is over."""
        if self.state is State.BODY and self._request is not None:
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

    def _become(self, state: State) -> None:
        self.state = state
        self.expires = self._loop.time() + self._shared.limits[state]

    def _end(self, whole: bool) -> None:
        """No further request; `whole`: the client has nothing left to send of the last one."""
        self._become(State.ENDING)
        if whole:
            self.close()
        else:
            self._resume_transport_reading()
