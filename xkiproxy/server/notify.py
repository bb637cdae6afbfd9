"""What the service manager is told: that the server serves, reloads, stops.

The protocol is that of sd_notify(3): lines in one datagram to the socket that $NOTIFY_SOCKET names.
Without the variable nothing is told.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_log = logging.getLogger(__name__)


def notify_ready() -> None:
    """It serves."""
    _send("READY=1")


async def notify_stopping(stop: asyncio.Event, seconds: float, grace: float) -> None:
    """It ends: after so many seconds more, or as soon as `stop` is set again.

    `grace` is what finishing takes at most, after that.
    """
    limit = int((seconds + grace) * 1e6)
    _send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={limit}")
    if seconds:
        _log.info("stopping in %g seconds: not ready any more, still serving", seconds)
        stop.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await stop.wait()
    _log.info("stopping: requests that have begun are finished")


@contextmanager
def notify_reload() -> Iterator[None]:
    """It takes over a configuration for as long as the block lasts."""
    # The time is what Type=notify-reload tells this reload from an earlier one by.
    _send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        yield
    finally:
        notify_ready()


def _send(message: str) -> None:
    name = os.environ.get("NOTIFY_SOCKET", "")
    if not name:
        return
    address = "\0" + name[1:] if name.startswith("@") else name
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(message.encode(), address)
    except OSError as error:
        _log.warning("$NOTIFY_SOCKET %s: %s", name, error.strerror or error)
