"""A stream that takes the audit log's lines beside its file: a syslog server, standard output.

A line has been taken when the kernel has it, or, while the kernel has no room, when it is among at
most `limit` bytes that wait here. Nothing here ever blocks. An outlet that cannot take a line is
broken until all that waits has gone out; what it could not keep meanwhile it names.

Streams acknowledge nothing, so what went out last may be lost with a connection. The last `limit`
bytes are therefore kept and go out once more over the next one: what is there twice is no harm, a
copy has the same number and hash. docs/audit.md says what this promises and what not.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from xkiproxy.observability.audit import AuditError, SinkState
from xkiproxy.observability.chain import missing_fields

_STEADY_SECONDS = 1.0

_LATER = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Wire(Protocol):
    """An open stream that never blocks; it raises OSError when it is no more."""

    tells_its_end: bool
    """Whether it becomes readable, and stays so, when the other side is no more."""

    def fileno(self) -> int:
        """The descriptor to wait for."""

    def send(self, data: memoryview, /) -> int:
        """Hand over as much as there is room for; raises BlockingIOError where there is none."""

    def receive(self) -> bool:
        """Read, and forget, what has come; False: the other side is no more."""

    def close(self) -> None:
        """Close it in order."""


class _Batch(NamedTuple):
    """Lines that go out together."""

    first: int
    data: bytes


class Outlet:
    """Sends lines over one wire after the other; see the module."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], Awaitable[Wire]],
        frame: Callable[[Sequence[bytes]], bytes],
        *,
        limit: int,
        stall_seconds: float,
    ) -> None:
        """`connect` raises OSError or AuditError; `frame` makes bytes of lines."""
        self.name = name
        self.error = "it is not connected yet"
        self._connect = connect
        self._frame = frame
        self._limit = limit
        self._stall_seconds = stall_seconds
        self._wire: Wire | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._connected = 0.0
        self._progress = 0.0
        self._offset = 0
        self._again: deque[_Batch] = deque()
        self._waiting: deque[_Batch] = deque()
        self._waiting_bytes = 0
        self._sent: deque[_Batch] = deque()
        self._sent_bytes = 0
        self._is_blocked = False
        """Whether the loop says when there is room again."""
        self._is_refusing = False
        """Whether lines are given up, until all that waits has gone out."""
        self._missing: tuple[int, int] | None = None
        self._story: dict[str, Any] = {}
        self._was_up = False

    @property
    def state(self) -> SinkState:
        """How it is."""
        return SinkState(self.name, self.error)

    async def start(self) -> None:
        """Connect, if that can be done now."""
        await self._try_to_connect()
        self.resume()

    def take(self, lines: Sequence[bytes], last: int) -> None:
        """Take lines (without line feeds), the last of which is record `last`; `error` tells."""
        first = last - len(lines) + 1
        if self._is_refusing or self._waiting_bytes > self._limit:
            self._is_refusing = True
            self._missing = (self._missing[0] if self._missing else first, last)
            return
        batch = _Batch(first, self._frame(lines))
        is_first = not self._again and not self._waiting
        self._waiting.append(batch)
        self._waiting_bytes += len(batch.data)
        if is_first:
            self._progress = time.monotonic()
            self._flush()
        if self._waiting_bytes > self._limit:
            self._fail_stalled()

    def check(self) -> None:
        """Once a second: connect again, and see whether what waits moves."""
        if self._wire is None:
            self._start_to_connect()
        elif (self._waiting or self._again) and (
            time.monotonic() - self._progress > self._stall_seconds
        ):
            self._fail_stalled()

    def resume(self) -> None:
        """Take lines again, if all that waited has gone out."""
        if self.error and self._wire and not self._again and not self._waiting:
            if self._was_up or self._missing is not None:
                self._story.update(sink=self.name, after=self.error)
            self.error, self._is_refusing, self._was_up = "", False, True

    @property
    def story(self) -> dict[str, Any]:
        """What is to be said of a time in which it took nothing, once it is over; else empty."""
        if self.error or not self._story or self._missing is None:
            return {} if self.error else self._story
        return {**self._story, **missing_fields(self.name, *self._missing)}

    def forget_story(self) -> None:
        """It has been said."""
        self._story, self._missing = {}, None

    def close(self) -> None:
        """Send what can be sent at once, and end."""
        if self._connecting is not None:
            self._connecting.cancel()
        self._flush()
        self._drop_wire()

    # ---- the wire ----------------------------------------------------------------------------

    def _start_to_connect(self) -> None:
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._try_to_connect())

    async def _try_to_connect(self) -> None:
        try:
            wire = await self._connect()
        except (OSError, AuditError) as error:
            self.error = str(error)
            return
        self._wire = wire
        self._connected = self._progress = time.monotonic()
        # What went over the last wire may not have come.
        self._again, self._sent, self._sent_bytes = self._sent, deque(), 0
        if self._again:
            self._story["resent_from"] = self._again[0].first
        if wire.tells_its_end:
            asyncio.get_running_loop().add_reader(wire.fileno(), self._receive)
        self._flush()

    def _receive(self) -> None:
        wire = self._wire
        if wire is None:
            return
        try:
            if not wire.receive():
                self._lose("the other side has closed the connection")
        except _LATER:
            return
        except OSError as error:
            self._lose(reason(error))

    def _flush(self) -> None:
        """Hand over all that waits, as far as there is room."""
        wire = self._wire
        while wire is not None and (queue := self._again or self._waiting):
            try:
                sent = wire.send(memoryview(queue[0].data)[self._offset :])
            except _LATER:
                if not self._is_blocked:
                    asyncio.get_running_loop().add_writer(wire.fileno(), self._flush)
                    self._is_blocked = True
                return
            except OSError as error:
                self._lose(reason(error))
                return
            self._progress = time.monotonic()
            self._offset += sent
            if self._offset == len(queue[0].data):
                self._go_to_next(queue)
        if wire is not None:
            self._stop_waiting(wire)

    def _go_to_next(self, queue: deque[_Batch]) -> None:
        batch = queue.popleft()
        self._offset = 0
        size = len(batch.data)
        if queue is self._waiting:
            self._waiting_bytes -= size
        self._sent.append(batch)
        self._sent_bytes += size
        while self._sent_bytes > self._limit:
            self._sent_bytes -= len(self._sent.popleft().data)

    def _fail_stalled(self) -> None:
        if self._wire is not None:
            self.error = f"it takes nothing: {self._waiting_bytes} bytes wait for it"

    def _lose(self, why: str) -> None:
        """The wire is no more: what may not have come goes over the next one."""
        self._drop_wire()
        self.error = why
        if time.monotonic() - self._connected > _STEADY_SECONDS:
            self._start_to_connect()

    def _drop_wire(self) -> None:
        wire, self._wire = self._wire, None
        self._offset = 0
        self._sent.extend(self._again)  # not sent again yet: the next wire has them first
        self._sent_bytes += sum(len(batch.data) for batch in self._again)
        self._again.clear()
        if wire is None:
            return
        self._stop_waiting(wire)
        if wire.tells_its_end:
            asyncio.get_running_loop().remove_reader(wire.fileno())
        with suppress(OSError):
            wire.close()

    def _stop_waiting(self, wire: Wire) -> None:
        if self._is_blocked:
            asyncio.get_running_loop().remove_writer(wire.fileno())
            self._is_blocked = False


def reason(error: OSError) -> str:
    """What went wrong, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return f"TLS: {error.reason.lower().replace('_', ' ')}"
    return error.strerror or str(error) or type(error).__name__
