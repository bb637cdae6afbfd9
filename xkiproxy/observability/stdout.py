"""Standard output as a place for audit records: a line each, and never a wait for its reader.

To make descriptor 1 itself non-blocking would change it for every process that shares it. So a
pipe, a terminal or a file is opened once more, and a socket is asked not to wait.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from xkiproxy.observability.audit import AuditError
from xkiproxy.observability.outlet import Wire

_STDOUT = 1


def line_frame(lines: Sequence[bytes]) -> bytes:
    """Each line with a line feed."""
    return b"\n".join([*lines, b""])


async def connect_stdout() -> Wire:
    """Standard output, opened not to block; raises AuditError."""
    if sys.__stdout__ is None:
        # Closed when the process began: by now the number may be that of another file.
        raise AuditError("standard output is closed")
    try:
        if stat.S_ISSOCK(os.fstat(_STDOUT).st_mode):
            return _SocketWire(socket.socket(fileno=os.dup(_STDOUT)))
        return _FileWire(_STDOUT)
    except OSError as error:
        raise AuditError(f"standard output: {error.strerror}") from None


class _FileWire:
    """A pipe, a terminal or a file."""

    def __init__(self, descriptor: int) -> None:
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY
        self._descriptor = os.open(Path(f"/proc/self/fd/{descriptor}"), flags)
        # A terminal becomes readable by what is typed, and a file never.
        self.tells_its_end = stat.S_ISFIFO(os.fstat(self._descriptor).st_mode)

    def fileno(self) -> int:
        """See `Wire`."""
        return self._descriptor

    def send(self, data: memoryview, /) -> int:
        """See `Wire`."""
        return os.write(self._descriptor, data)

    def receive(self) -> bool:
        """See `Wire`: the end that is written to is readable when the reader has gone."""
        return False

    def close(self) -> None:
        """See `Wire`."""
        os.close(self._descriptor)


class _SocketWire:
    """A socket, as systemd gives one for its journal (which has ended its own side)."""

    tells_its_end = False

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.fileno = sock.fileno

    def send(self, data: memoryview, /) -> int:
        """See `Wire`."""
        return self._socket.send(data, socket.MSG_DONTWAIT)

    def receive(self) -> bool:
        """See `Wire`."""
        return True

    def close(self) -> None:
        """See `Wire`."""
        self._socket.close()
