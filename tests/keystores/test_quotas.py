"""Quotas: bursts, refilling, what counts for what, and the table that processes share."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from xkiproxy.crypto.operations import Fault, OperationError
from xkiproxy.keystores import quotas
from xkiproxy.keystores.quotas import Quota, Quotas, QuotaTable, make_quota_table


class Clock:
    """A clock that stands still unless it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(quotas, "monotonic", made)
    return made


def admitted(of: Quotas, count: int, key: str = "k", principal: str = "p") -> int:
    """How many of so many requests pass."""
    passed = 0
    for _ in range(count):
        try:
            of.take(key, principal)
            passed += 1
        except OperationError as error:
            assert error.fault is Fault.THROTTLED
            assert error.details["quota"] in {"all", "key", "principal"}
            assert int(error.details["retry_after"]) >= 1
    return passed


@pytest.mark.parametrize(("rate", "burst"), [(10, 1), (10, 20), (0.1, 3), (1800, 3600), (3, 7)])
def test_a_burst_and_then_the_rate(clock: Clock, rate: float, burst: int) -> None:
    of = Quotas("demo", {"all": Quota(rate, burst)}, QuotaTable())
    assert admitted(of, burst + 5) == burst
    clock.now += 1 / rate
    assert admitted(of, 5) == 1
    clock.now += 2.5 / rate
    assert admitted(of, 5) == min(2, burst)
    clock.now += 1e6
    assert admitted(of, burst + 5) == burst


def test_over_a_long_time_the_rate_holds(clock: Clock) -> None:
    of = Quotas("demo", {"all": Quota(100, 10)}, QuotaTable())
    passed = 0
    for _ in range(10_000):
        clock.now += 0.001
        passed += admitted(of, 1)
    assert passed == pytest.approx(10 * 100 + 10, abs=2)


def test_keys_principals_and_key_stores_have_each_their_own(clock: Clock) -> None:
    table = QuotaTable()
    one = {"key": Quota(1, 2), "principal": Quota(1, 3)}
    of, other = Quotas("demo", one, table), Quotas("other", one, table)
    assert admitted(of, 5, "a", "p") == 2
    assert admitted(of, 5, "b", "p") == 1  # what the first key refused has cost its caller nothing
    assert admitted(of, 5, "b", "q") == 1
    assert admitted(of, 5, "a", "q") == 0
    assert admitted(other, 5, "a", "p") == 2
    assert admitted(of, 5, "", "r") == 3  # random: no key


def test_when_to_come_again(clock: Clock) -> None:
    of = Quotas("demo", {"principal": Quota(0.1, 1)}, QuotaTable())
    of.take("k", "p")
    for passing, seconds in ((0, 10), (9.5, 1)):
        clock.now += passing
        with pytest.raises(OperationError, match="principal") as caught:
            of.take("k", "p")
        assert caught.value.details["retry_after"] == seconds
    clock.now += 0.5
    of.take("k", "p")


def test_a_table_that_is_full_still_serves(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "_PLACES", 16)
    of = Quotas("demo", {"principal": Quota(1, 1)}, QuotaTable())
    assert sum(admitted(of, 1, "k", str(number)) for number in range(1000)) == 1000
    assert len(of._buckets) == 1000
    clock.now += 10  # buckets that are full again need no place
    assert admitted(of, 3, "k", "new") == 1
    assert admitted(of, 3, "k", "0") == 1  # its place has long been another's


def test_a_bucket_whose_place_went_to_another_gets_a_place_of_its_own(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "_PLACES", 2)
    table = QuotaTable()
    of = Quotas("demo", {"principal": Quota(1, 1)}, table)

    def first_place(name: str) -> int:
        return table.mark("demo", "principal", name) % 2

    others = (name for name in map(str, range(100)) if first_place(name) == first_place("p"))
    assert admitted(of, 2, "k", "p") == 1
    clock.now += 2  # it is full again, and needs no place
    other = next(others)
    assert admitted(of, 2, "k", other) == 1
    assert admitted(of, 1, "k", "p") == 1
    assert admitted(of, 1, "k", "p") == 0
    assert admitted(of, 1, "k", other) == 0


def test_buckets_that_would_have_the_same_place_count_each_for_itself(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "_PLACES", 64)
    table = QuotaTable()
    of = Quotas("demo", {"principal": Quota(1, 1)}, table)
    by_place: dict[int, list[str]] = {}
    for number in range(64 * 8):
        place = table.mark("demo", "principal", str(number)) % 64
        by_place.setdefault(place, []).append(str(number))
    names = max(by_place.values(), key=len)[:8]
    assert len(names) == 8
    assert [admitted(of, 1, "k", name) for name in names] == [1] * 8
    assert [admitted(of, 1, "k", name) for name in names] == [0] * 8


def test_what_is_remembered_does_not_grow(clock: Clock) -> None:
    of = Quotas("demo", {"principal": Quota(1, 1)}, QuotaTable())
    for number in range(10_000):
        admitted(of, 1, "k", str(number))
    assert len(of._buckets) <= 4096


def test_a_name_of_any_length_is_counted_and_a_long_one_not_kept(clock: Clock) -> None:
    of = Quotas("demo", {"principal": Quota(1, 1)}, QuotaTable())
    assert admitted(of, 3, "k", "p" * 60_000) == 1
    assert not of._buckets


@pytest.mark.parametrize("quota", [Quota(1000, 1000), Quota(1, 10)], ids=str)
def test_a_quota_that_is_changed_holds_at_once(clock: Clock, quota: Quota) -> None:
    table = QuotaTable()
    assert admitted(Quotas("demo", {"all": Quota(1, 600)}, table), 601) == 600
    changed = Quotas("demo", {"all": quota}, table)
    assert admitted(changed, 1) == 0  # what has been taken counts
    clock.now += 1
    assert admitted(changed, 1001) == quota.rate


_OTHER_PROCESS = """
import sys
from xkiproxy.keystores.quotas import Quota, Quotas, QuotaTable
of = Quotas("demo", {"all": Quota(0.001, 10)}, QuotaTable(int(sys.argv[1])))
passed = 0
for _ in range(6):
    try:
        of.take("k", "p")
        passed += 1
    except Exception:
        pass
print(passed)
"""


def test_processes_share_a_table() -> None:
    descriptor = make_quota_table()
    try:
        command = [sys.executable, "-c", _OTHER_PROCESS, str(descriptor)]
        outputs = [
            subprocess.run(
                command, pass_fds=[descriptor], capture_output=True, check=True, timeout=60
            ).stdout
            for _ in range(3)
        ]
    finally:
        os.close(descriptor)
    assert [int(output) for output in outputs] == [6, 4, 0]
