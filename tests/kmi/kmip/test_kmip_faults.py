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

from xkiproxy.crypto.algorithms import Algorithm, Padding
from xkiproxy.crypto.operations import (
    CiphertextFormat,
    Decrypt,
    Decrypted,
    Describe,
    Encrypt,
    Encrypted,
    Fault,
    KeyDescription,
    Operation,
    OperationError,
    Random,
    Result,
)
from xkiproxy.kmi.base import BreakReason, KmiState, LaneError
from xkiproxy.kmi.kmip import KmipLauncher, ttlv
from xkiproxy.kmi.kmip import lane as lane_module
from xkiproxy.kmi.kmip.lane import KmipLane
from xkiproxy.kmi.kmip.messages import Op, Reason, Tag
from xkiproxy.kmi.kmip.ttlv import Structure
from xkiproxy.kmi.queued import QueuedKmi
from xkiproxy.kmi.registry import open_kmi
from xkiproxy.observability.metrics import Metrics

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
        raw = Encrypt("key", b"x", format=CiphertextFormat.RAW)
        assert (await one(lane, raw)).version == 1
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


# ---- whose fault it is -------------------------------------------------------------------------


async def test_what_fails_once_is_no_wrong_ciphertext(tmp_path: Path) -> None:
    async with scripted(tmp_path) as server, lane_to(server) as lane:
        made = await one(lane, Encrypt("key", b"hello"))
        for reason in (Reason.GENERAL_FAILURE, Reason.CRYPTOGRAPHIC_FAILURE, 0):
            server.refuse = Once(Op.DECRYPT, reason=reason)
            outcomes = await run(lane, opening(made), wrong(made))
            assert isinstance(outcomes[0], Decrypted)
            assert fault(outcomes[1]) is Fault.INVALID_CIPHERTEXT
        for reason in (Reason.GENERAL_FAILURE, 0):
            server.refuse = Once(Op.ENCRYPT, reason=reason)
            assert isinstance(await one(lane, Encrypt("key", b"x")), Encrypted)
        # Its words change: it is not the ciphertext that changes them.
        answers = [Reason.GENERAL_FAILURE, None, Reason.CRYPTOGRAPHIC_FAILURE]

        def changing(operation: int, payload: Structure) -> tuple[int, str] | None:
            del payload
            reason = answers.pop(0) if operation == Op.DECRYPT else None
            return None if reason is None else (reason, "")

        server.refuse = changing
        assert fault(await one(lane, opening(made))) is Fault.UNAVAILABLE


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (Reason.AUTHENTICATION_NOT_SUCCESSFUL, Fault.UNAVAILABLE),
        (0x2A, Fault.UNAVAILABLE),
        (0x44, Fault.UNAVAILABLE),
        (0x3A, Fault.THROTTLED),
        (0x37, Fault.KEY_NOT_FOUND),
        (0x39, Fault.KEY_UNUSABLE),
        (0x3E, Fault.UNSUPPORTED),
    ],
)
async def test_reasons_are_understood(tmp_path: Path, reason: int, expected: Fault) -> None:
    async with scripted(tmp_path) as server, lane_to(server) as lane:
        made = await one(lane, Encrypt("key", b"x"))
        server.refuse = Once(Op.ENCRYPT, Op.DECRYPT, reason=reason, times=-1)
        outcomes = await run(lane, Encrypt("key", b"x"), opening(made))
        assert [fault(outcome) for outcome in outcomes] == [expected] * 2


async def test_a_server_that_draws_nothing_is_away(tmp_path: Path) -> None:
    async with scripted(tmp_path) as server, lane_to(server, random="server") as lane:
        server.refuse = Once(Op.RNG_RETRIEVE, reason=Reason.GENERAL_FAILURE)
        assert fault(await one(lane, Random(8))) is Fault.UNAVAILABLE


async def test_the_servers_words_are_for_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with scripted(tmp_path) as server, lane_to(server) as lane:
        words = "ask \x1b[31mroot about it"
        server.refuse = lambda operation, _: (
            (Reason.INVALID_FIELD, words) if operation == Op.ENCRYPT else None
        )
        operation = Encrypt("key", bytes(16), Algorithm.AES_CBC, Padding.NONE)
        outcome = await one(lane, operation)
        assert fault(outcome) is Fault.UNSUPPORTED
        assert "root" not in str(outcome)
        assert "without padding: ENCRYPT: ask \\x1b[31mroot about it" in caplog.text


@pytest.mark.parametrize("operation", [Op.LOCATE, Op.GET_ATTRIBUTES])
async def test_a_server_that_cannot_look_up_keys_is_away(tmp_path: Path, operation: Op) -> None:
    async with scripted(tmp_path) as server, lane_to(server) as lane:
        for reason in (Reason.GENERAL_FAILURE, Reason.INTERNAL_SERVER_ERROR):
            server.refuse = Once(operation, reason=reason, times=-1)
            assert fault(await one(lane, Encrypt("key", b"x"))) is Fault.UNAVAILABLE
        server.refuse = Once(operation, reason=Reason.SERVER_LIMIT_EXCEEDED, times=-1)
        assert fault(await one(lane, Encrypt("key", b"x"))) is Fault.THROTTLED


