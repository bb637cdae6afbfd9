"""The dispatcher: batches, deadlines, a bounded queue, broken lanes.

The lanes here stand in for HSM sessions, which the tests of the PKCS#11 KMI bring: what is tested
is what happens around a lane.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest

from xkiproxy.crypto.operations import Fault, OperationError, Random, RandomBytes
from xkiproxy.kmi.base import BreakReason, KmiState, LaneError, LaneState, Settle
from xkiproxy.kmi.inline import InlineKmi
from xkiproxy.kmi.metrics import KmiMetrics
from xkiproxy.kmi.queued import QueuedKmi
from xkiproxy.observability.metrics import Metrics


class FakeLane:
    """Answers a Random with as many zero bytes; waits, breaks or fails when told."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.epochs: list[int] = []
        self.open = asyncio.Event()
        self.open.set()
        self.breaks = False
        self.bug: Exception | None = None
        self.started = True
        self.probes = 0
        self.closed = False
        self._broken: asyncio.Future[LaneError] = asyncio.get_running_loop().create_future()

    async def execute(self, batch: Sequence[Random], epoch: int, settle: Settle) -> None:
        self.batches.append(len(batch))
        self.epochs.append(epoch)
        await self.open.wait()
        if self.bug is not None:
            raise self.bug
        if self.breaks:
            self.die()
            raise LaneError("planted", BreakReason.DEVICE, started=self.started)
        for index, operation in enumerate(batch):
            settle(
                index,
                RandomBytes(bytes(operation.length))
                if operation.length < 1000
                else OperationError(Fault.KEY_NOT_FOUND, "planted"),
            )

    def die(self, reason: BreakReason = BreakReason.DEVICE) -> None:
        if not self._broken.done():
            self._broken.set_result(LaneError("planted", reason))

    async def probe(self) -> None:
        self.probes += 1
        if self.breaks:
            self.die()
            raise LaneError("planted", BreakReason.DEVICE)

    async def wait_broken(self) -> LaneError:
        return await asyncio.shield(self._broken)

    async def close(self) -> None:
        self.closed = True
        self.die(BreakReason.EXIT)


class FakeLauncher:
    """Hands out lanes that were made beforehand; then starts fail, in the way that is planted."""

    def __init__(self, *lanes: FakeLane) -> None:
        self.lanes = list(lanes)
        self.launches = 0
        self.error = LaneError("no more lanes", BreakReason.START)
        self.hangs = False
        self.away = False
        self.home: FakeLane | LaneError | None = None
        self.home_launches = 0

    def is_away(self, index: int) -> bool:
        return self.away

    async def launch(self, index: int, *, home: bool = False) -> FakeLane:
        if home:
            return await self.launch_home()
        self.launches += 1
        while self.hangs:
            await asyncio.sleep(0.01)
        if not self.lanes:
            raise self.error
        return self.lanes.pop(0)

    async def launch_home(self) -> FakeLane:
        """It hangs while there is none."""
        self.home_launches += 1
        while self.home is None:
            await asyncio.sleep(0.01)
        if isinstance(self.home, LaneError):
            raise self.home
        self.away = False
        return self.home


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


