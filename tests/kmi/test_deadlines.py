"""One timer for many deadlines: nobody is forgotten, none is early or much too late."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from xkiproxy.kmi.deadlines import Deadlines


@dataclass(frozen=True, eq=False)
class Item:
    deadline: float


class Watch:
    """Deadlines, and when each of them was said to be over."""

    def __init__(self) -> None:
        self.over: dict[Item, float] = {}
        self.deadlines = Deadlines[Item](asyncio.get_running_loop(), self.expire)

    def add(self, seconds: float) -> Item:
        item = Item(time.monotonic() + seconds)
        self.deadlines.add(item)
        return item

    def expire(self, items: list[Item]) -> None:
        for item in items:
            assert item not in self.over
            self.over[item] = time.monotonic() - item.deadline


async def test_each_ends_after_its_deadline_and_soon(monkeypatch) -> None:
    watch = Watch()
    items = [watch.add(seconds) for seconds in (0.12, 0.02, 0.2, 0.06, -1.0)]
    await asyncio.sleep(0.5)
    assert list(watch.over) == sorted(items, key=lambda item: item.deadline)
    assert all(late >= 0 for late in watch.over.values())
    # Slow machines may stall; that they all are late by the same would be a fault.
    assert min(late for item, late in watch.over.items() if item is not items[4]) < 0.03
    assert not watch.deadlines._waiting


async def test_what_is_done_in_time_is_never_ended_and_not_kept() -> None:
    watch = Watch()
    first, second = watch.add(0.02), watch.add(0.08)
    watch.deadlines.remove(first)
    await asyncio.sleep(0.05)
    assert watch.over == {}
    watch.deadlines.remove(second)
    await asyncio.sleep(0.1)
    assert watch.over == {}
    assert not watch.deadlines._waiting
    later = watch.add(0.02)  # after a time with nobody there
    await asyncio.sleep(0.2)
    assert list(watch.over) == [later]


async def test_one_that_ends_sooner_than_those_before_it() -> None:
    watch = Watch()
    late, soon = watch.add(30.0), watch.add(0.02)
    await asyncio.sleep(0.2)
    assert list(watch.over) == [soon]
    watch.deadlines.remove(late)
