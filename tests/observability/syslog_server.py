"""A syslog server for tests: strict about RFC 5424 and octet counting, over TCP or TLS."""

from __future__ import annotations

import asyncio
import re
import ssl
from dataclasses import dataclass, field
from datetime import datetime

_MESSAGE = re.compile(
    rb"<(?P<pri>0|[1-9]\d{0,2})>1 "
    rb"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|[+-]\d\d:\d\d)) "
    rb"(?P<host>[!-~]{1,255}) (?P<app>[!-~]{1,48}) (?P<procid>[!-~]{1,128})"
    rb" (?P<msgid>[!-~]{1,32}) - (?P<msg>.*)",
    re.DOTALL,
)


@dataclass
class Message:
    priority: int
    app_name: str
    procid: str
    msgid: str
    msg: bytes


def parse(data: bytes) -> Message:
    """A message of RFC 5424 with the structured data `-`."""
    match = _MESSAGE.fullmatch(data)
    assert match is not None, data[:200]
    assert int(match["pri"]) <= 191
    datetime.fromisoformat(match["time"].decode())
    match["msg"].decode("utf-8")
    names = (match[name].decode() for name in ("app", "procid", "msgid"))
    return Message(int(match["pri"]), *names, match["msg"])


@dataclass
class SyslogServer:
    """Keeps what it is sent; it can stop reading, hang up, and come back on its port."""

    context: ssl.SSLContext | None = None
    port: int = 0
    messages: list[Message] = field(default_factory=list)
    connections: int = 0
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reads = asyncio.Event()
        self.reads.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, ssl=self.context, limit=1 << 16
        )
        self.port = self._server.sockets[0].getsockname()[1]

    def stall(self) -> None:
        """Read nothing more, until `reads` is set."""
        self.reads.clear()
        for writer in self._writers:
            writer.transport.pause_reading()

    def go_on(self) -> None:
        self.reads.set()
        for writer in self._writers:
            writer.transport.resume_reading()

    async def stop(self) -> None:
        """Hang up at once, whatever has not been read."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            self._server = None
            await asyncio.sleep(0.05)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.connections += 1
        try:
            while True:
                await self.reads.wait()
                size = await reader.readuntil(b" ")
                assert re.fullmatch(rb"[1-9]\d* ", size), size
                self.messages.append(parse(await reader.readexactly(int(size))))
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            return
        except BaseException as error:
            self.failures.append(error)
        finally:
            self._writers.discard(writer)
            writer.close()

    @property
    def stored(self) -> bytes:
        """What a server that writes MSG, a line each, would have in its file."""
        assert self.failures == []
        return b"".join(message.msg + b"\n" for message in self.messages)
