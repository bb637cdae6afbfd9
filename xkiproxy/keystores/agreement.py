"""Whether the KMIs of a key store hold the same keys.

Failover goes from one KMI to the next: what one has encrypted the others must decrypt. Nobody
notices that they do not until the first is away, so each key is tried in every direction.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence

from xkiproxy.crypto.algorithms import Usage
from xkiproxy.crypto.operations import (
    CiphertextFormat,
    Encrypt,
    Encrypted,
    KeyState,
    OperationError,
)
from xkiproxy.keystores.catalog import Catalog
from xkiproxy.keystores.key_patterns import KeyPatterns
from xkiproxy.keystores.keystore import decrypts_to, opening
from xkiproxy.kmi.base import KmiState
from xkiproxy.kmi.contract import Kmi

_AT_ONCE = 8
_SECONDS = 10.0


async def disagreements(
    kmis: Sequence[Kmi],
    catalog: Catalog,
    form: CiphertextFormat,
    keys: KeyPatterns | None = None,
) -> list[str]:
    """What one KMI encrypts and another, that has the key too, does not decrypt; a text each.

    Keys that are not enabled everywhere are left out, and KMIs that are away: to try those says
    nothing. So are keys that the key store may not use.
    """
    present = [kmi for kmi in kmis if kmi.state is not KmiState.DISCONNECTED]
    pairs = [pair for pair in _pairs(present, catalog) if keys is None or keys.admit(pair[0])]
    turn = asyncio.Semaphore(_AT_ONCE)

    async def look(key_id: str, one: Kmi, other: Kmi) -> str:
        async with turn:
            return await _disagreement(Encrypt(key_id, os.urandom(32), format=form), one, other)

    found = await asyncio.gather(*(look(*pair) for pair in pairs))
    return [text for text in found if text]


def _pairs(kmis: Sequence[Kmi], catalog: Catalog) -> Iterator[tuple[str, Kmi, Kmi]]:
    """Each key with each KMI that may encrypt with it and each other that may decrypt."""
    for key_id in sorted({entry.key_id for entry in catalog.entries()}):
        entries = [(kmi, catalog.get(kmi.name, key_id)) for kmi in kmis]
        held = [(kmi, entry) for kmi, entry in entries if entry is not None]
        if any(entry.state is not KeyState.ENABLED for _, entry in held):
            continue
        for one, first in held:
            for other, second in held:
                if (
                    one is not other
                    and Usage.ENCRYPT & first.usage
                    and Usage.DECRYPT & second.usage
                ):
                    yield key_id, one, other


async def _disagreement(operation: Encrypt, one: Kmi, other: Kmi) -> str:
    """Empty if the other KMI decrypts what the one has encrypted."""
    deadline = time.monotonic() + _SECONDS
    key = f"key {operation.key_id}"
    try:
        made = await one.submit(operation, deadline)
    except OperationError as error:
        return f"{key}: KMI {one.name} cannot encrypt: {error.message}"
    assert isinstance(made, Encrypted)  # noqa: S101 - the KMI's contract
    try:
        if await decrypts_to(other, opening(operation, made), operation.plaintext, deadline):
            return ""
        why = "it holds another key under that name, or lacks the version"
    except OperationError as error:
        why = error.message
    return f"{key}: what KMI {one.name} encrypts KMI {other.name} cannot decrypt: {why}"
