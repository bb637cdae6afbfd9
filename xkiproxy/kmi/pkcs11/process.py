"""Starting a lane process: as a program of its own, with nothing that is not meant for it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from xkiproxy.config.models import Pkcs11Settings, TokenSettings
from xkiproxy.config.secrets import secret_variables

_KILL_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Process:
    """A started process and our end of its socket."""

    popen: subprocess.Popen[bytes]
    sock: socket.socket

    def end(self, grace: float = 0.0) -> None:
        """Close the socket, which ends it by itself, and after `grace` seconds kill it.

        It must not be killed while it logs in: SoftHSM writes the token's file then, in place, and
        a kill at that moment loses the token with all its keys. Returns when the process is gone.
        """
        self.sock.close()
        if grace:
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(grace)
        self.popen.kill()
        # One that the kernel cannot end (it waits for a device) must not end its supervisor.
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(_KILL_SECONDS)


def spawn() -> Process:
    """Start a lane process.

    It inherits the environment (modules are configured by it) but for the variables that hold
    secrets, and one descriptor: its end of a socket pair. It has a session of its own, so that a
    Ctrl-C at the server's terminal does not reach it.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            popen = subprocess.Popen(  # noqa: S603 - our own program, no text of others
                [sys.executable, "-m", "xkiproxy.kmi.pkcs11.program", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env=_environment(),
            )
        except OSError:
            ours.close()
            raise
    return Process(popen, ours)


def open_settings(
    settings: Pkcs11Settings, token: TokenSettings, pin: str, *, title: str, rw: bool
) -> dict[str, Any]:
    """What a lane process needs to know to open its token."""
    sm4 = settings.sm4
    return {
        "title": title,
        "module": str(settings.module),
        "pin": pin,
        "label": token.label,
        "serial": token.serial,
        "iv_by_hsm": settings.iv == "hsm",
        "sm4": [sm4.key_type, sm4.key_gen, sm4.gcm] if sm4 else None,
        "rw": rw,
    }


def _environment() -> dict[str, str]:
    withheld = secret_variables()
    return {
        name: value
        for name, value in os.environ.items()
        if name not in withheld and not name.startswith("XKIPROXY_")
    }
