"""A TCP relay that does to connections what networks do: delay, stall, cut, reset, swallow."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress

_CHUNK = 1 << 16
_RESET = struct.pack("ii", 1, 0)


class Relay:
    """Between a client and `target`; `port` is where it listens, on 127.0.0.1."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self.request_delay = 0.0
        """Seconds that bytes take to the target."""
        self.connections = 0
        self._target = target
        self._flows = asyncio.Event()
        self._flows.set()
        self._cut_after: int | None = None
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen, on the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections, and end those that are there."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stall(self) -> None:
        """Keep connections open, take new ones, and pass nothing on."""
        self._flows.clear()

    def flow(self) -> None:
        """Pass everything on again."""
        self._cut_after = None
        self._flows.set()

    def cut(self, after: int) -> None:
        """End the connection after so many bytes of the next answer: within a message."""
        self._cut_after = after

    def reset(self) -> None:
        """End every connection with a reset."""
        for writer in list(self._writers):
            sock = writer.get_extra_info("socket")
            if sock is not None:
                with suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        other: asyncio.StreamWriter | None = None
        try:
            there, other = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(other)
            await asyncio.gather(
                self._pass(reader, other), self._pass(there, writer, is_answer=True)
            )
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for end in (writer, other):
                if end is not None:
                    self._writers.discard(end)
                    end.transport.abort()

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        is_answer: bool = False,
    ) -> None:
        while data := await reader.read(_CHUNK):
            if self.request_delay and not is_answer:
                await asyncio.sleep(self.request_delay)
            await self._flows.wait()
            if is_answer and self._cut_after is not None:
                writer.write(data[: self._cut_after])
                await writer.drain()
                raise ConnectionResetError
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError
