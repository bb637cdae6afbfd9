"""A worker process: it serves the public address beside its siblings, and reports when asked.

    python -m xkiproxy.server.worker CONFIG INDEX ADDRESS CHANNEL REPLAY_TABLE

CHANNEL and REPLAY_TABLE are descriptors that the supervisor passes on. Over the channel go lines:
`?` asks for a report, which is a JSON object; the first report is sent without being asked, when
the worker serves. When the channel ends, or on SIGTERM, requests that have begun are finished.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import orjson
import uvloop
from setproctitle import setproctitle

from xkiproxy.config import Config, ConfigError, load_config
from xkiproxy.observability.audit import AuditError
from xkiproxy.observability.logging import configure_logging
from xkiproxy.observability.series import to_json
from xkiproxy.server.runtime import Runtime

_log = logging.getLogger(__name__)

FAILED = 3
"""The exit status of a worker that could not start and has said why."""


def main() -> None:
    """Run a worker."""
    file, index, address, channel, table = sys.argv[1:]
    config = load_config(Path(file))
    configure_logging(config.log.level, config.log.format)
    setproctitle(f"xkiproxy: worker {int(index) + 1}")
    own = config.share(int(index))
    own = own.model_copy(update={"server": own.server.model_copy(update={"listen": address})})
    try:
        uvloop.run(_serve(own, int(index), int(channel), int(table)))
    except (AuditError, ConfigError, OSError) as error:
        _log.error("worker %d cannot start: %s", int(index) + 1, error)
        sys.exit(FAILED)


async def _serve(config: Config, index: int, channel: int, table: int) -> None:
    from xkiproxy.server.serve import public_listener, running_parts  # noqa: PLC0415 - a cycle

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=channel))
    async with (
        running_parts(config, table) as (runtime, audit),
        public_listener(runtime, audit, shares_port=True, purges=index == 0),
    ):
        answering = asyncio.create_task(_answer(runtime, reader, writer, stop))
        await stop.wait()
        answering.cancel()


async def _answer(
    runtime: Runtime,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    stop: asyncio.Event,
) -> None:
    """Report at once and then whenever asked; the end of the channel is the end of the worker."""
    try:
        while True:
            writer.write(orjson.dumps(_report(runtime)) + b"\n")
            await writer.drain()
            if not await reader.readline():
                return
    except ConnectionError:
        return
    finally:
        stop.set()


def _report(runtime: Runtime) -> dict[str, Any]:
    return {
        "problems": runtime.problems(),
        "status": runtime.status(),
        "metrics": to_json(runtime.metrics.collection.snapshot()),
    }


if __name__ == "__main__":
    main()
