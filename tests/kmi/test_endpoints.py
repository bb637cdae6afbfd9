"""Where lanes are started: all endpoints get some, and none is left out for good."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from xkiproxy.config.models import KmipSettings
from xkiproxy.kmi.base import BreakReason, LaneError
from xkiproxy.kmi.endpoints import Endpoints


def started(endpoints: Endpoints, lane: int) -> int:
    with endpoints.starting(lane) as chosen:
        return chosen


def failed(endpoints: Endpoints, lane: int) -> int:
    with suppress(LaneError), endpoints.starting(lane) as chosen:
        raise LaneError("planted", BreakReason.START)
    return chosen


def test_lanes_begin_at_one_endpoint_each_and_go_on_to_the_next() -> None:
    endpoints = Endpoints(3)
    assert [started(endpoints, lane) for lane in range(4)] == [0, 1, 2, 0]
    assert [started(endpoints, 0) for _ in range(4)] == [1, 2, 0, 1]


def test_one_that_failed_is_passed_over_while_there_are_others() -> None:
    endpoints = Endpoints(2)
    assert failed(endpoints, 0) == 0
    assert [started(endpoints, lane) for lane in (0, 1, 2, 0, 0)] == [1] * 5
    assert failed(endpoints, 1) == 1
    assert [failed(endpoints, 0) for _ in range(4)] == [0, 1, 0, 1]
    assert started(endpoints, 0) == 0
    assert [started(endpoints, lane) for lane in range(3)] == [0] * 3


def test_while_all_are_away_one_that_hangs_has_one_lane() -> None:
    endpoints = Endpoints(2)
    assert [failed(endpoints, lane) for lane in range(2)] == [0, 1]
    with suppress(LaneError), endpoints.starting(2) as chosen:
        assert chosen == 0  # hangs
        assert [failed(endpoints, lane) for lane in (0, 1, 1, 0)] == [1] * 4
        raise LaneError("planted", BreakReason.START)
    assert [failed(endpoints, 0) for _ in range(2)] == [0, 1]


def test_a_lane_is_away_until_it_was_started_at_its_home() -> None:
    endpoints = Endpoints(2)
    assert not endpoints.is_away(0)
    assert failed(endpoints, 0) == 0
    assert started(endpoints, 0) == 1
    assert endpoints.is_away(0)
    with suppress(LaneError), endpoints.starting(0, home=True) as chosen:
        assert chosen == 0
        raise LaneError("planted", BreakReason.START)
    assert endpoints.is_away(0)
    with endpoints.starting(0, home=True) as chosen:
        assert chosen == 0
    assert not endpoints.is_away(0)
    # And it is an endpoint as the others again, for lanes whose home it is not, too.
    assert started(endpoints, 1) == 1
    assert started(endpoints, 1) == 0


def test_a_start_that_is_broken_off_says_nothing_of_its_endpoint() -> None:
    endpoints = Endpoints(2)
    with suppress(asyncio.CancelledError), endpoints.starting(0):
        raise asyncio.CancelledError
    assert [started(endpoints, lane) for lane in (2, 4)] == [0, 0]


@pytest.mark.parametrize(
    ("lanes", "workers", "expected"),
    [
        (4, 4, ["a", "b", "c", "a"]),
        (6, 3, ["ab", "ca", "bc"]),
        (5, 2, ["abc", "ab"]),
        (2, 1, ["ab"]),
    ],
)
def test_the_lanes_of_all_workers_are_spread_over_all_addresses(
    lanes: int, workers: int, expected: list[str]
) -> None:
    settings = KmipSettings.model_construct(lanes=lanes, address=("a", "b", "c"))
    shares = [settings.share(index, workers) for index in range(workers)]
    assert [
        "".join(share.address[i % 3] for i in range(share.lanes)) for share in shares
    ] == expected
    assert all(set(share.address) == set("abc") for share in shares)
