"""Starting and stopping: the parts in their order, in one process or in several.

With `workers = 1` one process does all. With more, each worker serves the public address with parts
of its own (`worker.py`), and a supervisor starts them and has the admin listener (`supervisor.py`).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import uvloop

from xkiproxy import __version__
from xkiproxy.config import Config
from xkiproxy.observability.audit import AuditLog
from xkiproxy.server.admin import OneProcess, admin_listener
from xkiproxy.server.gateway import Gateway
from xkiproxy.server.listener import Listener
from xkiproxy.server.runtime import Runtime
from xkiproxy.server.supervisor import supervise

_log = logging.getLogger(__name__)

_OTHER_FILES = 256
"""Files that are no connections: the catalog, logs, lanes."""


def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: a part of the configuration cannot be used.
        AuditError: the audit log cannot be opened.
        OSError: a listener cannot be opened.
        WorkerError: a worker process could not be started; it has said why.
    """
    uvloop.run(_serve(config))


async def _serve(config: Config) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if config.server.workers > 1:
        await supervise(config, stop)
    else:
        await _serve_alone(config, stop)


async def _serve_alone(config: Config, stop: asyncio.Event) -> None:
    async with (
        running_parts(config) as (runtime, audit),
        admin_listener(config.server.admin_listen, OneProcess(runtime)),
        public_listener(runtime, audit) as listener,
    ):
        scheme = "https" if config.server.tls else "http"
        _log.info("xkiproxy %s serves %s://%s:%d", __version__, scheme, *listener.address)
        await stop.wait()
        _log.info("stopping: requests that have begun are finished")


@asynccontextmanager
async def running_parts(
    config: Config, replay_table: int | None = None
) -> AsyncIterator[tuple[Runtime, AuditLog]]:
    """The parts that serve requests, started; raises ConfigError or AuditError."""
    runtime = Runtime(config, replay_table)
    try:
        audit = AuditLog(config.audit.path, runtime.audit_options)
        try:
            await runtime.start()
            yield runtime, audit
        finally:
            audit.close()
    finally:
        await runtime.close()


@asynccontextmanager
async def public_listener(
    runtime: Runtime, audit: AuditLog, *, shares_port: bool = False, purges: bool = True
) -> AsyncIterator[Listener]:
    """Serve requests, with the housekeeping that they need; drained in the end. Raises OSError."""
    settings = runtime.config.server
    _raise_file_limit(settings.max_connections)
    gateway = Gateway(runtime.tenants, audit, runtime.condition, runtime.metrics)
    listener = Listener(gateway, settings, runtime.context, shares_port=shares_port)
    await listener.open()
    housekeeping = asyncio.create_task(runtime.keep_fresh(audit, purges=purges))
    _calm_garbage_collection()
    try:
        yield listener
    finally:
        await listener.drain()
        housekeeping.cancel()
        with suppress(asyncio.CancelledError):
            await housekeeping


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
