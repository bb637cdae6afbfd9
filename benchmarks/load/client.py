"""One connection of the load generator: an HTTP/1.1 client with nothing that the load needs not."""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass
from typing import Protocol, cast

from benchmarks.load.requests import Request

MAX_ANSWER_BYTES = 1 << 20

_MAX_LENGTH_DIGITS = 7
_LENGTH = b"\r\ncontent-length:"
_CODING = b"\r\ntransfer-encoding:"
_CLOSE = b"\r\nconnection: close"


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect; `ca` is the certificate file to trust, None is plain HTTP."""

    host: str
    port: int
    ca: str | None = None

    def context(self) -> ssl.SSLContext | None:
        """For TLS: what is in the file is trusted, and the name must match."""
        if self.ca is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.ca)
        return context


class ParseError(Exception):
    """Bytes that are no HTTP/1.1 answer with a Content-Length."""


def parse_answer(data: bytes) -> tuple[int, bytes, bool] | None:
    """(status, body, whether the connection stays), or None if the answer is not whole yet.

    Raises:
        ParseError: it is none, or more than one.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if len(data) > MAX_ANSWER_BYTES or not data.startswith(b"HTTP/1.1 "[: len(data)]):
            raise ParseError("no head")
        return None
    head = data[: end + 2].lower()
    status = head[9:12]
    if not head.startswith(b"http/1.1 ") or not status.isdigit() or head[12:13] not in b" \r":
        raise ParseError("no status line")
    whole = end + 4 + _content_length(head)
    if len(data) < whole:
        return None
    if len(data) > whole:
        raise ParseError("more than one answer")
    return int(status), data[end + 4 :], _CLOSE not in head


def _content_length(head: bytes) -> int:
    """`head` is in lower case and ends with the end of its last line."""
    start = head.find(_LENGTH)
    if start < 0 or head.find(_LENGTH, start + 1) >= 0 or _CODING in head:
        raise ParseError("no length, or several")
    start += len(_LENGTH)
    text = head[start : head.find(b"\r\n", start)].strip(b" \t")
    if not text.isdigit() or len(text) > _MAX_LENGTH_DIGITS:
        raise ParseError("no length")
    return int(text)


class Owner(Protocol):
    """Whom a connection reports to."""

    def answered(
        self, connection: Connection, request: Request, began: int, now: int, answer: Answer
    ) -> None:
        """An answer came, at `now`; `began` is what `send` was given, both in nanoseconds."""

    def lost(self, connection: Connection, kind: str) -> None:
        """The connection is gone; `kind` says how. A request in flight stays in `request`."""


Answer = tuple[int, bytes]
"""(status, body)."""


class Connection(asyncio.Protocol):
    """One request in flight at a time; callbacks only, no task."""

    __slots__ = ("_buffer", "_kind", "_owner", "_transport", "began", "request", "sent")

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._kind = "connection lost"
        self.request: Request | None = None
        self.began = 0
        self.sent = 0
        """When the last request was written, in nanoseconds."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but not a subclass

    def send(self, request: Request, began: int) -> None:
        """Write a request, whose latency counts from `began` (nanoseconds, perf_counter_ns)."""
        assert self._transport is not None
        self.request = request
        self.began = began
        self.sent = time.perf_counter_ns()
        self._transport.write(request.raw)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter_ns()
        if self._buffer:
            data = self._buffer + data
        request = self.request
        try:
            if request is None:
                raise ParseError("an answer to nothing")
            answer = parse_answer(data)
        except ParseError as error:
            self.abort(f"no HTTP answer: {error}")
            return
        if answer is None:
            self._buffer = data
            return
        self._buffer = b""
        self.request = None
        status, body, stays = answer
        if not stays:
            self.abort("closed")
        self._owner.answered(self, request, self.began, now, (status, body))

    def connection_lost(self, exc: BaseException | None) -> None:
        del exc
        self._transport = None
        self._owner.lost(self, self._kind)

    @property
    def is_open(self) -> bool:
        """Whether a request can be written."""
        return self._transport is not None and not self._transport.is_closing()

    def abort(self, kind: str = "connection lost") -> None:
        """End it now; `kind` says why."""
        self._kind = kind
        if self._transport is not None:
            self._transport.abort()
