"""The two ways to put a load on a target.

A closed loop keeps a number of connections busy: each sends its next request when the answer to
the last one has come. It finds the highest rate; its latencies flatter a target that stalls, for a
stall holds back the requests that would have met it.

An open loop sends at a fixed rate, whatever the target does. A latency counts from the time when
the request was due, not from when it could be sent at last: a stall shows in every request that it
delays (no "coordinated omission").

All times are in nanoseconds of `time.perf_counter_ns`, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.load.client import Answer, Connection, Target
from benchmarks.load.requests import RIGHT, WRONG, Checker, Request, Supply
from benchmarks.load.results import DEADLINE_US, LoadResult, histogram_of
from benchmarks.load.ticker import Ticker
from benchmarks.load.wire import ENCRYPT

BILLION = 1_000_000_000
CONNECT_SECONDS = 10.0

_RETRY_SECONDS = 0.05
_AFTER_END_SECONDS = 0.002
_FINEST_TICK_NS = 20_000


@dataclass(frozen=True, slots=True)
class Window:
    """When a load runs: from `begin`, counted from `start` until `stop`, given up `grace` later.

    `grace` is in nanoseconds as all the others.
    """

    begin: int
    start: int
    stop: int
    grace: int = 10 * BILLION

    @classmethod
    def of(cls, begin: int, warm_up: float, seconds: float, grace: float = 10.0) -> Window:
        """From `begin` (nanoseconds) on, the durations in seconds."""
        start = begin + int(warm_up * BILLION)
        return cls(begin, start, start + int(seconds * BILLION), int(grace * BILLION))


@dataclass
class Tally:
    """What has been counted; `samples` are encrypt answers, kept to be decrypted afterwards.

    `longest` and `late` (over the cloud's deadline) are of right answers, from the moment when
    their request was written: what the target itself took, whatever waited in the generator.
    """

    latencies: array[int] = field(default_factory=lambda: array("q"))
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[int, bytes]] = field(default_factory=list)
    last: int = 0
    longest: int = 0
    late: int = 0

    @property
    def done(self) -> int:
        """Answers and failures so far."""
        return len(self.latencies) + self.failed

    @property
    def failed(self) -> int:
        """Errors and wrong plaintexts so far."""
        return self.wrong + sum(self.errors.values())


class Loop:
    """What both loops share: the connections, and what is made of their answers."""

    def __init__(
        self,
        target: Target,
        supply: Supply,
        checker: Checker,
        connections: int,
        *,
        sample_every: int = 100,
    ) -> None:
        self.tally = Tally()
        self.waited = 0
        self.reconnects = 0
        self._target = target
        self._context = target.context()
        self._supply = supply
        self._checker = checker
        self._wanted = connections
        self._sample_every = sample_every
        self._until_sample = sample_every
        self._connections: set[Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._window = Window(0, 0, 0)
        self._running = False
        self._cpu = 0.0
        self._finished: asyncio.Future[None] | None = None

    async def open(self) -> None:
        """Open all connections; raises OSError."""
        # Not all at once: a listener's queue has an end, and TLS handshakes take their time.
        for _ in range(0, self._wanted, 32):
            wave = min(32, self._wanted - len(self._connections))
            await asyncio.gather(*(self._connect() for _ in range(wave)))

    async def run(self, window: Window) -> LoadResult:
        """Put the load on, from `window.begin` on; `open` has been called."""
        loop = asyncio.get_running_loop()
        self._window, self._finished = window, loop.create_future()
        await asyncio.sleep((window.begin - time.perf_counter_ns()) / BILLION)
        self._running = True
        warm = loop.call_later((window.start - window.begin) / BILLION, self._mark_cpu)
        self._cpu = time.process_time()
        for _ in range(self._wanted - len(self._connections)):
            self._reconnect()  # those that were closed while all waited for the start
        self._begin()
        # For the case that no answer comes, after which the end would be noticed.
        over = (window.stop - time.perf_counter_ns()) / BILLION
        end = loop.call_later(over + _AFTER_END_SECONDS, self._look_for_end)
        length = (window.stop - window.begin + window.grace) / BILLION
        try:
            await asyncio.wait_for(self._finished, length)
        except TimeoutError:
            self._give_up()
        cpu = time.process_time() - self._cpu
        warm.cancel()
        end.cancel()
        self._running = False
        self._close()
        return self._result(cpu)

    def _mark_cpu(self) -> None:
        self._cpu = time.process_time()

    def _result(self, cpu_seconds: float) -> LoadResult:
        tally = self.tally
        return LoadResult(
            ok=len(tally.latencies),
            wrong=tally.wrong,
            errors=dict(tally.errors),
            seconds=(max(tally.last, self._window.stop) - self._window.start) / BILLION,
            histogram=histogram_of(tally.latencies),
            cpu_seconds=cpu_seconds,
            waited=self.waited,
            signed_late=self._supply.signed_late,
            reconnects=self.reconnects,
            late=tally.late,
            longest_us=tally.longest // 1000,
        )

    # ---- what a connection reports ----

    def answered(
        self, connection: Connection, request: Request, began: int, now: int, answer: Answer
    ) -> None:
        """See `client.Owner`."""
        sent = connection.sent
        if connection.is_open:
            self._ready(connection)  # first, so that the target never waits for the check
        if began >= self._window.start:
            self._count(request, now - began, now - sent, answer)
            self.tally.last = now
        if now >= self._window.stop:
            self._look_for_end()

    def lost(self, connection: Connection, kind: str) -> None:
        """See `client.Owner`."""
        self._connections.discard(connection)
        self._forget(connection)
        if connection.request is not None:
            connection.request = None
            self._fail(kind, connection.began)
        if self._running:
            self.reconnects += 1
            self._reconnect()
            self._look_for_end()

    def _count(self, request: Request, latency: int, taken: int, answer: Answer) -> None:
        tally = self.tally
        verdict = self._checker.check(request, *answer)
        if verdict == RIGHT:
            tally.latencies.append(latency)
            tally.longest = max(tally.longest, taken)
            tally.late += taken > DEADLINE_US * 1000
            if request.call == ENCRYPT:
                self._until_sample -= 1
                if self._until_sample <= 0:
                    self._until_sample = self._sample_every
                    tally.samples.append((request.number, answer[1]))
        elif verdict == WRONG:
            tally.wrong += 1
        else:
            tally.errors[verdict] += 1

    def _fail(self, kind: str, began: int) -> None:
        if began >= self._window.start:
            self.tally.errors[kind] += 1
            self.tally.last = time.perf_counter_ns()

    # ---- connections ----

    async def _connect(self) -> None:
        target, context = self._target, self._context
        connect = asyncio.get_running_loop().create_connection(
            lambda: Connection(self), target.host, target.port, ssl=context,
            server_hostname=target.host if context else None,
        )  # fmt: skip
        async with asyncio.timeout(CONNECT_SECONDS):
            _, connection = await connect
        self._connections.add(connection)
        if self._running:
            self._ready(connection)

    async def _connect_again(self) -> None:
        while self._running and time.perf_counter_ns() < self._window.stop:
            try:
                await self._connect()
            except OSError as error:  # TimeoutError and ssl.SSLError are such
                self._fail(f"connect: {type(error).__name__}", time.perf_counter_ns())
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                return

    def _reconnect(self) -> None:
        task = asyncio.get_running_loop().create_task(self._connect_again())
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def _close(self) -> None:
        for task in self._connecting:
            task.cancel()
        for connection in list(self._connections):
            connection.request = None
            connection.abort()

    # ---- the end ----

    def _look_for_end(self) -> None:
        """Once the time is over and nothing is under way, the load is."""
        assert self._finished is not None
        if self._finished.done() or time.perf_counter_ns() < self._window.stop:
            return
        if self._is_idle():
            self._finished.set_result(None)

    def _is_idle(self) -> bool:
        return all(connection.request is None for connection in self._connections)

    def _give_up(self) -> None:
        """What has no answer by now has none."""
        for connection in self._connections:
            if connection.request is not None:
                self._fail("no answer", connection.began)

    # ---- what the loops differ in ----

    def _begin(self) -> None:
        """Send the first requests."""
        raise NotImplementedError

    def _ready(self, connection: Connection) -> None:
        """A connection is free."""
        raise NotImplementedError

    def _forget(self, connection: Connection) -> None:
        """A connection is gone."""


class ClosedLoop(Loop):
    """Every connection has one request in flight."""

    def _begin(self) -> None:
        for connection in list(self._connections):
            self._ready(connection)

    def _ready(self, connection: Connection) -> None:
        now = time.perf_counter_ns()
        if now < self._window.stop:
            connection.send(self._supply.next(), now)


class OpenLoop(Loop):
    """`rate` requests a second, evenly spaced; those that find no free connection wait for one.

    `phase` (0 to 1) is of the distance between two: several generators do not send in step.
    """

    def __init__(
        self,
        target: Target,
        supply: Supply,
        checker: Checker,
        connections: int,
        *,
        rate: float,
        phase: float = 0.0,
        sample_every: int = 100,
    ) -> None:
        super().__init__(target, supply, checker, connections, sample_every=sample_every)
        self._interval = BILLION / rate
        self._phase = phase
        self._next = 0
        """The number of the next request: those before it have been sent."""
        self._free: list[Connection] = []
        self._ticker: Ticker | None = None

    def _begin(self) -> None:
        self._free = list(self._connections)
        self._start_ticker()

    def _intended(self, number: int) -> int:
        return self._window.begin + int((number + self._phase) * self._interval)

    def _is_due(self, now: int) -> bool:
        return self._intended(self._next) < min(now, self._window.stop)

    @property
    def _has_sent_all(self) -> bool:
        return self._intended(self._next) >= self._window.stop

    def _tick(self) -> None:
        now = time.perf_counter_ns()
        while self._free and self._is_due(now):
            connection = self._free.pop()
            if connection.is_open:
                self._send(connection)
        if self._has_sent_all or not self._free:
            # Without a free connection the next that is ready goes on: ticks would cost the
            # generator, and so a target on the same machine, more than the requests.
            self._stop_ticker()
            self._look_for_end()

    def _send(self, connection: Connection) -> None:
        intended = self._intended(self._next)
        self._next += 1
        connection.send(self._supply.next(), intended)

    def _ready(self, connection: Connection) -> None:
        if self._is_due(time.perf_counter_ns()):
            if not self._free and self._intended(self._next) >= self._window.start:
                self.waited += 1
            self._send(connection)
            return
        self._free.append(connection)
        if not self._has_sent_all:
            self._start_ticker()

    def _forget(self, connection: Connection) -> None:
        if connection in self._free:
            self._free.remove(connection)

    def _is_idle(self) -> bool:
        return self._has_sent_all and super()._is_idle()

    def _give_up(self) -> None:
        super()._give_up()
        left = 0
        while not self._has_sent_all:
            left += self._intended(self._next) >= self._window.start
            self._next += 1
        if left:
            self.tally.errors["never sent"] += left

    def _close(self) -> None:
        self._stop_ticker()
        super()._close()

    def _start_ticker(self) -> None:
        if self._ticker is None:
            # Never more often than the clock can wake us: a tick sends all that are due.
            self._ticker = Ticker(max(int(self._interval), _FINEST_TICK_NS), self._tick)

    def _stop_ticker(self) -> None:
        if self._ticker is not None:
            self._ticker.close()
            self._ticker = None
