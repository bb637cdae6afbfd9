"""Starting and stopping: the parts in their order, in one process or in several.

With `workers = 1` one process does all. With more, each worker serves the public address with parts
of its own (`worker.py`), and a supervisor starts them and has the admin listener (`supervisor.py`).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime

import uvloop

from xkiproxy import __version__
from xkiproxy.config import Config, ConfigError
from xkiproxy.observability.audit import AuditError, Sink, encode
from xkiproxy.server.admin import OneProcess, admin_listener
from xkiproxy.server.contents import Contents, read_anew
from xkiproxy.server.gateway import Gateway
from xkiproxy.server.listener import Listener
from xkiproxy.server.notify import notify_ready, notify_reload, notify_stopping
from xkiproxy.server.reload import Change, refusing, texts
from xkiproxy.server.runtime import Runtime, Tables
from xkiproxy.server.signals import Signals
from xkiproxy.server.sinks import open_audit
from xkiproxy.server.supervisor import supervise

_log = logging.getLogger(__name__)

_CLOSE_SECONDS = 10
"""What lanes, logs and traces take to close, at most."""

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
    with suppress(asyncio.CancelledError):  # stopped before it served
        uvloop.run(_serve(config))


async def _serve(config: Config) -> None:
    signals = Signals()
    if config.server.workers > 1:
        await supervise(config.path, signals)
    else:
        await _serve_alone(config, signals)


async def _serve_alone(config: Config, signals: Signals) -> None:
    async with (
        running_parts(config) as (runtime, audit),
        admin_listener(config.server.admin_listen, OneProcess(runtime)),
        public_side(runtime, audit) as public,
        signals.reloading(public.reload),
    ):
        signals.serving()
        scheme = "https" if config.server.tls else "http"
        _log.info("xkiproxy %s serves %s://%s:%d", __version__, scheme, *public.listener.address)
        notify_ready()
        await signals.stop.wait()
        runtime.stopping = True
        settings = config.server
        grace = settings.shutdown_timeout_seconds + _CLOSE_SECONDS
        await notify_stopping(signals.stop, settings.shutdown_delay_seconds, grace)


class PublicSide:
    """The public listener and what it serves, exchanged as one."""

    def __init__(self, runtime: Runtime, audit: Sink, gateway: Gateway, listener: Listener) -> None:
        self.listener = listener
        self._runtime = runtime
        self._audit = audit
        self._gateway = gateway

    async def reload(self) -> None:
        """Take over the configuration as it is now, whole or not at all; tells what came of it."""
        with notify_reload():
            await self._reload()

    async def _reload(self) -> None:
        succeeded = False
        try:
            path = self._runtime.config.path
            await self.apply(await self.prepare(lambda: read_anew(path)))
            succeeded = True
        except ConfigError as error:
            self.note(texts(error), [])
        self._runtime.metrics.count_reload(succeeded=succeeded)

    async def prepare(self, read: Callable[[], tuple[Config, Contents]]) -> Change:
        """Open and check what has changed; raises ConfigError."""
        with refusing("", self._runtime.config.path):
            # In a thread: certificates and credentials are read from disks that may be slow.
            change = await asyncio.to_thread(lambda: self._runtime.prepare(*read()))
            await self._runtime.fetch_token_keys(change)
            return change

    async def apply(self, change: Change) -> None:
        """Exchange; raises ConfigError, and then nothing is exchanged."""
        with refusing("server.listen", change.config.path):
            # What can fail comes first, as for want of descriptors; the rest is assignments.
            await self.listener.use(change.context)
        self._runtime.apply(change)
        self._gateway.serve(change.tenants)
        self.note([], change.described)

    def note(self, problems: Sequence[str], changes: Sequence[str]) -> None:
        """What came of a reload goes to the log, to the audit log and to /status."""
        self._runtime.history.add(problems, changes)
        outcome = "failed" if problems else "ok"
        event = {"time": datetime.now(UTC), "event": f"reload_{outcome}"}
        details = {"problems": problems} if problems else {"changes": changes}
        with suppress(AuditError):  # housekeeping meets the same error and stops serving
            self._audit.append([encode({**event, **details})])


@asynccontextmanager
async def running_parts(
    config: Config,
    tables: Tables | None = None,
    contents: Contents | None = None,
) -> AsyncIterator[tuple[Runtime, Sink]]:
    """The parts that serve requests, started; raises ConfigError or AuditError. See `Runtime`."""
    runtime = Runtime(config, tables, contents)
    if runtime.untimely:
        # Who checks dates refuses it anyway, and who pins the certificate need not: no outage more.
        _log.error("%s; it is served all the same", runtime.untimely)
    try:
        audit = await open_audit(config.audit, runtime.audit_options)
        try:
            runtime.check_audit(audit)
            await runtime.start()
            yield runtime, audit
        finally:
            audit.close()
    finally:
        await runtime.close()


@asynccontextmanager
async def public_side(
    runtime: Runtime, audit: Sink, *, shares_port: bool = False, purges: bool = True
) -> AsyncIterator[PublicSide]:
    """Serve requests, with the housekeeping that they need; drained in the end. Raises OSError."""
    settings = runtime.config.server
    _raise_file_limit(settings.max_connections)
    gateway = Gateway(
        runtime.tenants, audit, runtime.condition, runtime.metrics, runtime.strangers,
        runtime.tracer,
    )  # fmt: skip
    listener = Listener(gateway, settings, runtime.context, shares_port=shares_port)
    await listener.open()
    housekeeping = asyncio.create_task(runtime.keep_fresh(audit, purges=purges))
    _calm_garbage_collection()
    try:
        yield PublicSide(runtime, audit, gateway, listener)
    finally:
        await listener.drain()
        housekeeping.cancel()
        with suppress(asyncio.CancelledError):
            await housekeeping
        runtime.write_strangers(audit)


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
