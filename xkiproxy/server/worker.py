"""A worker process: it serves the public address beside its siblings, and reports when asked.

    python -m xkiproxy.server.worker CONFIG INDEX ADDRESS CHANNEL REPLAY_TABLE QUOTA_TABLE

CHANNEL and the tables are descriptors that the supervisor passes on. Over the channel go lines,
each answered by one: `report` by a report, which is a JSON object (the first is sent without being
asked, when the worker serves); `prepare` by a list of problems with the changed configuration;
`apply` by a list too, when what was prepared has been taken over. When the channel ends, or on
SIGTERM, requests that have begun are finished.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
import uvloop
from setproctitle import setproctitle

from xkiproxy.config import Config, ConfigError, load_config
from xkiproxy.hardening import forbid_core_dumps
from xkiproxy.observability.audit import AuditError
from xkiproxy.observability.logging import configure_logging
from xkiproxy.observability.series import to_json
from xkiproxy.server.reload import Change, texts
from xkiproxy.server.runtime import Runtime, Tables
from xkiproxy.server.serve import PublicSide, public_side, running_parts

_log = logging.getLogger(__name__)

FAILED = 3
"""The exit status of a worker that could not start and has said why."""


def main() -> None:
    """Run a worker."""
    forbid_core_dumps()
    file, index, address, channel, *tables = sys.argv[1:]
    config = load_config(Path(file))
    configure_logging(config.log.level, config.log.format)
    setproctitle(f"xkiproxy: worker {int(index) + 1}")

    def load() -> Config:
        own = load_config(Path(file)).share(int(index))
        server = own.server.model_copy(update={"listen": address})
        return own.model_copy(update={"server": server})

    try:
        uvloop.run(_serve(load, int(index), int(channel), Tables(*map(int, tables))))
    except (AuditError, ConfigError, OSError) as error:
        _log.error("worker %d cannot start: %s", int(index) + 1, error)
        sys.exit(FAILED)


async def _serve(load: Callable[[], Config], index: int, channel: int, tables: Tables) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # the supervisor says when to reload
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=channel))
    async with (
        running_parts(load(), tables, load) as (runtime, audit),
        public_side(runtime, audit, shares_port=True, purges=index == 0) as public,
    ):
        obeying = asyncio.create_task(_Obedience(runtime, public).run(reader, writer, stop))
        await stop.wait()
        obeying.cancel()


class _Obedience:
    """Does what the supervisor says."""

    def __init__(self, runtime: Runtime, public: PublicSide) -> None:
        self._runtime = runtime
        self._public = public
        self._change: Change | None = None
        self._commands: dict[bytes, Callable[[], Awaitable[Any]]] = {
            b"report": self._report,
            b"prepare": self._prepare,
            b"apply": self._apply,
        }

    async def run(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stop: asyncio.Event
    ) -> None:
        """Report, and then answer line by line; the end of the channel is the end of the worker."""
        try:
            line = b"report"
            while line:
                answer = await self._commands[line.strip()]()
                writer.write(orjson.dumps(answer) + b"\n")
                await writer.drain()
                line = await reader.readline()
        except ConnectionError:
            return
        finally:
            stop.set()

    async def _report(self) -> dict[str, Any]:
        return _report(self._runtime)

    async def _prepare(self) -> list[str]:
        self._change = None
        try:
            self._change = await self._public.prepare()
        except ConfigError as error:
            problems = texts(error)
            self._public.note(problems, [])
            return problems
        return []

    async def _apply(self) -> list[str]:
        change, self._change = self._change, None
        if change is None:
            return ["nothing was prepared"]
        try:
            await self._public.apply(change)
        except ConfigError as error:
            return texts(error)
        return []


def _report(runtime: Runtime) -> dict[str, Any]:
    return {
        "problems": runtime.problems(),
        "obstacles": runtime.obstacles(),
        "status": runtime.status(),
        "metrics": to_json(runtime.metrics.collection.snapshot()),
    }


if __name__ == "__main__":
    main()
