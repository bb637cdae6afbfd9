"""The dispatcher: batches, deadlines, a bounded queue, broken lanes.

The lanes here stand in for HSM sessions, which the tests of the PKCS#11 KMI bring: what is tested
is what happens around a lane.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from xkiproxy.crypto.operations import Fault, OperationError, Random, RandomBytes
from xkiproxy.kmi.base import KmiState, LaneError
from xkiproxy.kmi.dispatcher import InlineKmi, KmiMetrics, QueuedKmi
from xkiproxy.observability.metrics import Metrics


class FakeLane:
    """Answers a Random with as many zero bytes; waits, breaks or fails when told."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.open = asyncio.Event()
        self.open.set()
        self.breaks = False

    async def execute(self, batch: Sequence[Random]) -> list[RandomBytes | OperationError]:
        self.batches.append(len(batch))
        await self.open.wait()
        if self.breaks:
            raise LaneError("planted")
        return [
            RandomBytes(bytes(op.length))
            if op.length < 1000
            else OperationError(Fault.KEY_NOT_FOUND, "planted")
            for op in batch
        ]

    async def probe(self) -> None:
        if self.breaks:
            raise LaneError("planted")

    async def close(self) -> None:
        pass


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


Start = Callable[..., QueuedKmi]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    started: list[QueuedKmi] = []

    def make(*lanes: FakeLane, queue_size: int = 100, max_batch: int = 8) -> QueuedKmi:
        metrics = Metrics()
        kmi = QueuedKmi(
            "hsm", "pkcs11", lanes, KmiMetrics(metrics, "hsm"),
            queue_size=queue_size, max_batch=max_batch,
        )  # fmt: skip
        kmi.registry = metrics.registry
        started.append(kmi)
        return kmi

    yield make
    for kmi in started:
        await kmi.close()


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
    kmi = start(lane)
    assert await submit(kmi, 3) == RandomBytes(bytes(3))
    assert lane.batches == [1]


async def test_batches_grow_while_the_lane_is_busy_up_to_max_batch(start: Start) -> None:
    lane = FakeLane()
    lane.open.clear()
    kmi = start(lane, max_batch=8)
    first = asyncio.create_task(submit(kmi, 1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    rest = [asyncio.create_task(submit(kmi, i)) for i in range(20)]
    await asyncio.sleep(0)
    assert sample(kmi, "xkiproxy_kmi_lanes", state="busy") == 1
    lane.open.set()
    results = await asyncio.gather(first, *rest)
    assert [len(r.data) for r in results] == [1, *range(20)]
    assert lane.batches == [1, 8, 8, 4]
    assert sample(kmi, "xkiproxy_kmi_batch_size_sum") == 21


async def test_an_error_of_one_operation_stays_with_it(start: Start) -> None:
    kmi = start(FakeLane())
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
    lane.open.clear()
    kmi = start(lane, queue_size=2)
    running = asyncio.create_task(submit(kmi, 1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(submit(kmi, 1)) for _ in range(2)]
    await asyncio.sleep(0)
    assert await fault(kmi, 1) is Fault.THROTTLED
    lane.open.set()
    await asyncio.gather(running, *waiting)


async def test_an_operation_past_its_deadline_never_reaches_the_kmi(start: Start) -> None:
    lane = FakeLane()
    lane.open.clear()
    kmi = start(lane)
    running = asyncio.create_task(submit(kmi, 1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert await fault(kmi, 2, soon(0.02)) is Fault.DEADLINE_EXCEEDED
    lane.open.set()
    await running
    await submit(kmi, 3)
    assert lane.batches == [1, 1]


async def test_a_client_that_goes_away_costs_the_kmi_nothing(start: Start) -> None:
    lane = FakeLane()
    lane.open.clear()
    kmi = start(lane)
    running = asyncio.create_task(submit(kmi, 1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gone = asyncio.create_task(submit(kmi, 2))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    lane.open.set()
    await running
    assert lane.batches == [1]


async def test_the_batch_of_a_broken_lane_runs_again_on_another(start: Start) -> None:
    broken, good = FakeLane(), FakeLane()
    broken.breaks = True
    kmi = start(broken, good)
    results = await asyncio.gather(*(submit(kmi, i) for i in range(12)))
    assert [len(r.data) for r in results] == list(range(12))
    for _ in range(3):
        await submit(kmi, 1)
    assert kmi.state is KmiState.DEGRADED
    assert sample(kmi, "xkiproxy_kmi_lanes", state="failed") == 1


async def test_an_operation_that_breaks_lanes_is_given_up_after_the_second(start: Start) -> None:
    lanes = [FakeLane() for _ in range(3)]
    lanes[0].breaks = lanes[1].breaks = lanes[2].breaks = True
    kmi = start(*lanes)
    assert await fault(kmi, 1) is Fault.UNAVAILABLE
    assert sum(len(lane.batches) for lane in lanes) == 2


async def test_without_lanes_everything_is_refused_at_once(start: Start) -> None:
    lane = FakeLane()
    lane.breaks = True
    kmi = start(lane)
    assert await fault(kmi, 1) is Fault.UNAVAILABLE
    assert await fault(kmi, 1) is Fault.UNAVAILABLE
    assert kmi.state is KmiState.DISCONNECTED
    assert sample(kmi, "xkiproxy_kmi_state", state="disconnected") == 1
    assert sample(kmi, "xkiproxy_kmi_state", state="connected") == 0


async def test_closing_refuses_what_waits(start: Start) -> None:
    lane = FakeLane()
    lane.open.clear()
    kmi = start(lane)
    running = asyncio.create_task(submit(kmi, 1, soon(0.5)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting = asyncio.create_task(submit(kmi, 1))
    await asyncio.sleep(0)
    await kmi.close()
    with pytest.raises(OperationError, match="stopping"):
        await waiting
    with pytest.raises(OperationError):
        await running


async def test_the_check_says_which_state_it_is(start: Start) -> None:
    one, two = FakeLane(), FakeLane()
    kmi = start(one, two)
    await kmi.check()
    assert kmi.state is KmiState.CONNECTED
    two.breaks = True
    await kmi.check()
    assert (kmi.state, kmi.error) == (KmiState.DEGRADED, "planted")
    one.breaks = True
    await kmi.check()
    assert kmi.state is KmiState.DISCONNECTED


class FakeInlineLane:
    broken = False

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
    assert await kmi.submit(Random(4), soon()) == RandomBytes(bytes(4))
    with pytest.raises(OperationError) as caught:
        await kmi.submit(Random(4), soon(-1))
    assert caught.value.fault is Fault.DEADLINE_EXCEEDED
    with pytest.raises(OperationError):
        await kmi.submit(Random(2000), soon())
    lane.broken = True
    kmi.refresh()
    assert (kmi.state, kmi.error) == (KmiState.DISCONNECTED, "planted")
    await kmi.check()
    assert kmi.state is KmiState.DISCONNECTED
    counted = {
        sample.labels["outcome"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "xkiproxy_kmi_operations_total"
    }
    assert counted == {"ok": 1, "deadline_exceeded": 1, "key_not_found": 1}
    await kmi.close()
