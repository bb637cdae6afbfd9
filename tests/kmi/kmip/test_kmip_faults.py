"""What servers may do that PyKMIP's does not: the lane says what is true, and others go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from scripted import Object, Scripted, attribute, scripted

from xkiproxy.crypto.operations import (
    Decrypt,
    Decrypted,
    Encrypt,
    Encrypted,
    Fault,
    Operation,
    OperationError,
    Result,
)
from xkiproxy.kmi.kmip import KmipLauncher
from xkiproxy.kmi.kmip.lane import KmipLane
from xkiproxy.kmi.kmip.messages import Reason, Tag
from xkiproxy.kmi.kmip.ttlv import Structure

Outcome = Result | OperationError


@asynccontextmanager
async def lane_to(server: Scripted, **changes: Any) -> AsyncIterator[KmipLane]:
    lane = await KmipLauncher(server.settings(**changes)).launch(0)
    try:
        yield lane
    finally:
        await lane.close()


async def run(lane: KmipLane, *batch: Operation, epoch: int = 0) -> Sequence[Outcome]:
    found: dict[int, Outcome] = {}
    await lane.execute(batch, epoch, found.__setitem__)
    return [found[index] for index in range(len(batch))]


async def one(lane: KmipLane, operation: Operation, epoch: int = 0) -> Any:
    (outcome,) = await run(lane, operation, epoch=epoch)
    return outcome


def fault(outcome: object) -> Fault | None:
    return outcome.fault if isinstance(outcome, OperationError) else None


def opening(made: Encrypted, key_id: str = "key", **changes: Any) -> Decrypt:
    return Decrypt(key_id, made.ciphertext, made.iv, changes.pop("version", made.version))


def wrong(made: Encrypted) -> Decrypt:
    return Decrypt("key", made.ciphertext[:-1] + b"\0", made.iv, made.version)


class Once:
    """Refuses an operation so many times."""

    def __init__(self, *operations: int, reason: int, times: int = 1) -> None:
        self._operations = operations
        self._reason = reason
        self.times = times

    def __call__(self, operation: int, payload: Structure) -> tuple[int, str] | None:
        del payload
        if operation not in self._operations or not self.times:
            return None
        self.times -= 1
        return self._reason, "the backend is being failed over"


# ---- batches -----------------------------------------------------------------------------------


async def test_a_server_that_takes_no_batches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def alone(items: list[Any]) -> tuple[int, str] | None:
        return (Reason.INVALID_MESSAGE, "no batches") if len(items) > 1 else None

    async with scripted(tmp_path, refuse_all=alone) as server, lane_to(server) as lane:
        assert "takes one operation in a message" in caplog.text
        outcomes = await run(lane, *(Encrypt("key", b"x") for _ in range(8)))
        assert {type(outcome) for outcome in outcomes} == {Encrypted}
        assert [len(message) for message in server.asked].count(2) == 1


async def test_what_spoils_a_message_spoils_nothing_else(tmp_path: Path) -> None:
    def spoiled(items: list[Any]) -> tuple[int, str] | None:
        bad = any(payload.find(Tag.DATA) == b"spoiled" for _, payload in items)
        return (Reason.INVALID_MESSAGE, "it cannot be read") if bad else None

    async with scripted(tmp_path, refuse_all=spoiled) as server, lane_to(server) as lane:
        texts = [b"x"] * 20 + [b"spoiled"] + [b"y"] * 20
        outcomes = await run(lane, *(Encrypt("key", text) for text in texts))
        found = Counter(fault(outcome) for outcome in outcomes)
        assert found == {None: 40, Fault.INTERNAL: 1}
        assert fault(outcomes[20]) is Fault.INTERNAL
        assert isinstance(await one(lane, Encrypt("key", b"x")), Encrypted)


async def test_messages_have_a_size_that_servers_take(tmp_path: Path) -> None:
    async with scripted(tmp_path) as server, lane_to(server) as lane:
        await one(lane, Encrypt("key", b"x"))
        server.asked.clear()
        outcomes = await run(lane, *(Encrypt("key", bytes(60_000)) for _ in range(32)))
        assert {type(outcome) for outcome in outcomes} == {Encrypted}
        assert [len(message) for message in server.asked] == [8, 8, 8, 8]


async def test_answers_in_another_order_are_each_for_their_own(tmp_path: Path) -> None:
    async with scripted(tmp_path) as server, lane_to(server) as lane:
        made = await run(lane, Encrypt("key", b"one"), Encrypt("key", b"two"))
        batch = [opening(item) for item in made if isinstance(item, Encrypted)]
        server.shuffle = lambda items: items[::-1]
        for server.echoes in (True, False):
            opened = await run(lane, *batch)
            texts = [item.plaintext for item in opened if isinstance(item, Decrypted)]
            assert texts == [b"one", b"two"]


async def test_a_type_that_came_later_does_not_matter(tmp_path: Path) -> None:
    later = (Tag.ATTRIBUTE_VALUE << 8 | 0x0B).to_bytes(4) + (8).to_bytes(4) + bytes(8)
    objects = {"1": Object(("key",), more=attribute("x-made", later))}
    async with scripted(tmp_path, objects=objects) as server, lane_to(server) as lane:
        assert isinstance(await one(lane, Encrypt("key", b"x")), Encrypted)
