"""The program of a lane process: `python -m xkiproxy.kmi.pkcs11.program <socket>`.

It owns the module and its sessions, is single-threaded, and does one frame after the other. A
module that aborts, hangs or leaks takes down this process and nothing else. It gets everything over
the socket, the PIN among it; it ends when the socket does, or when its parent dies.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from setproctitle import setproctitle

from xkiproxy.hardening import forbid_core_dumps
from xkiproxy.kmi.pkcs11 import wire
from xkiproxy.kmi.pkcs11.token import BrokenError, LoginError, Sm4Numbers, Token, TokenError

_MIN_CHUNK = 8
_PR_SET_PDEATHSIG = 1


class _Channel:
    """Frames over the socket, blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, *frame: Any) -> None:
        self._sock.sendall(wire.pack(frame))

    def receive(self) -> wire.Frame:
        """The next frame; raises EOFError when the server has closed."""
        return wire.unpack(self._read(wire.body_length(self._read(wire.LENGTH_SIZE))))

    def _read(self, size: int) -> bytes:
        data = self._sock.recv(size, socket.MSG_WAITALL)
        while len(data) < size:
            more = self._sock.recv(size - len(data), socket.MSG_WAITALL)
            if not more:
                raise EOFError
            data += more
        return data


def main() -> None:
    """Serve one connection to the server, until it ends."""
    forbid_core_dumps()
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = _Channel(socket.socket(fileno=int(sys.argv[1])))
    try:
        _, settings = channel.receive()
        title = f"xkiproxy: {settings.pop('title')}"
        setproctitle(title + " (starting)")
        token = _open(settings)
    except EOFError:
        return
    except LoginError as error:
        _send_last(channel, wire.FAILED, "login", str(error))
        return
    except (TokenError, BrokenError) as error:
        _send_last(channel, wire.FAILED, "start", str(error))
        return
    # Only now: a kill while the token logs in could cost the token (see process.py).
    _die_with(parent)
    setproctitle(title)
    try:
        channel.send(wire.READY)
        _serve(channel, token)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except BrokenError as error:
        _send_last(channel, wire.BROKEN, str(error))


def _send_last(channel: _Channel, *frame: Any) -> None:
    """Say why this process ends, to a server that may have given it up already."""
    with suppress(OSError):
        channel.send(*frame)


def _open(settings: dict[str, Any]) -> Token:
    sm4 = settings["sm4"]
    return Token(
        settings["module"],
        settings.pop("pin"),
        label=settings["label"],
        serial=settings["serial"],
        iv_by_hsm=settings["iv_by_hsm"],
        sm4=Sm4Numbers(*sm4) if sm4 else None,
        rw=settings["rw"],
    )


def _serve(channel: _Channel, token: Token) -> None:
    epoch = 0
    while True:
        frame = channel.receive()
        if frame[0] == wire.BATCH:
            _, its_epoch, operations = frame
            if its_epoch != epoch:
                epoch = its_epoch
                token.forget_keys()
            _run_batch(channel, token, operations)
        elif frame[0] == wire.PROBE:
            token.probe()
            channel.send(wire.PROBED)
        else:
            _manage(channel, token, frame[1], frame[2])


def _run_batch(channel: _Channel, token: Token, operations: Sequence[Sequence[Any]]) -> None:
    """Execute a batch; outcomes leave in a few parts, so that the server can work meanwhile."""
    chunk = max(_MIN_CHUNK, len(operations) // 4)
    outcomes: list[tuple[Any, ...]] = []
    for fields in operations:
        outcomes.append(token.execute(fields))
        if len(outcomes) == chunk:
            channel.send(wire.OUTCOMES, outcomes)
            outcomes = []
    if outcomes:
        channel.send(wire.OUTCOMES, outcomes)


def _manage(channel: _Channel, token: Token, command: str, arguments: Sequence[Any]) -> None:
    try:
        value = token.manage(command, arguments)
    except TokenError as error:
        channel.send(wire.ERROR, str(error))
    else:
        channel.send(wire.DONE, value)


def _die_with(parent: int) -> None:
    """The kernel kills this process when its parent ends, even by SIGKILL (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # it ended before the call


if __name__ == "__main__":
    main()
