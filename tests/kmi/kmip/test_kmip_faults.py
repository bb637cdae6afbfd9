"""What servers may do that PyKMIP's does not: the lane says what is true, and others go on."""

from __future__ import annotations

import asyncio
import time
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
    Describe,
    Encrypt,
    Encrypted,
    Fault,
    KeyDescription,
    Operation,
    OperationError,
    Result,
)
from xkiproxy.kmi.kmip import KmipLauncher, ttlv
from xkiproxy.kmi.kmip import lane as lane_module
from xkiproxy.kmi.kmip.lane import KmipLane
from xkiproxy.kmi.kmip.messages import Op, Reason, Tag
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


# ---- keys that are no good ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        ttlv.structure(Tag.ATTRIBUTE, ttlv.text(Tag.ATTRIBUTE_VALUE, "nameless")),
        attribute(
            "Initial Date",
            (Tag.ATTRIBUTE_VALUE << 8 | ttlv.BIG_INTEGER).to_bytes(4)
            + (256).to_bytes(4)
            + b"\x7f"
            + bytes(255),
        ),
    ],
    ids=["no name", "a date that is no date"],
)
async def test_attributes_without_sense_are_one_keys_trouble(
    tmp_path: Path, more: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    objects = {"1": Object(("key",)), "2": Object(("odd",), more=more)}
    async with scripted(tmp_path, objects=objects) as server, lane_to(server) as lane:
        batch = [Encrypt("odd", b"x"), Encrypt("key", b"x"), Describe("odd")]
        outcomes = await run(lane, *batch)
    assert [fault(outcome) for outcome in outcomes] == [
        Fault.KEY_UNUSABLE,
        None,
        Fault.KEY_UNUSABLE,
    ]
    assert "key odd: the attributes of '2' make no sense" in caplog.text


async def test_a_type_that_came_later_does_not_matter(tmp_path: Path) -> None:
    later = (Tag.ATTRIBUTE_VALUE << 8 | 0x0B).to_bytes(4) + (8).to_bytes(4) + bytes(8)
    objects = {"1": Object(("key",), more=attribute("x-made", later))}
    async with scripted(tmp_path, objects=objects) as server, lane_to(server) as lane:
        assert isinstance(await one(lane, Encrypt("key", b"x")), Encrypted)


async def test_a_key_is_known_by_each_of_its_names(tmp_path: Path) -> None:
    objects = {"1": Object(("label1", "payroll"))}
    async with scripted(tmp_path, objects=objects) as server, lane_to(server) as lane:
        assert isinstance(await one(lane, Encrypt("payroll", b"x")), Encrypted)


# ---- versions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("takes_marks", [True, False])
async def test_a_version_that_is_gone_hides_no_other(tmp_path: Path, takes_marks: bool) -> None:
    """With marks or without; those that are seen without are `_AHEAD` at most from each other."""
    numbers = (3, 9, 17) if not takes_marks else (1, 40, 77)
    mark = "key" if takes_marks else ""
    objects = {str(n): Object(("key" if n == 1 else f"key#{n}",), mark=mark) for n in numbers}
    script = {"objects": objects, "takes_marks": takes_marks}
    async with scripted(tmp_path, **script) as server, lane_to(server) as lane:
        made = await one(lane, Encrypt("key", b"x"))
        assert made.version == numbers[-1]
        assert (await one(lane, opening(made))).plaintext == b"x"


async def test_a_key_that_was_made_elsewhere_and_rotated_here(tmp_path: Path) -> None:
    objects = {"1": Object(("key",)), "2": Object(("key#2",))}
    async with scripted(tmp_path, objects=objects) as server, lane_to(server) as lane:
        made = await one(lane, Encrypt("key", b"x"))
        assert made.version == 2
        objects["3"] = Object(("key#30",), mark="key")
        assert (await one(lane, Encrypt("key", b"x"), epoch=1)).version == 30
        assert (await one(lane, opening(made), epoch=1)).version == 2


async def test_versions_that_cannot_encrypt_do_not_stop_encryption(tmp_path: Path) -> None:
    """A crash between Create and Activate leaves one, Pre-Active."""
    objects = {"1": Object(("key",)), "2": Object(("key#2",), state=1)}
    async with scripted(tmp_path, objects=objects) as server, lane_to(server) as lane:
        made = await one(lane, Encrypt("key", b"x"))
        assert made.version == 1
        described = await one(lane, Describe("key"))
        assert isinstance(described, KeyDescription)
        assert described.version == 1
        objects["2"].state = 2
        assert (await one(lane, Encrypt("key", b"x"), epoch=1)).version == 2
        assert isinstance(await one(lane, opening(made)), Decrypted)


async def test_what_is_known_of_a_key_grows_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "_FRESH_SECONDS", 0.2)
    async with scripted(tmp_path) as server, lane_to(server) as lane:
        assert (await one(lane, Encrypt("key", b"x"))).version == 1
        server.objects["2"] = Object(("key#2",))
        assert (await one(lane, Encrypt("key", b"x"))).version == 1
        await asyncio.sleep(0.25)
        assert (await one(lane, Encrypt("key", b"x"))).version == 2
        for item in server.objects.values():
            item.state = 4
        await asyncio.sleep(0.25)
        outcome = await one(lane, Describe("key"))
        assert fault(outcome) is Fault.KEY_UNUSABLE
        server.objects.clear()
        await asyncio.sleep(0.25)
        assert fault(await one(lane, Describe("key"))) is Fault.KEY_NOT_FOUND


async def test_the_keys_of_a_batch_are_looked_up_together(tmp_path: Path) -> None:
    ids = [f"key{number}" for number in range(30)]
    objects = {key_id: Object((key_id,), mark=key_id) for key_id in ids}
    async with scripted(tmp_path, objects=objects, seconds=0.005) as server:
        launcher = KmipLauncher(server.settings())
        lane, other = await launcher.launch(0), await launcher.launch(1)
        server.asked.clear()
        outcomes = await run(lane, *(Encrypt(key_id, b"x") for key_id in ids))
        assert {type(outcome) for outcome in outcomes} == {Encrypted}
        kinds = [set(message) for message in server.asked]
        assert kinds == [{Op.LOCATE}, {Op.LOCATE}, {Op.GET_ATTRIBUTES}, {Op.ENCRYPT}]
        # The lanes to an address share what they know.
        await run(other, *(Encrypt(key_id, b"x") for key_id in ids))
        assert len(server.asked) == 5
        await lane.close()
        await other.close()


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


async def test_halving_ends_with_the_time_of_an_operation(tmp_path: Path) -> None:
    async with scripted(tmp_path) as server, lane_to(server, operation_timeout_ms=300) as lane:
        await one(lane, Encrypt("key", b"x"))
        server.seconds = 0.1
        server.refuse_all = lambda _: (Reason.INVALID_MESSAGE, "no")
        began = time.monotonic()
        outcomes = await run(lane, *(Encrypt("key", b"x") for _ in range(64)))
        assert time.monotonic() - began < 2
        assert Fault.UNAVAILABLE in {fault(outcome) for outcome in outcomes}


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
