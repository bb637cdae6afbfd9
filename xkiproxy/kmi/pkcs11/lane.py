"""A lane to an HSM, as the server sees it: a process at the other end of a socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import deque
from collections.abc import Sequence
from typing import cast

from xkiproxy.config.models import Pkcs11Settings, TokenSettings
from xkiproxy.crypto.operations import Operation
from xkiproxy.kmi.base import BreakReason, LaneError, Settle
from xkiproxy.kmi.endpoints import Endpoints
from xkiproxy.kmi.pkcs11 import wire
from xkiproxy.kmi.pkcs11.process import Process, open_settings, spawn

_LOGIN_GRACE_SECONDS = 2.0


class _Flight:
    """A frame that the process has not answered yet."""

    __slots__ = ("count", "done", "settle", "settled")

    def __init__(self, done: asyncio.Future[None], count: int, settle: Settle | None) -> None:
        self.done = done
        self.count = count
        self.settled = 0
        self.settle = settle


class Pkcs11Lane(asyncio.Protocol):
    """See `xkiproxy.kmi.base.Lane`."""

    def __init__(self, process: Process, timeout: float) -> None:
        """`timeout` in seconds: how long the process may say nothing while it has work."""
        self._process = process
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._frames = wire.FrameBuffer()
        self._flights: deque[_Flight] = deque()
        self._broken: asyncio.Future[LaneError] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._ready = False

    @property
    def pid(self) -> int:
        """The process, for operators and tests."""
        return self._process.popen.pid

    # ---- Lane ------------------------------------------------------------------------------

    async def open(self, settings: dict[str, object], start_timeout: float) -> None:
        """Load the module and log in, within `start_timeout` seconds; raises LaneError."""
        self._process.sock.setblocking(False)
        await self._loop.create_unix_connection(lambda: self, sock=self._process.sock)
        self._timeout, usual = start_timeout, self._timeout
        await self._send(wire.pack([wire.OPEN, settings]), 0, None)
        self._timeout = usual
        self._ready = True

    async def execute(self, batch: Sequence[Operation], epoch: int, settle: Settle) -> None:
        """See `Lane.execute`."""
        fields = [wire.operation_fields(operation) for operation in batch]
        await self._send(wire.pack([wire.BATCH, epoch, fields]), len(batch), settle)

    async def probe(self) -> None:
        """See `Lane.probe`."""
        await self._send(wire.pack([wire.PROBE]), 0, None)

    async def wait_broken(self) -> LaneError:
        """See `Lane.wait_broken`."""
        return await asyncio.shield(self._broken)

    async def close(self) -> None:
        """End the process: at once, but for one that still logs in."""
        self._break("closed", BreakReason.EXIT)
        # Once it is ready it is killed, not asked: the module in there must not delay anything.
        grace = 0.0 if self._ready else _LOGIN_GRACE_SECONDS
        await self._loop.run_in_executor(None, self._process.end, grace)

    async def _send(self, frame: bytes, count: int, settle: Settle | None) -> None:
        if self._broken.done():
            broken = self._broken.result()
            raise LaneError(broken.message, broken.reason, started=False)
        if self._process.popen.poll() is not None:
            # It ended a moment ago: what it has not got it cannot be the cause of.
            self._break("its process ended", BreakReason.EXIT)
            raise LaneError("its process ended", BreakReason.EXIT, started=False)
        assert self._transport is not None  # noqa: S101 - open() comes first
        flight = _Flight(self._loop.create_future(), count, settle)
        self._flights.append(flight)
        if len(self._flights) == 1:
            self._watch()
        self._transport.write(frame)
        await flight.done

    # ---- asyncio.Protocol ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._frames.feed(data):
                self._take(frame)
        except (wire.FrameError, IndexError, TypeError, ValueError) as error:
            self._break(f"it does not speak the protocol: {error}", BreakReason.EXIT)

    def connection_lost(self, exc: BaseException | None) -> None:
        del exc
        self._break("its process ended", BreakReason.EXIT)

    # ---- frames ----------------------------------------------------------------------------

    def _take(self, frame: wire.Frame) -> None:
        kind = frame[0]
        if kind == wire.OUTCOMES:
            self._take_outcomes(frame[1])
        elif kind in {wire.READY, wire.PROBED}:
            self._landed()
        elif kind == wire.BROKEN:
            self._break(frame[1], BreakReason.DEVICE)
        elif kind == wire.FAILED:
            self._break(frame[2], BreakReason(frame[1]))
        else:
            raise wire.FrameError("an unknown kind of frame")

    def _take_outcomes(self, outcomes: Sequence[Sequence[object]]) -> None:
        flight = self._flights[0]
        if flight.settle is None or flight.settled + len(outcomes) > flight.count:
            raise wire.FrameError("outcomes that nobody asked for")
        for fields in outcomes:
            flight.settle(flight.settled, wire.outcome(fields))
            flight.settled += 1
        if flight.settled == flight.count:
            self._landed()
        else:
            self._watch()

    def _landed(self) -> None:
        flight = self._flights.popleft()
        if not flight.done.done():
            flight.done.set_result(None)
        self._watch()

    def _watch(self) -> None:
        """The process has said something, or got its first work: its time begins anew."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._flights and not self._broken.done():
            expired = functools.partial(
                self._break, f"no answer for {self._timeout:g} s", BreakReason.TIMEOUT
            )
            self._timer = self._loop.call_later(self._timeout, expired)

    def _break(self, message: str, reason: BreakReason) -> None:
        if self._broken.done():
            return
        error = LaneError(message, reason)
        self._broken.set_result(error)
        self._watch()
        if self._transport is not None:
            self._transport.abort()
        for position, flight in enumerate(self._flights):
            if not flight.done.done():
                flight.done.set_exception(LaneError(message, reason, started=position == 0))
        self._flights.clear()


