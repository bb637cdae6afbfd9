"""A timer that keeps time: an event loop's own timers are a millisecond coarse, which would show.

Linux's timerfd, through ctypes (Python has it from 3.13 on).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_NONBLOCK_CLOEXEC = 0o4000 | 0o2000000
_BILLION = 1_000_000_000


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Setting(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("first", _TimeSpec))


class Ticker:
    """Calls back every `interval_ns`; ticks that come while the loop is busy become one."""

    def __init__(self, interval_ns: int, callback: Callable[[], None]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._callback = callback
        self._fd = libc.timerfd_create(_CLOCK_MONOTONIC, _NONBLOCK_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        spec = _TimeSpec(*divmod(interval_ns, _BILLION))
        setting = _Setting(spec, spec)
        if libc.timerfd_settime(self._fd, 0, ctypes.byref(setting), None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")
        asyncio.get_running_loop().add_reader(self._fd, self._tick)

    def _tick(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        self._callback()

    def close(self) -> None:
        """No tick comes after this."""
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
