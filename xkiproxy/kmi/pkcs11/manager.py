"""The administrator's side of an HSM: a lane process that is asked to list, make and destroy.

The module is loaded in that process too, never in the command or in the server.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

from xkiproxy.config.models import Pkcs11Settings
from xkiproxy.crypto.algorithms import KeySpec, Usage
from xkiproxy.kmi.base import KeyInfo, KeyManagerError, check_key_id
from xkiproxy.kmi.pkcs11 import wire
from xkiproxy.kmi.pkcs11.process import Process, open_settings, spawn

_COMMAND_TIMEOUT_SECONDS = 60.0
_CLOSE_SECONDS = 5.0


class Pkcs11KeyManager:
    """See `xkiproxy.kmi.base.KeyManager`. Keys are made and destroyed on the first token."""

    def __init__(self, settings: Pkcs11Settings) -> None:
        """Start the process and log in.

        Raises:
            KeyManagerError: the module, the token or the PIN does not work.
            SecretError: the PIN cannot be had.
        """
        self._settings = settings
        self._process = _spawn(settings)
        try:
            arguments = open_settings(
                settings,
                settings.token[0],
                settings.pin.read(),
                title=f"keys of KMI {settings.name}",
                rw=True,
            )
            self._ask(settings.start_timeout_seconds, wire.OPEN, arguments)
        except BaseException:
            self.close()
            raise

    def create(self, key_id: str, spec: KeySpec) -> KeyInfo:
        """See `KeyManager.create`."""
        check_key_id(key_id)
        self._refuse_several_tokens("made")
        self._command("create", key_id, spec.value)
        return self._existing(key_id)

    def get(self, key_id: str) -> KeyInfo | None:
        """See `KeyManager.get`."""
        return next(self._list(key_id), None)

    def list(self) -> list[KeyInfo]:
        """See `KeyManager.list`."""
        return list(self._list())

    def rotate(self, key_id: str) -> KeyInfo:
        """See `KeyManager.rotate`."""
        self._refuse_several_tokens("rotated")
        self._command("rotate", key_id)
        return self._existing(key_id)

    def destroy(self, key_id: str) -> None:
        """See `KeyManager.destroy`."""
        self._refuse_several_tokens("destroyed")
        self._command("destroy", key_id)

    def close(self) -> None:
        """End the process."""
        self._process.end(_CLOSE_SECONDS)

    def _list(self, *key_id: str) -> Iterator[KeyInfo]:
        for name, spec, versions, usage, problem in self._command("list", *key_id):
            kind = KeySpec(spec) if spec else None
            yield KeyInfo(name, kind, tuple(versions), None, Usage(usage), problem)

    def _existing(self, key_id: str) -> KeyInfo:
        key = self.get(key_id)
        if key is None:
            raise KeyManagerError(f"KMI {self._settings.name}: key {key_id} is not there")
        return key

    def _refuse_several_tokens(self, done: str) -> None:
        if len(self._settings.token) > 1:
            raise KeyManagerError(
                f"KMI {self._settings.name} has several tokens: a key that cannot leave its HSM is "
                f"{done} by the HSMs' own replication, on all of them"
            )

    def _command(self, command: str, *arguments: object) -> Any:
        return self._ask(_COMMAND_TIMEOUT_SECONDS, wire.MANAGE, command, arguments)

    def _ask(self, timeout: float, *frame: object) -> Any:
        where = f"KMI {self._settings.name}"
        sock = self._process.sock
        try:
            sock.settimeout(timeout)
            sock.sendall(wire.pack(frame))
            answer = wire.unpack(_read(sock, wire.body_length(_read(sock, wire.LENGTH_SIZE))))
        except TimeoutError:
            raise KeyManagerError(f"{where}: the module gave no answer for {timeout:g} s") from None
        except (EOFError, OSError, wire.FrameError):
            raise KeyManagerError(f"{where}: the module crashed") from None
        if answer[0] in {wire.READY, wire.DONE}:
            return answer[1] if len(answer) > 1 else None
        raise KeyManagerError(f"{where}: {answer[-1]}")


def _spawn(settings: Pkcs11Settings) -> Process:
    try:
        return spawn()
    except OSError as error:
        raise KeyManagerError(f"KMI {settings.name}: no process: {error.strerror}") from None


def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data
