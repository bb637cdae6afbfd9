"""What the server does on signals, from its first moment to its last.

SIGTERM or SIGINT ends it in order: what is being opened is closed again, or, once it serves,
requests that have begun are finished. SIGHUP lets it reload; one that comes earlier is remembered.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

_log = logging.getLogger(__name__)


class Signals:
    """The signals of this process; made by its main task, before anything else."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        """Set by SIGTERM, once the server serves."""
        self._hangup = asyncio.Event()
        self._starting = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self._hangup.set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

    def _end(self) -> None:
        starting, self._starting = self._starting, None
        if starting is not None:
            _log.info("stopping: what has been started is ended")
            starting.cancel()  # once: what it opened is being closed then
        self.stop.set()

    def serving(self) -> None:
        """It serves: from now on there may be requests to be finished."""
        self._starting = None

    @asynccontextmanager
    async def reloading(self, reload: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        """Reload at SIGHUP, and at one that has come already; those that come together are one."""
        task = asyncio.create_task(self._obey(reload))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _obey(self, reload: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            try:
                await reload()
            except Exception:
                # The next one must be obeyed all the same.
                _log.exception("the reload failed")


@contextmanager
def hangups_held() -> Iterator[None]:
    """A process that is started within has SIGHUP kept for its `Signals`: by itself it ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
