"""What the proxy asks of a key management infrastructure (KMI).

A kind of KMI has two faces. A `Lane` executes operations for the server: one unit of concurrency,
such as an HSM session or a connection. A `KeyManager` makes, lists, rotates and destroys keys for
the command line. A kind whose operations cost less than a queue (`software`) offers an
`InlineLane` instead, which executes on the spot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from xkiproxy.crypto.algorithms import KeySpec, Usage
from xkiproxy.crypto.operations import Operation, OperationError, Result
from xkiproxy.observability.logging import utf8

_KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class KmiState(StrEnum):
    """Whether a KMI can be used."""

    CONNECTED = "connected"
    DEGRADED = "degraded"
    """Some lanes are away; operations still succeed."""
    DISCONNECTED = "disconnected"


class LaneState(StrEnum):
    """What a lane does."""

    IDLE = "idle"
    BUSY = "busy"
    STARTING = "starting"
    FAILED = "failed"
    """Its last start failed; unless its login was refused, another follows."""


class InlineLane(Protocol):
    """A lane whose operations take microseconds: it runs in the caller, without a queue.

    `warning` says what is wrong while it executes operations all the same; mostly it is empty.
    """

    @property
    def warning(self) -> str: ...

    def execute(self, operation: Operation) -> Result:
        """Execute one operation; raises OperationError."""
        ...

    def probe(self) -> None:
        """Encrypt and decrypt with a key of its own; raises OperationError if that fails."""
        ...

    def refresh(self) -> None:
        """Take over what another process changed; raises OperationError if that cannot be read."""
        ...

    def close(self) -> None: ...


class Lane(Protocol):
    """One unit of concurrency to a KMI; executes one batch after the other, in order.

    It is given the next batch when it has settled most of the one before.
    """

    async def execute(self, batch: Sequence[Operation], epoch: int, settle: Settle) -> None:
        """Execute a batch: `settle(index, outcome)` for each operation, as soon as it is known.

        A new `epoch` means that keys may have changed: what the lane remembers of them is stale.
        Raises LaneError if the lane broke; what is not settled then may have run or not.
        """
        ...

    async def probe(self) -> None:
        """Encrypt and decrypt with a key of its own; raises LaneError."""
        ...

    async def wait_broken(self) -> LaneError:
        """Wait until the lane breaks, busy or not, and say why."""
        ...

    async def close(self) -> None:
        """End it, whatever state it is in; it counts as broken then. May be called twice."""
        ...


Settle = Callable[[int, Result | OperationError], None]
"""Takes the index of an operation in its batch, and its outcome."""


class Launcher(Protocol):
    """Starts the lanes of a KMI."""

    async def launch(self, index: int, *, home: bool = False) -> Lane:
        """Start the lane of this index (0 and up), and see that it works; raises LaneError.

        Several lanes may be started at the same time. `BreakReason.LOGIN` ends it: no lane is
        started again after that. `home`: only at the endpoint (token, address) that is its own.
        """
        ...

    def is_away(self, index: int) -> bool:
        """Whether this lane was last started at another endpoint than its own."""
        ...


class BreakReason(StrEnum):
    """Why a lane broke, for metrics."""

    EXIT = "exit"
    """Its process or connection ended."""
    TIMEOUT = "timeout"
    """It stopped answering."""
    DEVICE = "device"
    """The device said that it cannot go on."""
    START = "start"
    """It could not be started."""
    LOGIN = "login"
    """Its login was refused: trying again could lock the token."""


class LaneError(Exception):
    """This lane is broken; nothing is wrong with the operations that it was given.

    `started`: whether it had begun with the batch that this is the answer to.
    """

    def __init__(self, message: str, reason: BreakReason, started: bool = True) -> None:
        super().__init__(message, reason)
        self.message = utf8(message)  # it may name a file, and is sent on in JSON
        self.reason = reason
        self.started = started


class KeyManagerError(Exception):
    """A key could not be made, listed, rotated or destroyed; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key as its KMI knows it.

    `versions` are ascending, 1 and up. `created` is in seconds since the epoch, None where the KMI
    does not know. `problem` says why the proxy cannot use the key, or is empty; then `spec` may be
    None: what is there is no key of ours.
    """

    key_id: str
    spec: KeySpec | None
    versions: tuple[int, ...]
    created: float | None
    usage: Usage = Usage.BOTH
    problem: str = ""

    @property
    def version(self) -> int:
        """The newest version: the one that encrypts."""
        return self.versions[-1]


class KeyManager(Protocol):
    """The administrator's side of a KMI. Every method raises KeyManagerError."""

    def create(self, key_id: str, spec: KeySpec) -> KeyInfo:
        """Make a key with version 1; refuses an ID that is taken."""
        ...

    def get(self, key_id: str) -> KeyInfo | None: ...

    def list(self) -> list[KeyInfo]: ...

    def rotate(self, key_id: str) -> KeyInfo:
        """Add a version; the older ones go on decrypting."""
        ...

    def destroy(self, key_id: str) -> None:
        """Destroy every version, for good."""
        ...

    def close(self) -> None: ...


def check_key_id(key_id: str) -> None:
    """Refuse an ID that could not stand in a request's path.

    Raises:
        KeyManagerError: it is not 1 to 128 of A-Z a-z 0-9 . _ -, or is "." or "..".
    """
    if not _KEY_ID.fullmatch(key_id) or key_id in {".", ".."}:
        raise KeyManagerError(
            f"key ID {key_id[:128]!r}: must be 1 to 128 of A-Z a-z 0-9 . _ - and not . or .."
        )
