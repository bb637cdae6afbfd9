"""The audit log as it is configured: its file, and the sinks beside it."""

from __future__ import annotations

import ssl
from functools import partial

from xkiproxy.config.models import (
    AuditSettings,
    ClientTlsSettings,
    StdoutSettings,
    SyslogSettings,
    split_address,
)
from xkiproxy.config.secrets import SecretError
from xkiproxy.config.tls import TlsError, client_context
from xkiproxy.observability.audit import AuditError, AuditLog, AuditOptions, Sink
from xkiproxy.observability.fanout import Fanout
from xkiproxy.observability.outlet import Outlet
from xkiproxy.observability.stdout import connect_stdout, line_frame
from xkiproxy.observability.syslog import SyslogServer, syslog_frame


async def open_audit(settings: AuditSettings, options: AuditOptions) -> Sink:
    """Open the log and connect its sinks; one that does not answer is tried again later.

    Raises:
        AuditError: the file cannot be opened.
    """
    if not settings.sink:
        return AuditLog(settings.path, options)
    # The name of a worker's file tells its chain from those of the others.
    outlets = [_outlet(sink, settings.path.stem) for sink in settings.sink]
    fanout = Fanout(settings.path, options, outlets, needs_all=settings.required == "all")
    await fanout.start()
    return fanout


async def unreachable(settings: AuditSettings) -> list[tuple[int, str]]:
    """The syslog servers that cannot be reached now: the index of each, and why."""
    found = []
    for i, sink in enumerate(settings.sink):
        if isinstance(sink, SyslogSettings):
            try:
                (await _server(sink).connect()).close()
            except (OSError, AuditError) as error:
                found.append((i, str(error)))
    return found


def _outlet(settings: SyslogSettings | StdoutSettings, chain_name: str) -> Outlet:
    made = partial(
        Outlet,
        settings.name,
        limit=settings.buffer_bytes,
        stall_seconds=settings.stall_timeout_seconds,
    )
    if isinstance(settings, StdoutSettings):
        return made(connect_stdout, line_frame)
    frame = syslog_frame(settings.facility, settings.app_name, chain_name)
    return made(_server(settings).connect, frame)


def _server(settings: SyslogSettings) -> SyslogServer:
    """Where a syslog sink connects to, and how."""
    tls = settings.tls
    host, port = split_address(settings.address)
    return SyslogServer(
        host,
        port,
        connect_seconds=settings.connect_timeout_seconds,
        ack_seconds=settings.stall_timeout_seconds,
        make_context=None if tls is None else partial(_context, tls),
        server_name="" if tls is None else tls.server_name,
    )


def _context(tls: ClientTlsSettings) -> ssl.SSLContext:
    try:
        return client_context(tls)
    except (SecretError, TlsError) as error:
        raise AuditError(str(error)) from None