Start = Callable[..., Awaitable[QueuedKmi]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    started: list[QueuedKmi] = []

    async def make(
        *lanes: FakeLane, spare: Sequence[FakeLane] = (), queue_size: int = 100, max_batch: int = 8
    ) -> QueuedKmi:
        metrics = Metrics()
        launcher = FakeLauncher(*lanes, *spare)
        kmi = QueuedKmi(
            "hsm", "pkcs11", launcher, KmiMetrics(metrics, "hsm"),
            lanes=max(1, len(lanes)), queue_size=queue_size, max_batch=max_batch,
        )  # fmt: skip
        kmi.registry = metrics.registry
        kmi.launcher = launcher
        started.append(kmi)
        kmi.start()
        await kmi.check()
        return kmi

    yield make
    for kmi in started:
        await kmi.close()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not come")


def sample(kmi: QueuedKmi, name: str, **labels: str) -> float:
    return kmi.registry.get_sample_value(name, {"kmi": "hsm", **labels}) or 0.0


async def submit(kmi: QueuedKmi, length: int, deadline: float | None = None) -> object:
    return await kmi.submit(Random(length), soon() if deadline is None else deadline)


async def fault(kmi: QueuedKmi, length: int, deadline: float | None = None) -> Fault:
    with pytest.raises(OperationError) as caught:
        await submit(kmi, length, deadline)
    return caught.value.fault


async def test_a_single_operation_is_not_delayed_to_fill_a_batch(start: Start) -> None:
    lane = FakeLane()
    kmi = await start(lane)
    assert await submit(kmi, 3) == RandomBytes(bytes(3))
    assert lane.batches == [1]


async def test_what_comes_in_one_round_is_one_batch(start: Start) -> None:
    lane = FakeLane()
    kmi = await start(lane)
    results = await asyncio.gather(*(submit(kmi, i) for i in range(5)))
    assert [len(r.data) for r in results] == list(range(5))
    assert lane.batches == [5]


async def test_batches_grow_while_the_lane_is_busy_up_to_max_batch(start: Start) -> None:
    lane = FakeLane()
    kmi = await start(lane, max_batch=8)
    lane.open.clear()
    first = asyncio.create_task(submit(kmi, 1))
    await until(lambda: lane.batches == [1])
    rest = [asyncio.create_task(submit(kmi, i)) for i in range(20)]
    await asyncio.sleep(0.01)
    assert sample(kmi, "xkiproxy_kmi_lanes", state="busy") == 1
    lane.open.set()
    results = await asyncio.gather(first, *rest)
    assert [len(r.data) for r in results] == [1, *range(20)]
    assert lane.batches == [1, 8, 8, 4]
    assert sample(kmi, "xkiproxy_kmi_batch_size_sum") == 21


async def test_what_waits_is_seen_at_any_time(start: Start) -> None:
    lane = FakeLane()
    kmi = await start(lane)
    lane.open.clear()
    running = asyncio.create_task(submit(kmi, 1))
    await until(lambda: lane.batches == [1])
    waiting = [asyncio.create_task(submit(kmi, 1)) for _ in range(20)]
    await asyncio.sleep(0)
    assert sample(kmi, "xkiproxy_kmi_queue_depth") == 20
    lane.open.set()
    await asyncio.gather(running, *waiting)
    assert sample(kmi, "xkiproxy_kmi_queue_depth") == 0


class PickyLane(FakeLane):
    """Refuses what is long at once, and the rest waits, as with lanes that ask over a network."""

    def __init__(self) -> None:
        super().__init__()
        self.at_once = self.peak = 0

    async def execute(self, batch: Sequence[Random], epoch: int, settle: Settle) -> None:
        self.batches.append(len(batch))
        self.at_once += 1
        self.peak = max(self.peak, self.at_once)
        for index in reversed(range(len(batch))):
            if batch[index].length >= 1000:
                settle(index, OperationError(Fault.KEY_NOT_FOUND, "planted"))
        await self.open.wait()
        for index, operation in enumerate(batch):
            if operation.length < 1000:
                settle(index, RandomBytes(bytes(operation.length)))
        self.at_once -= 1


@pytest.mark.parametrize("refused", [1, 3, 7])
async def test_what_a_lane_refuses_early_brings_it_no_further_batches(
    start: Start, refused: int
) -> None:
    lane = PickyLane()
    kmi = await start(lane, queue_size=8, max_batch=8)
    lane.open.clear()
    tasks = []
    for _ in range(20):
        tasks += [asyncio.create_task(submit(kmi, 1)) for _ in range(8 - refused)]
        tasks += [asyncio.create_task(submit(kmi, 1000)) for _ in range(refused)]
        await asyncio.sleep(0.001)
    peak, is_full = lane.peak, kmi.is_full
    lane.open.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert (peak <= 3, is_full) == (True, True)
    assert sum(isinstance(o, OperationError) and o.fault is Fault.THROTTLED for o in outcomes) > 50
    lane.batches.clear()
    await asyncio.gather(*(submit(kmi, 1) for _ in range(8)))
    assert lane.batches == [8]


class CarelessLane(FakeLane):
    """Settles each operation as often as its length says."""

    async def execute(self, batch: Sequence[Random], epoch: int, settle: Settle) -> None:
        self.batches.append(len(batch))
        for index, operation in enumerate(batch):
            for _ in range(operation.length):
                settle(index, RandomBytes(bytes(operation.length)))


async def test_a_lane_that_cannot_count_is_not_lost(start: Start) -> None:
    kmi = await start(CarelessLane())
    for lengths in ([2], [0], [1], [0, 0, 0, 0], [2, 2, 1, 1], [0, 1, 1], [1]):
        outcomes = await asyncio.gather(
            *(submit(kmi, length, soon(1)) for length in lengths), return_exceptions=True
        )
        for length, outcome in zip(lengths, outcomes, strict=True):
            if length:
                assert outcome == RandomBytes(bytes(length))
            else:
                assert isinstance(outcome, OperationError)
                assert outcome.fault is Fault.INTERNAL
    assert kmi._supervision.lanes[0].batches == [1, 1, 1, 4, 4, 3, 1]


async def test_an_error_of_one_operation_stays_with_it(start: Start) -> None:
    kmi = await start(FakeLane())
    good, bad, other = await asyncio.gather(
        submit(kmi, 1), submit(kmi, 1000), submit(kmi, 2), return_exceptions=True
    )
    assert good == RandomBytes(bytes(1))
    assert other == RandomBytes(bytes(2))
    assert isinstance(bad, OperationError)
    assert sample(
        kmi, "xkiproxy_kmi_operations_total", operation="random", outcome="key_not_found"
    ) == 1  # fmt: skip


async def test_a_full_queue_refuses_at_once(start: Start) -> None:
    lane = FakeLane()
    kmi = await start(lane, queue_size=2)
    lane.open.clear()
    running = asyncio.create_task(submit(kmi, 1))
    await until(lambda: lane.batches == [1])
    waiting = [asyncio.create_task(submit(kmi, 1)) for _ in range(2)]
    await asyncio.sleep(0)
    assert await fault(kmi, 1) is Fault.THROTTLED
    lane.open.set()
    await asyncio.gather(running, *waiting)


async def test_an_operation_past_its_deadline_never_reaches_the_kmi(start: Start) -> None:
    lane = FakeLane()
    kmi = await start(lane)
    lane.open.clear()
    running = asyncio.create_task(submit(kmi, 1))
    await until(lambda: lane.batches == [1])
    assert await fault(kmi, 2, soon(0.02)) is Fault.DEADLINE_EXCEEDED
    lane.open.set()
    await running
    await submit(kmi, 3)
    assert lane.batches == [1, 1]


async def test_a_client_that_goes_away_costs_the_kmi_nothing(start: Start) -> None:
    lane = FakeLane()
    kmi = await start(lane)
    lane.open.clear()
    running = asyncio.create_task(submit(kmi, 1))
    await until(lambda: lane.batches == [1])
    gone = asyncio.create_task(submit(kmi, 2))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    lane.open.set()
    await running
    assert lane.batches == [1]
    name, labels = "xkiproxy_kmi_operations_total", {"operation": "random"}
    assert sample(kmi, name, **labels, outcome="cancelled") == 1
    assert sample(kmi, name, **labels, outcome="internal") == 0


async def test_the_batch_of_a_broken_lane_runs_again_alone(start: Start) -> None:
    broken, good = FakeLane(), FakeLane()
    kmi = await start(broken, good)
    broken.breaks = True
    results = await asyncio.gather(*(submit(kmi, i) for i in range(12)))
    assert [len(r.data) for r in results] == list(range(12))
    assert broken.batches == [8]
    assert sorted(good.batches) == [1] * 8 + [4]
    await until(lambda: kmi.state is KmiState.DEGRADED)
    assert broken.closed


async def test_an_operation_that_breaks_lanes_is_given_up_after_the_second(start: Start) -> None:
    lanes = [FakeLane() for _ in range(3)]
    kmi = await start(*lanes)
    for lane in lanes:
        lane.breaks = True
    assert await fault(kmi, 1) is Fault.UNAVAILABLE
    assert sum(len(lane.batches) for lane in lanes) == 2


async def test_a_batch_that_was_not_begun_is_not_blamed(start: Start) -> None:
    lanes = [FakeLane() for _ in range(4)]
    kmi = await start(*lanes)
    for lane in lanes[:3]:
        lane.breaks, lane.started = True, False
    assert await submit(kmi, 1) == RandomBytes(bytes(1))


async def test_a_lane_that_raises_what_nobody_expects_is_replaced(start: Start) -> None:
    lanes = [FakeLane() for _ in range(4)]
    kmi = await start(*lanes[:2], spare=lanes[2:])
    for lane in lanes[:2]:
        lane.bug = AttributeError("planted")
    assert await fault(kmi, 1) is Fault.UNAVAILABLE  # on both: it may be the cause
    await until(lambda: set(lanes[2:]) == set(kmi._supervision.lanes))
    assert [lane.closed for lane in lanes] == [True, True, False, False]
    assert kmi.state is KmiState.CONNECTED
    assert await submit(kmi, 1) == RandomBytes(bytes(1))
    lanes[2].bug = AttributeError("planted")
    results = await asyncio.gather(*(submit(kmi, i) for i in range(12)))
    assert [len(r.data) for r in results] == list(range(12))


async def test_a_broken_lane_is_replaced(start: Start) -> None:
    first, second = FakeLane(), FakeLane()
    kmi = await start(first, spare=[second])
    first.die()
    await until(lambda: second in kmi._supervision.lanes)
    assert await submit(kmi, 1) == RandomBytes(bytes(1))
    assert (first.batches, second.batches, first.closed) == ([], [1], True)
    assert sample(kmi, "xkiproxy_kmi_lane_restarts_total", reason="device") == 1
    assert kmi.state is KmiState.CONNECTED


async def test_while_a_lane_is_replaced_requests_wait_within_their_deadline(start: Start) -> None:
    first, second = FakeLane(), FakeLane()
    kmi = await start(first, spare=[second])
    first.breaks = True
    assert await submit(kmi, 1) == RandomBytes(bytes(1))
    assert second.batches == [1]


async def test_the_breaker_opens_when_nothing_can_be_started(start: Start) -> None:
    lane = FakeLane()
    kmi = await start(lane)
    lane.die()
    await until(lambda: kmi.launcher.launches > 1)
    assert await fault(kmi, 1) is Fault.UNAVAILABLE
    assert kmi.state is KmiState.DISCONNECTED
    assert sample(kmi, "xkiproxy_kmi_state", state="disconnected") == 1
    assert sample(kmi, "xkiproxy_kmi_state", state="connected") == 0
    assert sample(kmi, "xkiproxy_kmi_lanes", state="failed") == 1
    kmi.launcher.lanes.append(FakeLane())
    await until(lambda: kmi.state is KmiState.CONNECTED)
    assert await submit(kmi, 1) == RandomBytes(bytes(1))


async def test_what_waits_is_refused_when_the_breaker_opens(start: Start) -> None:
    lane = FakeLane()
    kmi = await start(lane)
    lane.open.clear()
    lane.breaks = True
    tasks = [asyncio.create_task(submit(kmi, i)) for i in range(20)]
    await until(lambda: bool(lane.batches))
    lane.open.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {o.fault for o in outcomes} == {Fault.UNAVAILABLE}


async def test_a_refused_login_is_never_tried_again(start: Start) -> None:
    lanes = [FakeLane() for _ in range(3)]
    kmi = await start(*lanes)
    kmi.launcher.error = LaneError("the token refused the PIN", BreakReason.LOGIN)
    before = kmi.launcher.launches
    for lane in lanes:
        lane.die()
    await until(lambda: all(task.done() for task in kmi._supervision._supervisors))
    assert kmi.launcher.launches == before + 3  # the launcher sees to it that one PIN is sent
    assert (kmi.state, kmi.error) == (KmiState.DISCONNECTED, "the token refused the PIN")
    assert kmi.lanes == [LaneState.FAILED] * 3
    assert sample(kmi, "xkiproxy_kmi_lane_restarts_total", reason="login") == 3
    assert await fault(kmi, 1) is Fault.UNAVAILABLE


@pytest.mark.parametrize("reason", [BreakReason.START, BreakReason.LOGIN])
async def test_a_lane_that_cannot_start_is_seen_beside_one_that_can(
    start: Start, reason: BreakReason
) -> None:
    first, second = FakeLane(), FakeLane()
    kmi = await start(first, second)
    kmi.launcher.error = LaneError("no session is left", reason)
    assert kmi.lanes == [LaneState.IDLE, LaneState.IDLE]
    second.die()
    await until(lambda: kmi.launcher.launches == 3)
    await until(lambda: LaneState.FAILED in kmi.lanes)
    failed, well = (kmi.lanes.index(s) for s in (LaneState.FAILED, LaneState.IDLE))
    assert {failed, well} == {0, 1}
    assert sample(kmi, "xkiproxy_kmi_lanes", state="failed") == 1
    assert sample(kmi, "xkiproxy_kmi_lanes", state="starting") == 0
    assert sample(kmi, "xkiproxy_kmi_lane_restarts_total", reason=reason.value) == 1
    assert (kmi.state, kmi.error) == (KmiState.DEGRADED, "no session is left")


async def test_why_a_kmi_is_away_is_said_at_once_and_kept(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    lane = FakeLane()
    kmi = await start(lane)
    assert (kmi.error, kmi.last_error) == ("", None)
    kmi.launcher.hangs = True
    lane.die()
    await until(lambda: kmi.state is KmiState.DISCONNECTED)
    assert kmi.error == "planted"
    kmi.launcher.lanes.append(FakeLane())
    kmi.launcher.hangs = False
    await until(lambda: kmi.state is KmiState.CONNECTED)
    assert kmi.error == ""
    assert kmi.last_error is not None
    assert kmi.last_error.error == "planted"
    said = {r.getMessage(): r.levelname for r in caplog.records if " is " in r.getMessage()}
    assert said == {
        "KMI hsm is connected": "INFO",
        "KMI hsm is disconnected: planted": "WARNING",
    }


async def test_why_one_lane_is_away_outlives_the_return_of_another(start: Start) -> None:
    first, second = FakeLane(), FakeLane()
    kmi = await start(first, second)
    kmi.launcher.error = LaneError("no session is left", BreakReason.START)
    second.die()
    await until(lambda: kmi.error == "no session is left")
    spare = FakeLane()
    first.die()
    await until(lambda: kmi.state is KmiState.DISCONNECTED)
    kmi.launcher.lanes.append(spare)
    await until(lambda: kmi.state is KmiState.DEGRADED)
    assert kmi.error == "no session is left"


async def test_an_error_can_be_sent_on_whatever_file_it_names(start: Start) -> None:
    lane = FakeLane()
    kmi = await start(lane)
    kmi.launcher.error = LaneError("caf\udce9.so: cannot be loaded", BreakReason.START)
    lane.die()
    await until(lambda: kmi.error == "caf\\udce9.so: cannot be loaded")


async def test_an_orderly_end_is_no_warning(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    kmi = await start(FakeLane(), FakeLane())
    caplog.set_level(logging.INFO)
    caplog.clear()
    await kmi.close()
    assert kmi.state is KmiState.DISCONNECTED
    assert not caplog.records


async def test_that_lanes_start_one_after_the_other_is_no_warning(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await start(FakeLane(), FakeLane())
    levels = {record.levelname for record in caplog.records if "KMI hsm is" in record.getMessage()}
    assert levels == {"INFO"}


async def test_a_start_that_hangs_holds_up_no_other(start: Start, monkeypatch) -> None:
    monkeypatch.setattr("xkiproxy.kmi.supervision._PATIENCE_SECONDS", 0.1)
    lane, hole = FakeLane(), asyncio.Event()

    class Launcher(FakeLauncher):
        async def launch(self, index: int, *, home: bool = False) -> FakeLane:
            if index == 0:
                await hole.wait()
            return await super().launch(index, home=home)

    kmi = QueuedKmi(
        "hsm", "pkcs11", Launcher(lane), KmiMetrics(Metrics(), "hsm"),
        lanes=2, queue_size=8, max_batch=8,
    )  # fmt: skip
    kmi.start()
    try:
        async with asyncio.timeout(1):
            await kmi.check()
            assert await submit(kmi, 1) == RandomBytes(bytes(1))
        assert kmi.state is KmiState.DEGRADED
        failures = asyncio.create_task(kmi.first_failures())
        await asyncio.sleep(0.05)
        assert not failures.done()
        hole.set()
        assert await failures == ["no more lanes"]
    finally:
        await kmi.close()


async def test_what_the_first_starts_failed_with_is_kept(start: Start) -> None:
    kmi = await start(FakeLane(), FakeLane())
    assert await kmi.first_failures() == []
    kmi = await start()
    assert await kmi.first_failures() == ["no more lanes"]
    kmi.launcher.lanes.append(FakeLane())
    await until(lambda: kmi.state is KmiState.CONNECTED)
    assert await kmi.first_failures() == ["no more lanes"]


async def test_keys_that_changed_make_a_new_epoch(start: Start) -> None:
    lane = FakeLane()
    kmi = await start(lane)
    await submit(kmi, 1)
    kmi.refresh(False)
    await submit(kmi, 1)
    kmi.refresh(True)
    await submit(kmi, 1)
    assert lane.epochs == [0, 0, 1]


async def test_closing_refuses_what_waits(start: Start) -> None:
    lane = FakeLane()
    kmi = await start(lane)
    lane.open.clear()
    lane.breaks = True
    running = asyncio.create_task(submit(kmi, 1))
    await until(lambda: lane.batches == [1])
    waiting = asyncio.create_task(submit(kmi, 1))
    await asyncio.sleep(0)
    lane.open.set()
    await kmi.close()
    for task in (running, waiting):
        with pytest.raises(OperationError):
            await task
    assert lane.closed


async def test_the_check_probes_every_lane(start: Start) -> None:
    one, two = FakeLane(), FakeLane()
    kmi = await start(one, two)
    assert kmi.state is KmiState.CONNECTED
    await kmi.check()
    assert (one.probes, two.probes) == (2, 2)
    two.breaks = True
    await kmi.check()
    await until(lambda: kmi.state is KmiState.DEGRADED)
    one.breaks = True
    await kmi.check()
    await until(lambda: kmi.state is KmiState.DISCONNECTED)


class FakeInlineLane:
    broken = False
    warning = ""

    def execute(self, operation: Random) -> RandomBytes:
        if operation.length > 1000:
            raise OperationError(Fault.KEY_NOT_FOUND, "planted")
        return RandomBytes(bytes(operation.length))

    def probe(self) -> None:
        if self.broken:
            raise OperationError(Fault.UNAVAILABLE, "planted")

    refresh = probe

    def close(self) -> None:
        pass


async def test_inline_kmi() -> None:
    metrics = Metrics()
    lane = FakeInlineLane()
    kmi = InlineKmi("local", "software", lane, KmiMetrics(metrics, "local"))
    assert kmi.state is KmiState.DISCONNECTED
    await kmi.check()
    assert kmi.state is KmiState.CONNECTED
    assert not await kmi.first_failures()
    assert await kmi.submit(Random(4), soon()) == RandomBytes(bytes(4))
    with pytest.raises(OperationError) as caught:
        await kmi.submit(Random(4), soon(-1))
    assert caught.value.fault is Fault.DEADLINE_EXCEEDED
    with pytest.raises(OperationError):
        await kmi.submit(Random(2000), soon())
    lane.broken = True
    kmi.refresh(False)
    assert (kmi.state, kmi.error) == (KmiState.DISCONNECTED, "planted")
    assert kmi.lanes == [LaneState.FAILED]
    await kmi.check()
    assert kmi.state is KmiState.DISCONNECTED
    lane.broken = False
    await kmi.check()
    assert (kmi.state, kmi.error, kmi.lanes) == (KmiState.CONNECTED, "", [LaneState.IDLE])
    assert kmi.last_error is not None
    assert kmi.last_error.error == "planted"
    lane.warning = "goes on"
    kmi.refresh(False)
    assert (kmi.state, kmi.error, kmi.lanes) == (KmiState.DEGRADED, "goes on", [LaneState.IDLE])
    await kmi.check()
    assert kmi.state is KmiState.DEGRADED
    counted = {
        sample.labels["outcome"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "xkiproxy_kmi_operations_total"
    }
    assert counted == {"ok": 1, "deadline_exceeded": 1, "key_not_found": 1}
    await kmi.close()


# ---- lanes at another endpoint than their own ------------------------------------------------


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes are tried at home without much waiting."""
    monkeypatch.setattr("xkiproxy.kmi.supervision._HOME_SECONDS", 0.02)
    monkeypatch.setattr("xkiproxy.kmi.supervision._DRAIN_SECONDS", 0.2)


@pytest.mark.usefixtures("often")
async def test_a_lane_comes_home_and_nothing_is_lost(start: Start) -> None:
    away, home = FakeLane(), FakeLane()
    kmi = await start(away)
    away.open.clear()
    first = asyncio.create_task(submit(kmi, 1))
    await until(lambda: away.batches == [1])
    kmi.launcher.away, kmi.launcher.home = True, home
    await until(lambda: not kmi.launcher.away)
    assert await submit(kmi, 2) == RandomBytes(bytes(2))
    assert (home.batches, away.batches) == ([1], [1])
    assert not away.closed, "it ends what it has first"
    away.open.set()
    assert await first == RandomBytes(bytes(1))
    await until(lambda: away.closed)
    assert home.batches == [1]
    await asyncio.sleep(0.1)
    assert kmi.state is KmiState.CONNECTED
    assert kmi.lanes == [LaneState.IDLE]
    assert kmi.launcher.home_launches == 1
    assert kmi.launcher.launches == 1
    assert not any(sample(kmi, "xkiproxy_kmi_lane_restarts_total", reason=r) for r in BreakReason)


@pytest.mark.usefixtures("often")
async def test_what_the_lane_before_does_not_end_runs_again(start: Start) -> None:
    away, home = FakeLane(), FakeLane()
    kmi = await start(away)
    away.open.clear()
    away.breaks = True  # as a lane does that is closed with a batch in work
    first = asyncio.create_task(submit(kmi, 1))
    await until(lambda: away.batches == [1])
    kmi.launcher.away, kmi.launcher.home = True, home
    await until(lambda: away.closed)
    away.open.set()
    assert await first == RandomBytes(bytes(1))
    assert home.batches == [1]


@pytest.mark.usefixtures("often")
async def test_the_lane_at_home_is_the_one_that_is_watched(start: Start) -> None:
    away, home, third = FakeLane(), FakeLane(), FakeLane()
    kmi = await start(away, spare=[third])
    kmi.launcher.away, kmi.launcher.home = True, home
    await until(lambda: away.closed)
    home.die()
    await until(lambda: kmi.lanes == [LaneState.IDLE] and kmi.launcher.launches == 2)
    assert await submit(kmi, 1) == RandomBytes(bytes(1))
    assert third.batches == [1]
    assert home.closed
    assert sample(kmi, "xkiproxy_kmi_lane_restarts_total", reason="device") == 1


@pytest.mark.usefixtures("often")
async def test_while_home_is_away_the_lane_stays_and_is_tried_again(start: Start) -> None:
    away, home = FakeLane(), FakeLane()
    kmi = await start(away)
    kmi.launcher.home = LaneError("still away", BreakReason.START)
    kmi.launcher.away = True
    await until(lambda: kmi.launcher.home_launches > 3)
    assert kmi.state is KmiState.CONNECTED
    assert kmi.last_error is None
    assert await submit(kmi, 1) == RandomBytes(bytes(1))
    kmi.launcher.home = home
    await until(lambda: away.closed)
    assert await submit(kmi, 1) == RandomBytes(bytes(1))
    assert home.batches == [1]


@pytest.mark.usefixtures("often")
async def test_a_login_that_is_refused_at_home_is_not_tried_again(start: Start) -> None:
    away = FakeLane()
    kmi = await start(away)
    kmi.launcher.home = LaneError("the PIN is wrong", BreakReason.LOGIN)
    kmi.launcher.away = True
    await until(lambda: kmi.launcher.home_launches > 0)
    await asyncio.sleep(0.2)
    assert kmi.launcher.home_launches == 1
    assert await submit(kmi, 1) == RandomBytes(bytes(1))


@pytest.mark.usefixtures("often")
async def test_a_start_at_home_that_hangs_holds_up_no_replacement(start: Start) -> None:
    away, next_ = FakeLane(), FakeLane()
    kmi = await start(away, spare=[next_])
    kmi.launcher.away = True
    await until(lambda: kmi.launcher.home_launches == 1)
    away.die()
    await until(lambda: kmi.launcher.launches == 2)
    assert await submit(kmi, 1) == RandomBytes(bytes(1))
    assert next_.batches == [1]


@pytest.mark.usefixtures("often")
async def test_a_kmi_that_is_closed_while_a_lane_comes_home_closes_both(start: Start) -> None:
    away, home = FakeLane(), FakeLane()
    kmi = await start(away)
    away.open.clear()
    first = asyncio.create_task(submit(kmi, 1))
    await until(lambda: away.batches == [1])
    kmi.launcher.away, kmi.launcher.home = True, home
    await until(lambda: not kmi.launcher.away)
    closing = asyncio.create_task(kmi.close())
    await until(lambda: away.closed and home.closed)
    away.open.set()
    await closing
    assert await first == RandomBytes(bytes(1))


@pytest.mark.usefixtures("often")
async def test_a_start_at_home_that_takes_long_to_end_delays_nothing(
    start: Start, monkeypatch
) -> None:
    away, next_ = FakeLane(), FakeLane()
    kmi = await start(away, spare=[next_])
    ended = asyncio.Event()

    async def launch_home() -> FakeLane:
        kmi.launcher.home_launches += 1
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.5)
            ended.set()
        raise AssertionError

    monkeypatch.setattr(kmi.launcher, "launch_home", launch_home)
    kmi.launcher.away = True
    await until(lambda: kmi.launcher.home_launches == 1)
    away.die()
    await until(lambda: next_ in kmi._supervision.lanes)
    assert not ended.is_set()
    assert await submit(kmi, 1) == RandomBytes(bytes(1))
    await kmi.close()
    assert ended.is_set()


# ---- what nobody waits for any more ----------------------------------------------------------


async def test_what_is_over_takes_no_room_in_the_queue(start: Start) -> None:
    lane = FakeLane()
    kmi = await start(lane, queue_size=3)
    lane.open.clear()
    running = asyncio.create_task(submit(kmi, 1))
    await until(lambda: lane.batches == [1])
    for _ in range(7):
        assert await fault(kmi, 1, soon(0.01)) is Fault.DEADLINE_EXCEEDED
    assert sample(kmi, "xkiproxy_kmi_queue_depth") == 0
    lane.open.set()
    await running
    assert lane.batches == [1]


async def test_a_batch_leaves_out_what_is_over_by_the_clock(start: Start, monkeypatch) -> None:
    """Even if the loop was held up, and no timer has run."""
    monkeypatch.setattr("xkiproxy.kmi.deadlines._COARSENESS_SECONDS", 60.0)
    lane = FakeLane()
    kmi = await start(lane)
    lane.open.clear()
    running = asyncio.create_task(submit(kmi, 1))
    await until(lambda: lane.batches == [1])
    late = asyncio.create_task(fault(kmi, 1, soon(0.01)))
    good = asyncio.create_task(submit(kmi, 2))
    await asyncio.sleep(0.05)
    lane.open.set()
    assert await late is Fault.DEADLINE_EXCEEDED
    await asyncio.gather(running, good)
    assert lane.batches == [1, 1]
    assert not kmi._queue.deadlines._waiting
