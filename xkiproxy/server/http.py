"""HTTP messages as the gateway takes and gives them, and how an answer becomes bytes (RFC 9112)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Protocol as Interface

from xkiproxy.protocols.base import SignedRequest, Trouble

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_CLOSE = b"Connection: close\r\n"


class Request(SignedRequest):
    """A request with its whole body, or with what was wrong before it was whole.

    `source` is the client's address, `began` when the headers had come, on the clock of
    `time.monotonic`.
    """

    __slots__ = ("began", "source", "trouble")

    def __init__(
        self,
        method: str,
        target: str,
        headers: Sequence[tuple[bytes, bytes]],
        source: str,
        began: float,
    ) -> None:
        self.method = method
        self.path, _, self.query = target.partition("?")
        self.headers = headers
        self.source = source
        self.began = began
        self.body = b""
        self.trouble: Trouble | None = None


class Answer(Interface):
    """An answer; `headers` are lines, each with its end, but those that every answer has."""

    status: int
    headers: bytes
    body: bytes


class PlainAnswer:
    """An answer that nothing else is known of."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: bytes, body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body


class Renderer:
    """Writes answers; the Date header is made once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._common = b""

    def render(self, answer: Answer, *, close: bool, without_body: bool = False) -> bytes:
        """The bytes of an answer; `without_body` for the answer to HEAD."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second))
            self._common = (
                f"Content-Type: application/json\r\nServer: xkiproxy\r\nDate: {date}\r\n".encode()
            )
        return b"%b%b%b%bContent-Length: %d\r\n\r\n%b" % (
            _STATUS_LINES[answer.status],
            self._common,
            answer.headers,
            _CLOSE if close else b"",
            len(answer.body),
            b"" if without_body else answer.body,
        )
