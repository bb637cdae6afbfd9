"""What the proxy asks of a key management infrastructure (KMI).

A kind of KMI has two faces. A `Lane` executes operations for the server: one unit of concurrency,
such as an HSM session or a connection. A `KeyManager` makes, lists, rotates and destroys keys for
the command line. A kind whose operations cost less than a queue (`software`) offers an
`InlineLane` instead, which executes on the spot.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from xkiproxy.crypto.algorithms import KeySpec, Usage
from xkiproxy.crypto.operations import Operation, OperationError, Result

_KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class KmiState(StrEnum):
    """Whether a KMI can be used."""

    CONNECTED = "connected"
    DEGRADED = "degraded"
    """Some lanes are away; operations still succeed."""
    DISCONNECTED = "disconnected"


class InlineLane(Protocol):
    """A lane whose operations take microseconds: it runs in the caller, without a queue."""

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
    """One unit of concurrency to a KMI; executes one batch at a time."""

    async def execute(self, batch: Sequence[Operation]) -> Sequence[Result | OperationError]:
        """The outcome of each operation, in order. Raises LaneError if the lane itself broke."""
        ...

    async def probe(self) -> None:
        """Encrypt and decrypt with a key of its own; raises OperationError or LaneError."""
        ...

    async def close(self) -> None: ...


class LaneError(Exception):
    """This lane is broken; nothing is wrong with the operations that it was given."""


class KeyManagerError(Exception):
    """A key could not be made, listed, rotated or destroyed; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key as its KMI knows it.

    `versions` are ascending, 1 and up. `problem` says why the proxy cannot use the key, or is
    empty.
    """

    key_id: str
    spec: KeySpec
    versions: tuple[int, ...]
    created: float
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