class _Place:
    """A token, and what came of the PIN there."""

    def __init__(self, token: TokenSettings) -> None:
        self.token = token
        self.turn = asyncio.Lock()
        self.refused: LaneError | None = None


class Pkcs11Launcher:
    """Starts the lanes of a KMI, spread over its tokens.

    At each token one after the other: a wrong PIN must be tried there once, not once for every
    lane. What one token refuses another may take, and one that hangs holds up nobody elsewhere.
    """

    def __init__(self, settings: Pkcs11Settings, pin: str) -> None:
        self._settings = settings
        self._pin = pin
        self._places = [_Place(token) for token in settings.token]
        self._endpoints = Endpoints(len(self._places))

    async def launch(self, index: int, *, home: bool = False) -> Pkcs11Lane:
        """See `xkiproxy.kmi.base.Launcher`; `LOGIN` is raised once every token has refused."""
        try:
            with self._endpoints.starting(index, home=home) as endpoint:
                place = self._places[endpoint]
                async with place.turn:
                    return await self._log_in(index, place)
        except LaneError as error:
            if error.reason is BreakReason.LOGIN and any(p.refused is None for p in self._places):
                raise LaneError(error.message, BreakReason.START) from None  # elsewhere, next
            raise

    def is_away(self, index: int) -> bool:
        """See `xkiproxy.kmi.base.Launcher`."""
        return self._endpoints.is_away(index)

    async def _log_in(self, index: int, place: _Place) -> Pkcs11Lane:
        if place.refused is not None:
            raise LaneError(place.refused.message, BreakReason.LOGIN)
        try:
            return await self._open(index, place.token)
        except LaneError as error:
            if error.reason is BreakReason.LOGIN:
                place.refused = error
            raise

    async def _open(self, index: int, token: TokenSettings) -> Pkcs11Lane:
        settings = self._settings
        title = f"lane {index} of KMI {settings.name}"
        try:
            lane = Pkcs11Lane(spawn(), settings.operation_timeout_ms / 1000)
        except OSError as error:
            raise LaneError(f"no process: {error.strerror}", BreakReason.START) from None
        try:
            arguments = open_settings(settings, token, self._pin, title=title, rw=False)
            await lane.open(arguments, settings.start_timeout_seconds)
            await lane.probe()
        except BaseException as error:
            with contextlib.suppress(Exception):
                await lane.close()
            if isinstance(error, LaneError):
                name = token.label if token.label is not None else f"of serial {token.serial}"
                refused = error.reason is BreakReason.LOGIN
                reason = BreakReason.LOGIN if refused else BreakReason.START
                raise LaneError(f"token {name}: {error.message}", reason) from None
            raise
        return lane
