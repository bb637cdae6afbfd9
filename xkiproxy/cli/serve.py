"""`xkiproxy serve`."""

from __future__ import annotations

import signal

from xkiproxy.cli.common import DEFAULT_CONFIG, CommandError, ConfigOption
from xkiproxy.config import load_config
from xkiproxy.observability.audit import AuditError
from xkiproxy.observability.logging import configure_logging


def serve(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Serve requests until SIGTERM, which lets those that have begun finish.

    Example: xkiproxy serve --config /etc/xkiproxy/xkiproxy.toml
    """
    # By itself it ends a process: it is kept until the server can reload (`server/signals.py`).
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    settings = load_config(config)
    configure_logging(settings.log.level, settings.log.format)
    # Only this command pays for it.
    from xkiproxy.server.serve import run  # noqa: PLC0415
    from xkiproxy.server.supervisor import WorkerError  # noqa: PLC0415

    try:
        run(settings)
    except (AuditError, OSError, WorkerError) as error:
        raise CommandError(str(error)) from None
