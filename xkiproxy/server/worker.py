"""A worker process: it serves the public address beside its siblings, and reports when asked.

    python -m xkiproxy.server.worker INDEX ADDRESS CHANNEL REPLAY_TABLE QUOTA_TABLE

CHANNEL and the tables are descriptors that the supervisor passes on. Over the channel go lines,
each answered by one in JSON. The first has what the worker goes by instead of the files of the
configuration (`contents.Handout`), and is answered when all parts are open; then come

    serve               a report, when the worker serves
    report              a report
    prepare HANDOUT     the problems with a changed configuration, and what it changes
    apply               why what was prepared could not be taken over: then nothing of it was
    refuse PROBLEMS     nothing; what was prepared is dropped, and log and audit log say why

When the channel ends, or on SIGTERM, requests that have begun are finished.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import orjson
import uvloop
from setproctitle import setproctitle

from xkiproxy.config import Config, ConfigError
from xkiproxy.config.secrets import take_secrets
from xkiproxy.hardening import forbid_core_dumps
from xkiproxy.observability.audit import AuditError
from xkiproxy.observability.logging import configure_logging
from xkiproxy.observability.series import to_json
from xkiproxy.server.contents import Contents, Handout
from xkiproxy.server.reload import Change, texts
from xkiproxy.server.runtime import Runtime, Tables
from xkiproxy.server.serve import PublicSide, public_side, running_parts
from xkiproxy.server.signals import Signals

_log = logging.getLogger(__name__)

FAILED = 3
"""The exit status of a worker that could not start and has said why."""

_LINE_LIMIT = 1 << 30
"""What the supervisor has read is not too long."""

Read = Callable[[Handout], tuple[Config, Contents]]
"""What of a handout is this worker's."""


def main() -> None:
    """Run a worker."""
    forbid_core_dumps()
    index, address, channel, *tables = sys.argv[1:]
    setproctitle(f"xkiproxy: worker {int(index) + 1}")

    def read(handout: Handout) -> tuple[Config, Contents]:
        own = handout.config().share(int(index))
        server = own.server.model_copy(update={"listen": address})
        return own.model_copy(update={"server": server}), handout.contents

    try:
        with suppress(asyncio.CancelledError):  # stopped before it served
            uvloop.run(_serve(read, int(index), int(channel), Tables(*map(int, tables))))
    except (AuditError, ConfigError, OSError) as error:
        _log.error("worker %d cannot start: %s", int(index) + 1, error)
        sys.exit(FAILED)


async def _serve(read: Read, index: int, channel: int, tables: Tables) -> None:
    signals = Signals()  # SIGHUP changes nothing: the supervisor says when to reload
    reader, writer = await asyncio.open_connection(
        sock=socket.socket(fileno=channel), limit=_LINE_LIMIT
    )
    line = await reader.readline()
    if not line:
        return
    handout = Handout.model_validate_json(line)
    take_secrets(handout.secrets)
    config, contents = read(handout)
    configure_logging(config.log.level, config.log.format)
    async with running_parts(config, tables, contents) as (runtime, audit):
        writer.write(b"true\n")
        if await reader.readline() != b"serve\n":
            return  # another configuration was accepted meanwhile
        async with public_side(runtime, audit, shares_port=True, purges=index == 0) as public:
            signals.serving()
            obedience = _Obedience(runtime, public, read)
            obeying = asyncio.create_task(obedience.run(reader, writer, signals.stop))
            await signals.stop.wait()
            obeying.cancel()


class _Obedience:
    """Does what the supervisor says."""

    def __init__(self, runtime: Runtime, public: PublicSide, read: Read) -> None:
        self._runtime = runtime
        self._public = public
        self._read = read
        self._change: Change | None = None
        self._commands: dict[bytes, Callable[[bytes], Awaitable[Any]]] = {
            b"report": self._report,
            b"prepare": self._prepare,
            b"apply": self._apply,
            b"refuse": self._refuse,
        }

    async def run(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stop: asyncio.Event
    ) -> None:
        """Report, and then answer line by line; the end of the channel is the end of the worker."""
        try:
            line = b"report"
            while line:
                command, _, argument = line.strip().partition(b" ")
                answer = await self._commands[command](argument)
                writer.write(orjson.dumps(answer) + b"\n")
                await writer.drain()
                line = await reader.readline()
        except ConnectionError:
            return
        finally:
            stop.set()

    async def _report(self, _: bytes) -> dict[str, Any]:
        runtime = self._runtime
        return {
            "problems": runtime.problems(),
            "obstacles": runtime.obstacles(),
            "status": runtime.status(),
            "metrics": to_json(runtime.metrics.collection.snapshot()),
        }

    async def _prepare(self, argument: bytes) -> dict[str, list[str]]:
        self._change = None
        handout = Handout.model_validate_json(argument)
        try:
            self._change = await self._public.prepare(partial(self._read, handout))
        except ConfigError as error:
            return {"problems": texts(error), "changes": []}
        return {"problems": [], "changes": self._change.described}

    async def _apply(self, _: bytes) -> list[str]:
        change, self._change = self._change, None
        if change is None:
            return ["nothing was prepared"]
        try:
            await self._public.apply(change)
        except ConfigError as error:
            return texts(error)
        return []

    async def _refuse(self, argument: bytes) -> list[str]:
        self._change = None
        self._public.note(orjson.loads(argument), [])
        return []


if __name__ == "__main__":
    main()