async def test_a_server_at_which_no_key_works_is_away(tmp_path: Path) -> None:
    """So that another KMI is asked; with a probe key it is not connected either."""
    objects = {"1": Object(("key",)), "2": Object(("probe",))}
    async with scripted(tmp_path, objects=objects) as server:
        kmi = open_kmi(server.settings(probe_key="probe"), Metrics())
        assert isinstance(kmi, QueuedKmi)
        kmi.start()
        await kmi.check()
        assert kmi.state is KmiState.CONNECTED
        made = await kmi.submit(Encrypt("key", b"x"), time.monotonic() + 5)
        assert isinstance(made, Encrypted)
        server.refuse = Once(Op.ENCRYPT, Op.DECRYPT, reason=Reason.GENERAL_FAILURE, times=-1)
        for operation in (Encrypt("key", b"x"), opening(made)):
            with pytest.raises(OperationError) as caught:
                await kmi.submit(operation, time.monotonic() + 5)
            assert caught.value.fault is Fault.UNAVAILABLE
        await kmi.check()
        await asyncio.sleep(0.3)
        assert kmi.state is KmiState.DISCONNECTED
        assert "probe_key probe: ENCRYPT: the backend is being failed over" in kmi.error
        server.refuse = Once(reason=0)
        deadline = time.monotonic() + 10
        while kmi.state is not KmiState.CONNECTED:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        # It says that it is asked too much: so it serves.
        server.refuse = Once(Op.ENCRYPT, reason=Reason.SERVER_LIMIT_EXCEEDED, times=-1)
        await kmi.check()
        await asyncio.sleep(0.1)
        assert kmi.state is KmiState.CONNECTED
        await kmi.close()


async def test_a_probe_key_that_is_not_there_is_named(tmp_path: Path) -> None:
    async with scripted(tmp_path) as server:
        with pytest.raises(LaneError) as caught:
            await KmipLauncher(server.settings(probe_key="none")).launch(0)
        assert caught.value.reason is BreakReason.START
        assert caught.value.message == f"localhost:{server.port}: probe_key none: it is not there"


@pytest.mark.parametrize("reason", [Reason.CRYPTOGRAPHIC_FAILURE, Reason.GENERAL_FAILURE])
@pytest.mark.parametrize("stand_in", ["", "newest", "probe"])
async def test_a_wrong_ciphertext_under_a_key_that_only_decrypts(
    tmp_path: Path, stand_in: str, reason: int
) -> None:
    """Nothing can show that the key works but another; Cryptographic Failure needs none."""
    objects = {"1": Object(("key",), mask=8), "p": Object(("probe",))}
    if stand_in == "newest":
        objects["2"] = Object(("key#2",))
    changes = {"probe_key": "probe"} if stand_in == "probe" else {}
    async with scripted(tmp_path, objects=objects) as server, lane_to(server, **changes) as lane:

        def refuse(operation: int, payload: Structure) -> tuple[int, str] | None:
            is_it = operation == Op.DECRYPT and payload.text(Tag.UNIQUE_IDENTIFIER) == "1"
            return (reason, "it cannot be opened") if is_it else None

        server.refuse = refuse
        outcome = await one(lane, Decrypt("key", bytes(40), bytes(12), 1))
    is_certain = stand_in or reason == Reason.CRYPTOGRAPHIC_FAILURE
    assert fault(outcome) is (Fault.INVALID_CIPHERTEXT if is_certain else Fault.UNAVAILABLE)


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


# ---- the server's IVs --------------------------------------------------------------------------


async def test_the_server_makes_ivs(tmp_path: Path) -> None:
    async with scripted(tmp_path) as server, lane_to(server, iv="server", probe_key="key") as lane:
        made = await one(lane, Encrypt("key", b"x", aad=b"a"))
        assert made.iv == bytes(range(12))
        opened = Decrypt("key", made.ciphertext, made.iv, 1, aad=b"a")
        assert (await one(lane, opened)).plaintext == b"x"
        assert fault(await one(lane, wrong(made))) is Fault.INVALID_CIPHERTEXT


# ---- starts that are broken off ------------------------------------------------------------------


async def given_up(server: Scripted, starting: asyncio.Task[KmipLane]) -> None:
    """Break off a start; the server must see the end of its connection."""
    assert not starting.done()
    starting.cancel()
    await asyncio.wait({starting}, timeout=10)
    assert starting.cancelled()
    await closed(server)


async def closed(server: Scripted) -> None:
    async with asyncio.timeout(10):
        while server.open:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "operation", [Op.DISCOVER_VERSIONS, Op.QUERY, Op.LOCATE, Op.GET_ATTRIBUTES, Op.ENCRYPT]
)
async def test_a_start_that_is_broken_off_leaves_no_connection(
    tmp_path: Path, operation: Op
) -> None:
    def stall(asked: int, payload: Structure) -> None:
        if asked == operation:
            server.seconds = 1.0

    async with scripted(tmp_path) as server:
        server.refuse = stall
        launcher = KmipLauncher(server.settings(probe_key="key"))
        starting = asyncio.create_task(launcher.launch(0))
        async with asyncio.timeout(10):
            while not server.count(operation):
                await asyncio.sleep(0.01)
        await given_up(server, starting)


async def test_nor_does_one_that_is_broken_off_between_two_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = asyncio.Event()

    async def hang(*arguments: object) -> None:
        """Stands for the moment at which no message is on its way."""
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(lane_module, "find_key", hang)
    async with scripted(tmp_path) as server:
        starting = asyncio.create_task(KmipLauncher(server.settings(probe_key="key")).launch(0))
        await asyncio.wait_for(reached.wait(), 10)
        assert server.open == 1
        await given_up(server, starting)


async def test_nor_does_one_whose_probe_key_is_not_there(tmp_path: Path) -> None:
    async with scripted(tmp_path) as server:
        with pytest.raises(LaneError, match="probe_key missing: it is not there"):
            await KmipLauncher(server.settings(probe_key="missing")).launch(0)
        await closed(server)
