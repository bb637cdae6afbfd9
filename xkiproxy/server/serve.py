"""Start, serve and stop: the life of the server process."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
from contextlib import AsyncExitStack, suppress

import uvloop
from aiohttp import web

from xkiproxy import __version__
from xkiproxy.config import Config
from xkiproxy.observability.audit import AuditLog
from xkiproxy.server.admin import admin_app
from xkiproxy.server.gateway import Gateway
from xkiproxy.server.listener import Listener, bind
from xkiproxy.server.runtime import Runtime

_log = logging.getLogger(__name__)

_OTHER_FILES = 256
"""Files that are no connections: the catalog, logs, lanes."""


def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: a part of the configuration cannot be used.
        AuditError: the audit log cannot be opened.
        OSError: a listener cannot be opened.
    """
    uvloop.run(_serve(config))


async def _serve(config: Config) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    _raise_file_limit(config.server.max_connections)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        runtime = Runtime(config)
        stack.push_async_callback(runtime.close)
        audit = AuditLog(config.audit.path)
        stack.callback(audit.close)
        await runtime.start()
        listener = await _open_listeners(config, runtime, audit, stack)
        housekeeping = asyncio.create_task(runtime.keep_fresh(audit))
        stack.push_async_callback(_cancel, housekeeping)
        stack.push_async_callback(listener.drain)
        scheme = "https" if config.server.tls else "http"
        _log.info("xkiproxy %s serves %s://%s:%d", __version__, scheme, *listener.address)
        _calm_garbage_collection()
        await stop.wait()
        _log.info("stopping: requests that have begun are finished")


def _raise_file_limit(wanted: int) -> None:
    """A connection is a file: allow as many as may be, up to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_FILES
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if limit < needed:
        _log.warning("only %d files may be open: raise the limit for max_connections", limit)
    if limit > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _calm_garbage_collection() -> None:
    """Let the collector leave alone what lives as long as the server, and look less often.

    A round of requests makes thousands of objects that die by their reference counts. By default
    the collector would look through them several times a round, and through all modules now and
    then, which is a stall of tens of milliseconds.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


async def _open_listeners(
    config: Config, runtime: Runtime, audit: AuditLog, stack: AsyncExitStack
) -> Listener:
    gateway = Gateway(
        runtime.tenants,
        audit,
        runtime.condition,
        runtime.metrics,
    )
    admin = web.AppRunner(admin_app(runtime), access_log=None)
    await admin.setup()
    stack.push_async_callback(admin.cleanup)
    await web.SockSite(admin, bind(config.server.admin_listen)).start()
    listener = Listener(gateway, config.server, runtime.context)
    await listener.open()
    return listener


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
