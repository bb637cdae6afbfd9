"""From one KMI to the next: KMIs here are scripts, which answer, refuse, stall or are slow."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import pytest

from xkiproxy.crypto.algorithms import Algorithm, Padding, Usage
from xkiproxy.crypto.operations import (
    Encrypt,
    Encrypted,
    Fault,
    KeyState,
    Operation,
    OperationError,
    Random,
    RandomBytes,
    Result,
)
from xkiproxy.keystores.authorization import Authorizer
from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.keystores.encryptions import Encryptions
from xkiproxy.keystores.failover import Failover, Served
from xkiproxy.keystores.keystore import KeyStore
from xkiproxy.keystores.policies import Policies, split
from xkiproxy.keystores.replay import ReplayWindow
from xkiproxy.keystores.signing_keys import CachedSigningKeys
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog
from xkiproxy.keystores.trail import Trail
from xkiproxy.kmi.base import KmiState
from xkiproxy.kmi.contract import Kmi
from xkiproxy.kmi.standing import Standing
from xkiproxy.observability.metrics import FailoverMetrics, Metrics
from xkiproxy.observability.timing import Timing

OPERATION = Encrypt("k", b"plaintext")


class Scripted:
    """Stands for a KMI: does what `script` says, and notes what it was asked."""

    def __init__(self, name: str, script: str = "ok", seconds: float = 0.0) -> None:
        self.name = name
        self.script = script
        self.seconds = seconds
        self.state = KmiState.CONNECTED
        self.standing = Standing()
        self.asked = 0
        self.given_up = 0

    async def submit(
        self, operation: Operation, deadline: float, timing: Timing | None = None
    ) -> Result:
        self.asked += 1
        try:
            return await self._answer(operation, deadline)
        except asyncio.CancelledError:
            self.given_up += 1
            raise

    async def _answer(self, operation: Operation, deadline: float) -> Result:
        if self.script == "silent":
            await asyncio.sleep(deadline - time.monotonic())
            raise OperationError(Fault.DEADLINE_EXCEEDED, "The key manager missed the deadline.")
        await asyncio.sleep(self.seconds)
        if self.script == "ok" and isinstance(operation, Random):
            return RandomBytes(b"r" * operation.length)
        if self.script == "ok":
            return Encrypted(b"of " + self.name.encode(), b"iv", 1, Algorithm.AES_GCM, Padding.NONE)
        raise OperationError(Fault[self.script], self.script)


class Site:
    """Two KMIs, and what the failover between them counts."""

    forbidden = ""
    """The name of a KMI that may not be asked."""

    def __init__(
        self, first: str = "ok", second: str = "ok", *more: str, hedge: float | None = None
    ) -> None:
        self.one, self.two = Scripted("one", first), Scripted("two", second)
        self.more = [Scripted(f"more {i}", script) for i, script in enumerate(more)]
        self.metrics = Metrics()
        self.failover = Failover(FailoverMetrics(self.metrics, "demo"), hedge)
        self.entered: list[str] = []

    async def submit(self, seconds: float = 0.4) -> Served:
        kmis: list[Any] = [self.one, self.two, *self.more]
        deadline = time.monotonic() + seconds
        return await self.failover.submit(kmis, OPERATION, deadline, self._enter)

    def _enter(self, kmi: Kmi) -> None:
        if kmi.name == self.forbidden:
            raise OperationError(Fault.ACCESS_DENIED, "The key's owner does not permit this.")
        self.entered.append(kmi.name)

    async def by(self, seconds: float = 0.4) -> str:
        return (await self.submit(seconds)).kmi.name

    @property
    def asked(self) -> tuple[int, int]:
        return self.one.asked, self.two.asked

    def counted(self, name: str, **labels: str) -> float:
        labels["keystore"] = "demo"
        return self.metrics.registry.get_sample_value(f"xkiproxy_kmi_{name}_total", labels) or 0.0

    @property
    def failovers(self) -> float:
        return self.counted("failovers", **{"from": "one", "to": "two"})


async def test_the_first_is_asked_alone() -> None:
    site = Site()
    assert [await site.by() for _ in range(3)] == ["one"] * 3
    assert site.asked == (3, 0)
    assert site.failovers == 0


@pytest.mark.parametrize("fault", ["UNAVAILABLE", "silent"])
async def test_one_failed_attempt_is_enough(fault: str) -> None:
    site = Site(fault)
    began = time.monotonic()
    assert await site.by(0.2) == "two"
    assert time.monotonic() - began < 0.2
    assert [await site.by(0.2) for _ in range(4)] == ["two"] * 4
    assert site.asked == (1, 5)
    assert site.failovers == 5
    assert site.entered[:3] == ["one", "two", "two"]


async def test_a_full_queue_overflows_and_says_nothing_of_the_kmi() -> None:
    site = Site("THROTTLED")
    assert [await site.by() for _ in range(3)] == ["two"] * 3
    assert site.asked == (3, 3)
    assert site.one.standing.is_good


async def test_nor_does_a_full_queue_end_a_trial_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xkiproxy.kmi.standing._FIRST_PAUSE_SECONDS", 0.01)
    site = Site("UNAVAILABLE")
    assert await site.by() == "two"
    site.one.script = "THROTTLED"
    await asyncio.sleep(0.02)
    assert await site.by() == "two"
    assert site.asked == (2, 2)
    assert not site.one.standing.is_good


async def test_so_does_an_attempt_that_had_no_time() -> None:
    site = Site("silent", "silent")
    with pytest.raises(OperationError, match="deadline"):
        await site.submit(0.01)
    assert site.one.standing.is_good


async def test_what_would_be_the_same_elsewhere_is_not_tried_there() -> None:
    site = Site("INVALID_CIPHERTEXT")
    with pytest.raises(OperationError) as caught:
        await site.submit()
    assert caught.value.fault is Fault.INVALID_CIPHERTEXT
    assert site.asked == (1, 0)
    assert site.one.standing.is_good


async def test_a_key_that_one_does_not_permit_is_asked_for_elsewhere_and_says_nothing_of_it() -> (
    None
):
    site = Site("KEY_FORBIDDEN")
    assert [await site.by() for _ in range(3)] == ["two"] * 3
    assert site.asked == (3, 3)
    assert site.one.standing.is_good
    site.two.script = "KEY_FORBIDDEN"
    with pytest.raises(OperationError) as caught:
        await site.submit()
    assert caught.value.fault is Fault.KEY_FORBIDDEN


@pytest.mark.parametrize("fault", ["INVALID_CIPHERTEXT", "KEY_FORBIDDEN", "INTERNAL"])
async def test_a_trial_that_is_answered_with_a_refusal_shows_that_it_is_there(fault: str) -> None:
    site = Site("UNAVAILABLE")
    assert await site.by() == "two"
    site.one.script = fault
    await asyncio.sleep(0.3)
    with contextlib.suppress(OperationError):
        await site.submit()
    assert site.asked[0] == 2
    assert site.one.standing.is_good


async def test_a_trial_that_may_not_be_made_is_left_to_the_next() -> None:
    site = Site("UNAVAILABLE")
    assert await site.by() == "two"
    site.one.script, site.forbidden = "ok", "one"
    await asyncio.sleep(0.3)
    with pytest.raises(OperationError):
        await site.submit()
    site.forbidden = ""
    assert await site.by() == "one"


async def test_it_is_taken_back_after_one_trial() -> None:
    site = Site("UNAVAILABLE")
    assert await site.by() == "two"
    site.one.script, site.one.seconds = "ok", 0.05
    await asyncio.sleep(0.3)
    # Of many at the same time one tries it; the others do not wait for what comes of that.
    assert sorted(await asyncio.gather(*(site.by() for _ in range(20)))) == ["one"] + ["two"] * 19
    assert {await site.by() for _ in range(10)} == {"one"}


async def test_with_all_away_all_are_asked_and_the_last_speaks() -> None:
    site = Site("UNAVAILABLE", "UNAVAILABLE")
    for number in range(1, 4):
        with pytest.raises(OperationError) as caught:
            await site.submit()
        assert caught.value.fault is Fault.UNAVAILABLE
        assert site.asked == (number, number)
    site.two.script = "ok"
    assert await site.by() == "two"


async def test_a_kmi_that_is_disconnected_comes_last() -> None:
    site = Site()
    site.one.state = KmiState.DISCONNECTED
    assert await site.by() == "two"
    assert site.asked == (0, 1)
    site.two.script = "UNAVAILABLE"
    assert await site.by() == "one"  # what is known of it may be old


async def test_a_retry_never_passes_the_deadline() -> None:
    site = Site("silent", "silent")
    began = time.monotonic()
    with pytest.raises(OperationError) as caught:
        await site.submit(0.2)
    assert caught.value.fault is Fault.DEADLINE_EXCEEDED
    assert 0.15 < time.monotonic() - began < 0.4
    assert site.asked == (1, 1)


# ---- hedging ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "by", "asked", "won", "lost"),
    [
        ((0.0, 0.0), "one", (1, 0), 0, 0),
        ((0.2, 0.0), "two", (1, 1), 1, 0),
        ((0.1, 0.3), "one", (1, 1), 0, 1),
    ],
)
async def test_a_hedge(
    seconds: tuple[float, float], by: str, asked: tuple[int, int], won: int, lost: int
) -> None:
    site = Site(hedge=0.03)
    site.one.seconds, site.two.seconds = seconds
    assert await site.by(2.0) == by
    assert site.asked == asked
    assert site.entered[-1] == by
    assert (site.counted("hedges", outcome="won"), site.counted("hedges", outcome="lost")) == (
        won,
        lost,
    )
    assert site.one.standing.is_good  # to be slow once is no failure


async def test_a_hedge_for_one_that_refuses_at_once() -> None:
    site = Site("UNAVAILABLE", hedge=5.0)
    began = time.monotonic()
    assert await site.by(10.0) == "two"
    assert time.monotonic() - began < 1.0
    assert not site.one.standing.is_good


@pytest.mark.parametrize(
    ("seconds", "by", "given_up"), [((30.0, 0.0), "two", (1, 0)), ((0.5, 30.0), "one", (0, 1))]
)
async def test_who_loses_a_hedge_is_given_up(
    seconds: tuple[float, float], by: str, given_up: tuple[int, int]
) -> None:
    site = Site(hedge=0.01)
    site.one.seconds, site.two.seconds = seconds
    assert await site.by(60.0) == by
    await asyncio.sleep(0)  # the task that was cancelled has its turn
    assert (site.one.given_up, site.two.given_up) == given_up


async def test_a_hedge_is_given_up_with_its_request() -> None:
    site = Site(hedge=0.01)
    site.one.seconds = site.two.seconds = 30.0
    request = asyncio.create_task(site.by(60.0))
    async with asyncio.timeout(10):
        while site.asked != (1, 1):
            await asyncio.sleep(0.01)
    request.cancel()
    await asyncio.wait({request})
    await asyncio.sleep(0)
    assert (site.one.given_up, site.two.given_up) == (1, 1)


async def test_no_hedge_where_the_second_may_not_be_asked() -> None:
    site = Site(hedge=0.01)
    site.one.seconds, site.forbidden = 0.1, "two"
    assert await site.by(2.0) == "one"
    assert site.asked == (1, 0)
    assert site.counted("hedges", outcome="lost") == 0


async def test_a_hedge_where_both_fail() -> None:
    site = Site("silent", "UNAVAILABLE", hedge=0.01)
    with pytest.raises(OperationError) as caught:
        await site.submit(0.1)
    assert caught.value.fault is Fault.DEADLINE_EXCEEDED
    site = Site("INVALID_CIPHERTEXT", hedge=1.0)
    with pytest.raises(OperationError) as caught:
        await site.submit(2.0)
    assert caught.value.fault is Fault.INVALID_CIPHERTEXT
    assert site.asked == (1, 0)


async def test_each_failure_is_noted_at_the_kmi_that_it_is_of() -> None:
    site = Site("THROTTLED", hedge=0.01)
    assert await site.by() == "two"
    assert site.one.standing.is_good  # to be full is no failure, here too
    site = Site("UNAVAILABLE", "UNAVAILABLE", hedge=0.01)
    with pytest.raises(OperationError):
        await site.submit()
    assert (site.one.standing.is_good, site.two.standing.is_good) == (False, False)


async def test_two_that_stall_leave_time_for_a_third() -> None:
    site = Site("silent", "silent", "ok", hedge=0.01)
    assert await site.by(0.4) == "more 0"
    assert (site.one.standing.is_good, site.two.standing.is_good) == (False, False)
    assert await site.by(0.4) == "more 0"
    assert site.asked == (1, 1)


async def test_one_that_loses_every_hedge_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xkiproxy.kmi.standing._FIRST_PAUSE_SECONDS", 60.0)
    site = Site(hedge=0.01)
    site.one.seconds = 5.0
    for _ in range(5):
        assert site.one.standing.is_good
        assert await site.by(20.0) == "two"
    assert not site.one.standing.is_good
    assert [await site.by(20.0) for _ in range(3)] == ["two"] * 3
    assert site.asked == (5, 8)
    assert site.counted("hedges", outcome="won") == 5


async def test_one_that_lost_every_hedge_is_tried_until_it_is_fast_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("xkiproxy.kmi.standing._FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("xkiproxy.kmi.standing._LAST_PAUSE_SECONDS", 0.01)
    site = Site(hedge=1.0)
    site.one.seconds = 30.0
    for _ in range(5):
        site.one.standing.outrun(time.monotonic(), time.monotonic())
    await asyncio.sleep(0.02)
    assert await site.by(60.0) == "two"  # the trial has cost this one its second
    assert site.asked == (1, 1)
    assert not site.one.standing.is_good
    site.one.seconds = 0.0
    await asyncio.sleep(0.02)
    assert await site.by(60.0) == "one"
    assert site.one.standing.is_good


async def test_one_that_is_slow_now_and_then_is_not_left_alone() -> None:
    site = Site(hedge=1.0)
    for _ in range(3):
        for _ in range(4):
            site.one.standing.outrun(time.monotonic(), time.monotonic())
        assert await site.by(60.0) == "one"
    assert site.asked == (3, 0)


# ---- standing --------------------------------------------------------------------------------


def test_pauses_grow_with_each_failed_trial_and_end_with_a_success() -> None:
    standing = Standing()
    now, pauses = 100.0, []
    assert standing.may_try(now)
    standing.fail(now)
    for _ in range(7):
        began = now
        while not standing.may_try(now):
            now += 0.01
        pauses.append(round(now - began, 2))
        assert not standing.may_try(now)  # the trial is given out once
        standing.fail(now)
        standing.fail(now)  # one that had begun before
    assert pauses == pytest.approx([0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0], abs=0.02)
    standing.succeed()
    assert standing.may_try(now)
    assert standing.may_try(now)


def test_to_be_outrun_on_trial_is_a_failed_trial() -> None:
    standing = Standing()
    standing.fail(100.0)
    assert standing.may_try(101.0)
    standing.outrun(100.9, 101.0)
    standing.outrun(100.9, 101.0)  # one that had begun before
    assert not standing.may_try(101.4)
    assert standing.may_try(101.6)


def test_one_stall_counts_once_however_many_had_asked() -> None:
    standing = Standing()
    for _ in range(100):
        standing.outrun(99.9, 100.0)
    assert standing.is_good
    for now in (101.0, 102.0, 103.0):
        standing.outrun(now - 0.1, now)
        assert standing.is_good
    standing.outrun(103.9, 104.0)
    assert not standing.is_good


# ---- in a key store --------------------------------------------------------------------------


def store(
    tmp_path: Path,
    one: Scripted,
    two: Scripted,
    policy: str = "",
    usage: Usage = Usage.BOTH,
    hedge: float | None = None,
    encryptions: Encryptions | None = None,
) -> KeyStore:
    catalog = SqliteCatalog(tmp_path / "catalog.db")
    for kmi, used in ((one, Usage.BOTH), (two, usage)):
        catalog.put(CatalogEntry(kmi.name, "k", KeyState.ENABLED, used, 0.0))
    return store_of(catalog, one, two, policy, hedge, encryptions)


def store_of(
    catalog: SqliteCatalog,
    one: Scripted,
    two: Scripted,
    policy: str,
    hedge: float | None,
    encryptions: Encryptions | None = None,
) -> KeyStore:
    kmis: list[Any] = [one, two]
    return KeyStore(
        "demo", catalog, kmis, CachedSigningKeys([]), ReplayWindow(), deadline=1,
        authorizer=Authorizer("demo", Policies(split("p", policy))) if policy else None,
        failover=Failover(FailoverMetrics(Metrics(), "demo"), hedge), encryptions=encryptions,
    )  # fmt: skip


async def test_the_trail_names_the_kmi_that_served(tmp_path: Path) -> None:
    one, two = Scripted("one", "UNAVAILABLE"), Scripted("two")
    trail = Trail()
    deadline = time.monotonic() + 1
    demo = store(tmp_path, one, two)
    result = await demo.perform(OPERATION, deadline, trail)
    assert isinstance(result, Encrypted)
    assert (trail.kmi, result.ciphertext) == ("two", b"of two")
    assert isinstance(await demo.perform(Random(4), deadline, trail), RandomBytes)
    assert trail.kmi == "two"


@pytest.mark.parametrize(
    ("one", "two", "hedge", "by"),
    [
        (Scripted("one"), Scripted("two"), None, "one"),
        (Scripted("one", "UNAVAILABLE"), Scripted("two"), None, "two"),
        (Scripted("one", "ok", 30.0), Scripted("two"), 0.01, "two"),
        (Scripted("one", "ok", 0.1), Scripted("two", "ok", 30.0), 0.01, "one"),
    ],
    ids=["first", "failover", "hedge won", "hedge lost"],
)
async def test_an_encryption_is_counted_where_it_was_made(
    tmp_path: Path, one: Scripted, two: Scripted, hedge: float | None, by: str
) -> None:
    encryptions = Encryptions(tmp_path / "encryptions.db")
    demo = store(tmp_path, one, two, hedge=hedge, encryptions=encryptions)
    trail = Trail()
    await demo.perform(OPERATION, time.monotonic() + 60, trail)
    assert dict(encryptions.take()) == {(by, "k", 1): 1}
    assert trail.kmi == by
    encryptions.close()


async def test_each_kmi_is_asked_only_if_it_may_be(tmp_path: Path) -> None:
    policy = 'permit(principal, action, resource) when { resource in Kmi::"one" };'
    one, two = Scripted("one", "UNAVAILABLE"), Scripted("two")
    with pytest.raises(OperationError) as caught:
        await store(tmp_path, one, two, policy).perform(
            OPERATION, time.monotonic() + 1, Trail("192.0.2.1")
        )
    assert caught.value.fault is Fault.ACCESS_DENIED
    assert two.asked == 0


async def test_its_usage_counts_at_each(tmp_path: Path) -> None:
    one, two = Scripted("one", "UNAVAILABLE"), Scripted("two")
    demo = store(tmp_path, one, two, usage=Usage.DECRYPT)
    with pytest.raises(OperationError) as caught:
        await demo.perform(OPERATION, time.monotonic() + 1, Trail("192.0.2.1"))
    assert caught.value.fault is Fault.USAGE_FORBIDDEN
    assert two.asked == 0


def relabel(catalog: SqliteCatalog, label: str, state: KeyState = KeyState.ENABLED) -> None:
    for kmi in ("one", "two"):
        labels = (("environment", label),)
        catalog.put(CatalogEntry(kmi, "k", state, Usage.BOTH, 0.0, None, labels))


@pytest.mark.parametrize("hedge", [0.2, None])
async def test_what_changes_while_a_kmi_is_waited_for_holds_afterwards(
    tmp_path: Path, hedge: float | None
) -> None:
    """A request that was under way must not leave a verdict behind on what was before."""
    policy = """permit(principal, action, resource is Key) when {
        resource.hasTag("environment") && resource.getTag("environment") == "production" };"""
    one, two = Scripted("one", "UNAVAILABLE", 0.05), Scripted("two", "ok", 0.05)
    catalog = SqliteCatalog(tmp_path / "catalog.db")
    relabel(catalog, "production")
    demo = store_of(catalog, one, two, policy, hedge)

    async def ask() -> str:
        try:
            await demo.perform(OPERATION, time.monotonic() + 1, Trail("192.0.2.1"))
        except OperationError as error:
            return error.fault.name
        return "permitted"

    assert await ask() == "permitted"
    under_way = asyncio.create_task(ask())
    await asyncio.sleep(0.02)
    relabel(SqliteCatalog(tmp_path / "catalog.db"), "retired")
    catalog.refresh()
    await under_way
    one.state = KmiState.DISCONNECTED
    assert [await ask() for _ in range(3)] == ["ACCESS_DENIED"] * 3

    relabel(catalog, "production")
    assert await ask() == "permitted"
    one.state = KmiState.CONNECTED
    under_way = asyncio.create_task(ask())
    await asyncio.sleep(0.02)
    relabel(catalog, "production", KeyState.DISABLED)
    assert await under_way in {"KEY_DISABLED", "permitted"}
    assert await ask() == "KEY_DISABLED"
