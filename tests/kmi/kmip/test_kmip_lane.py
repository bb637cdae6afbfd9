"""Lanes and key managers against PyKMIP's server."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from kmip.core import enums
from kmip.pie.client import ProxyKmipClient
from kmip.pie.objects import SymmetricKey
from pykmip import PyKmip, issue

from xkiproxy.crypto.algorithms import Algorithm, KeySpec, Padding, Usage
from xkiproxy.crypto.envelope import authenticated_data
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
    RandomBytes,
    Result,
)
from xkiproxy.kmi.base import BreakReason, KeyManagerError, KmiState, LaneError
from xkiproxy.kmi.kmip import KmipKeyManager, KmipLauncher
from xkiproxy.kmi.kmip import connection as connection_module
from xkiproxy.kmi.kmip import manager as manager_module
from xkiproxy.kmi.kmip.lane import KmipLane
from xkiproxy.kmi.metrics import KmiMetrics
from xkiproxy.kmi.queued import QueuedKmi
from xkiproxy.observability.metrics import Metrics

AAD = b"account=1"


@pytest.fixture
def manager(server: PyKmip) -> Iterator[KmipKeyManager]:
    made = KmipKeyManager(server.settings())
    yield made
    made.close()


@asynccontextmanager
async def lane_to(server: PyKmip, **changes: Any) -> AsyncIterator[KmipLane]:
    lane = await KmipLauncher(server.settings(**changes)).launch(0)
    try:
        yield lane
    finally:
        await lane.close()


async def run(
    lane: KmipLane, *batch: Operation, epoch: int = 0
) -> Sequence[Result | OperationError]:
    found: dict[int, Result | OperationError] = {}
    await lane.execute(batch, epoch, found.__setitem__)
    assert sorted(found) == list(range(len(batch)))
    return [found[index] for index in range(len(batch))]


async def run_one(lane: KmipLane, operation: Operation, epoch: int = 0) -> Any:
    (outcome,) = await run(lane, operation, epoch=epoch)
    return outcome


def fault(outcome: object) -> Fault:
    assert isinstance(outcome, OperationError), outcome
    return outcome.fault


def opening(key_id: str, made: Encrypted, **changes: Any) -> Decrypt:
    fields: dict[str, Any] = {
        "key_id": key_id, "ciphertext": made.ciphertext, "iv": made.iv, "version": made.version,
        "algorithm": made.algorithm, "padding": made.padding, **changes,
    }  # fmt: skip
    return Decrypt(**fields)


def client(server: PyKmip) -> ProxyKmipClient:
    """Other people's client, for what the proxy does not do."""
    return ProxyKmipClient(
        hostname="localhost", port=server.port, cert=str(server.folder / "client.crt"),
        key=str(server.folder / "client.key"), ca=str(server.folder / "ca.crt"),
        ssl_version="PROTOCOL_TLSv1_2", username=None, password=None,
    )  # fmt: skip


def new_name() -> str:
    return f"key-{uuid.uuid4().hex[:8]}"


@pytest.mark.parametrize("version", ["1.4", "2.0"])
@pytest.mark.parametrize("spec", [KeySpec.AES_128, KeySpec.AES_192, KeySpec.AES_256])
async def test_every_mode_opens_what_it_closed(server: PyKmip, spec: KeySpec, version: str) -> None:
    name = new_name()
    await in_thread_create(server, name, spec, version)
    async with lane_to(server, version=version) as lane:
        for plaintext in (b"x", b"0123456789abcdef", os.urandom(4096)):
            made = await run_one(lane, Encrypt(name, plaintext, aad=AAD))
            assert isinstance(made, Encrypted)
            assert (made.version, made.algorithm, len(made.iv)) == (1, Algorithm.AES_GCM, 12)
            opened = await run_one(lane, opening(name, made, aad=AAD))
            assert opened == Decrypted(plaintext, 1, Algorithm.AES_GCM, None)
            for algorithm in (Algorithm.AES_CBC, Algorithm.AES_ECB):
                made = await run_one(lane, Encrypt(name, plaintext, algorithm))
                opened = await run_one(lane, opening(name, made))
                assert opened == Decrypted(plaintext, 1, algorithm, Padding.PKCS7)
        for algorithm in (Algorithm.AES_CBC, Algorithm.AES_ECB):
            for block in (os.urandom(32), b""):  # PyKMIP always pads, and is asked so that it fits
                made = await run_one(lane, Encrypt(name, block, algorithm, Padding.NONE))
                assert len(made.ciphertext) == len(block)
                opened = await run_one(lane, opening(name, made))
                assert opened == Decrypted(block, 1, algorithm, Padding.NONE)


async def in_thread_create(
    server: PyKmip, name: str, spec: KeySpec = KeySpec.AES_256, version: str | None = None
) -> None:
    def create() -> None:
        manager = KmipKeyManager(server.settings(version=version))
        try:
            manager.create(name, spec)
        finally:
            manager.close()

    await asyncio.to_thread(create)


async def test_what_it_closes_is_gcm_under_the_envelopes_data(server: PyKmip) -> None:
    name = new_name()
    await in_thread_create(server, name)
    with client(server) as other:
        (uid,) = other.locate(attributes=[_name(name)])
        material = other.get(uid).value
    async with lane_to(server) as lane:
        made = await run_one(lane, Encrypt(name, b"plaintext", aad=AAD))
        raw = await run_one(lane, Encrypt(name, b"raw", aad=AAD, format=CiphertextFormat.RAW))
        chosen = await run_one(lane, Encrypt(name, b"p", iv=bytes(12)))
    gcm = AESGCM(material)
    assert gcm.decrypt(made.iv, made.ciphertext, authenticated_data(AAD, 1)) == b"plaintext"
    assert gcm.decrypt(raw.iv, raw.ciphertext, AAD) == b"raw"
    assert gcm.decrypt(bytes(12), chosen.ciphertext, authenticated_data(b"", 1)) == b"p"


def _name(name: str) -> Any:
    from kmip.core.factories.attributes import AttributeFactory

    return AttributeFactory().create_attribute(enums.AttributeType.NAME, name)


async def test_whatever_is_wrong_with_a_ciphertext_is_the_same_error(server: PyKmip) -> None:
    name = new_name()
    await in_thread_create(server, name)
    async with lane_to(server) as lane:
        made = await run_one(lane, Encrypt(name, b"plaintext", aad=AAD))
        good = opening(name, made, aad=AAD)
        flipped = bytes([made.ciphertext[0] ^ 1]) + made.ciphertext[1:]
        outcomes = await run(
            lane,
            good,
            opening(name, made, aad=AAD, ciphertext=flipped),
            opening(name, made, aad=AAD, ciphertext=made.ciphertext[:-1] + b"\0"),
            opening(name, made, aad=b"another"),
            opening(name, made, aad=AAD, iv=bytes(12)),
            opening(name, made, aad=AAD, version=2),
            good,
        )
    assert [type(outcome) for outcome in (outcomes[0], outcomes[-1])] == [Decrypted] * 2
    assert {fault(outcome) for outcome in outcomes[1:-1]} == {Fault.INVALID_CIPHERTEXT}
    assert len({str(outcome) for outcome in outcomes[1:-1]}) == 1


async def test_each_operation_of_a_batch_stands_alone(server: PyKmip) -> None:
    one, two = new_name(), new_name()
    await in_thread_create(server, one)
    await in_thread_create(server, two, KeySpec.AES_128)
    async with lane_to(server) as lane:
        outcomes = await run(
            lane,
            Encrypt(one, b"1"),
            Encrypt("there-is-none", b"2"),
            Random(33),
            Describe(two),
            Encrypt(two, b"3"),
            Describe("there-is-none"),
        )
        assert fault(outcomes[1]) is fault(outcomes[5]) is Fault.KEY_NOT_FOUND
        assert isinstance(outcomes[2], RandomBytes)
        assert len(outcomes[2].data) == 33
        assert isinstance(outcomes[3], KeyDescription)
        assert (outcomes[3].spec, outcomes[3].usage) == (KeySpec.AES_128, Usage.BOTH)
        assert time.time() - 600 < (outcomes[3].created or 0) < time.time() + 600
        for key_id, outcome, text in ((one, outcomes[0], b"1"), (two, outcomes[4], b"3")):
            assert isinstance(outcome, Encrypted)
            opened = await run_one(lane, opening(key_id, outcome))
            assert opened.plaintext == text


def test_keys_are_made_listed_rotated_and_destroyed(
    server: PyKmip, manager: KmipKeyManager
) -> None:
    name = new_name()
    assert manager.get(name) is None
    made = manager.create(name, KeySpec.AES_256)
    assert (made.key_id, made.spec, made.versions, made.problem) == (
        name,
        KeySpec.AES_256,
        (1,),
        "",
    )
    for version in range(2, 7):  # more than are looked for at once
        assert manager.rotate(name).version == version
    assert manager.get(name) in manager.list()
    assert manager.list()[0].key_id <= manager.list()[-1].key_id
    manager.destroy(name)
    assert manager.get(name) is None
    assert name not in {info.key_id for info in manager.list()}
    for call in (manager.rotate, manager.destroy):
        with pytest.raises(KeyManagerError, match=f"KMI kmip: key {name} is not there"):
            call(name)
    with pytest.raises(KeyManagerError, match="SM4"):
        manager.create(name, KeySpec.SM4)
    with pytest.raises(KeyManagerError, match="must be 1 to 128"):
        manager.create("a#2", KeySpec.AES_256)


async def test_older_versions_go_on_decrypting(server: PyKmip) -> None:
    name = new_name()
    await in_thread_create(server, name)
    async with lane_to(server) as lane, lane_to(server) as other:
        first = await run_one(lane, Encrypt(name, b"first"))
        assert (await run_one(other, Describe(name))).version == 1
        manager = await asyncio.to_thread(KmipKeyManager, server.settings())
        await asyncio.to_thread(manager.rotate, name)
        second = await run_one(lane, Encrypt(name, b"second"), epoch=1)
        assert (first.version, second.version) == (1, 2)
        # The other has not been told, and meets the new version in a ciphertext.
        opened = await run(other, opening(name, first), opening(name, second))
        assert [one.plaintext for one in opened if isinstance(one, Decrypted)] == [
            b"first",
            b"second",
        ]
        swapped = opening(name, first, version=2)
        assert fault(await run_one(lane, swapped, epoch=1)) is Fault.INVALID_CIPHERTEXT
        raw = Encrypt(name, b"raw", format=CiphertextFormat.RAW)
        assert fault(await run_one(lane, raw, epoch=1)) is Fault.UNSUPPORTED
        await asyncio.to_thread(manager.destroy, name)
        assert fault(await run_one(lane, Describe(name), epoch=2)) is Fault.KEY_NOT_FOUND
        await asyncio.to_thread(manager.close)


async def test_the_states_of_keys(server: PyKmip) -> None:
    masks = [enums.CryptographicUsageMask.ENCRYPT, enums.CryptographicUsageMask.DECRYPT]
    names = {state: new_name() for state in ("new", "old", "compromised", "decrypts")}
    with client(server) as other:
        uids = {
            state: other.register(
                SymmetricKey(
                    enums.CryptographicAlgorithm.AES, 256, os.urandom(32), name=name,
                    masks=masks[1:] if state == "decrypts" else masks,
                )
            )
            for state, name in names.items()
        }  # fmt: skip
        for state in ("old", "compromised", "decrypts"):
            other.activate(uids[state])
        async with lane_to(server) as lane:
            made = await run_one(lane, Encrypt(names["old"], b"x"))
            other.revoke(enums.RevocationReasonCode.CESSATION_OF_OPERATION, uids["old"])
            other.revoke(enums.RevocationReasonCode.KEY_COMPROMISE, uids["compromised"])
            refused = await run(lane, *(Encrypt(name, b"x") for name in names.values()), epoch=1)
            assert {fault(outcome) for outcome in refused} == {Fault.KEY_UNUSABLE}
            words = [str(outcome) for outcome in refused]
            assert "is not activated yet" in words[0]
            assert "is deactivated" in words[1]
            assert "is marked as compromised" in words[2]
            assert "usage mask" in words[3]
            # The specification lets a deactivated key decrypt; this server does not.
            outcome = await run_one(lane, opening(names["old"], made), epoch=1)
            assert fault(outcome) is Fault.KEY_UNUSABLE
            assert "The key manager does not permit it." in str(outcome)
            other.activate(uids["new"])  # nobody tells the lane
            assert isinstance(await run_one(lane, Encrypt(names["new"], b"x"), epoch=1), Encrypted)


async def test_a_name_used_twice_is_no_key(
    server: PyKmip, caplog: pytest.LogCaptureFixture
) -> None:
    name = new_name()
    with client(server) as other:
        for _ in range(2):
            other.create(enums.CryptographicAlgorithm.AES, 256, name=name)
    async with lane_to(server) as lane:
        outcomes = await run(lane, Encrypt(name, b"x"), Encrypt(name, b"x"))
    assert {fault(outcome) for outcome in outcomes} == {Fault.KEY_UNUSABLE}
    # The server's side is for administrators, and told once.
    assert caplog.text.count(f"KMI kmip: key {name}: two keys have the name {name}") == 1
    assert "two keys" not in str(outcomes)


# ---- what does not work at the start -----------------------------------------------------------


async def start_error(server: PyKmip, **changes: Any) -> str:
    with pytest.raises(LaneError) as caught:
        await KmipLauncher(server.settings(**changes)).launch(0)
    assert caught.value.reason is BreakReason.START
    assert "\n" not in caught.value.message
    return caught.value.message


async def test_each_mistake_is_named_in_a_line(server: PyKmip, tmp_path: Path) -> None:
    strange = issue(tmp_path, "other-ca")
    issue(tmp_path, "stranger", strange, client=True)
    tls = server.settings().tls
    where = f"localhost:{server.port}: "

    def with_tls(**changes: Any) -> dict[str, Any]:
        return {"tls": tls.model_copy(update=changes)}

    wrong_ca = await start_error(server, **with_tls(ca=tmp_path / "other-ca.crt"))
    assert wrong_ca.startswith(where + "its certificate is refused: ")
    name = await start_error(server, **with_tls(server_name="kms.example.com"))
    assert "its certificate is refused: Hostname mismatch" in name
    source = type(tls.private_key)(file=tmp_path / "stranger.key")
    unknown = await start_error(
        server, **with_tls(certificate=tmp_path / "stranger.crt", private_key=source)
    )
    assert unknown.startswith(where)
    assert "certificate" in unknown or "unknown ca" in unknown
    key = await start_error(server, **with_tls(private_key=source))
    assert "is not the key of" in key
    missing = await start_error(server, **with_tls(ca=tmp_path / "none.crt"))
    assert "none.crt: No such file" in missing
    random = await start_error(server, random="server")
    assert 'lacks RNG_RETRIEVE: random = "generator"' in random
    spoken = await start_error(server, version="2.1")
    assert where in spoken
    closed = await start_error(server, address="localhost:1")
    assert closed == "localhost:1: Connection refused"


@pytest.mark.parametrize(
    ("patch", "complaint"),
    [
        (
            "from kmip.core.messages import payloads as p; from kmip.core import enums as e\n"
            "old = p.QueryResponsePayload.__init__\n"
            "def new(self, operations=None, *rest, **more):\n"
            "    kept = [o for o in operations or [] if o not in (e.Operation.ENCRYPT,)]\n"
            "    old(self, kept, *rest, **more)\n"
            "p.QueryResponsePayload.__init__ = new",
            "the server lacks ENCRYPT: it only stores keys",
        ),
        (
            "from kmip.services.server.engine import KmipEngine as E\n"
            "old = E.__init__\n"
            "def new(self, *a, **k):\n"
            "    old(self, *a, **k)\n"
            "    self._protocol_versions = self._protocol_versions[-2:]\n"
            "E.__init__ = new",
            "KMIP",
        ),
    ],
    ids=["no encrypt", "old versions only"],
)
async def test_a_server_that_lacks_something(tmp_path: Path, patch: str, complaint: str) -> None:
    server = PyKmip(tmp_path / "server", patch)
    server.start()
    try:
        assert complaint in await start_error(server)
    finally:
        server.stop()


# ---- what goes wrong later ---------------------------------------------------------------------


async def test_a_server_that_stops_stalls_and_returns(tmp_path: Path) -> None:
    """With a dispatcher: what is asked meanwhile fails clearly, and later all goes on."""
    server = PyKmip(tmp_path / "server")
    server.start()
    name = new_name()
    await in_thread_create(server, name)
    settings = server.settings(lanes=2, operation_timeout_ms=500, connect_timeout_seconds=1)
    metrics = Metrics()
    kmi = QueuedKmi(
        "kmip", "kmip", KmipLauncher(settings), KmiMetrics(metrics, "kmip"),
        lanes=2, queue_size=100, max_batch=64,
    )  # fmt: skip
    kmi.start()
    try:
        await kmi.check()
        assert kmi.state is KmiState.CONNECTED
        made = await kmi.submit(Encrypt(name, b"x"), time.monotonic() + 5)
        assert isinstance(made, Encrypted)
        assert server.process is not None
        os.kill(server.process.pid, signal.SIGSTOP)
        with pytest.raises(OperationError) as caught:
            await kmi.submit(Encrypt(name, b"x"), time.monotonic() + 3)
        assert caught.value.fault in (Fault.UNAVAILABLE, Fault.DEADLINE_EXCEEDED)
        os.kill(server.process.pid, signal.SIGCONT)
        await until_served(kmi, name)
        server.stop()
        with pytest.raises(OperationError) as caught:
            await kmi.submit(Encrypt(name, b"x"), time.monotonic() + 5)
        assert caught.value.fault is Fault.UNAVAILABLE
        server.start()
        await until_served(kmi, name)
        opened = await kmi.submit(opening(name, made), time.monotonic() + 5)
        assert isinstance(opened, Decrypted)
    finally:
        await kmi.close()
        server.stop()


async def until_served(kmi: QueuedKmi, name: str) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            await kmi.submit(Encrypt(name, b"x"), time.monotonic() + 5)
        except OperationError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        else:
            return


async def test_a_server_that_speaks_something_else(tmp_path: Path) -> None:
    server = PyKmip(tmp_path / "server")  # its certificates only
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(server.folder / "server.crt", server.folder / "server.key")
    answers = [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x42\x00\x7b\x01\xff\xff\xff\xff", b""]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answers.pop(0))
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", server.port, ssl=context)
    assert "bytes" in await start_error(server)
    assert "4294967303 bytes" in await start_error(server)
    assert "does it know the client certificate?" in await start_error(server)
    listener.close()


# ---- versions that are not there, or not ready -------------------------------------------------


async def destroy_version(server: PyKmip, name: str) -> None:
    with client(server) as other:
        (uid,) = other.locate(attributes=[_name(name)])
        other.revoke(enums.RevocationReasonCode.CESSATION_OF_OPERATION, uid)
        other.destroy(uid)


@pytest.mark.parametrize("version", ["1.4", "2.0"])
async def test_a_version_that_is_destroyed_hides_no_other(server: PyKmip, version: str) -> None:
    name = new_name()
    manager = await asyncio.to_thread(KmipKeyManager, server.settings(version=version))
    await asyncio.to_thread(manager.create, name, KeySpec.AES_256)
    for _ in range(5):
        await asyncio.to_thread(manager.rotate, name)
    async with lane_to(server, version=version) as lane:
        made = await run_one(lane, Encrypt(name, b"x"))
        assert made.version == 6
        for gone in ((name + "#2",), (name, f"{name}#3", f"{name}#4")):
            for one in gone:
                await destroy_version(server, one)
            assert (await run_one(lane, opening(name, made), epoch=len(gone))).plaintext == b"x"
            assert (await run_one(lane, Encrypt(name, b"x"), epoch=len(gone))).version == 6
    assert (await asyncio.to_thread(manager.rotate, name)).versions == (5, 6, 7)
    await asyncio.to_thread(manager.destroy, name)
    with client(server) as other:
        for number in range(5, 8):
            assert other.locate(attributes=[_name(f"{name}#{number}")]) == []
    await asyncio.to_thread(manager.close)


def test_what_another_has_not_activated_is_passed_by(
    server: PyKmip, manager: KmipKeyManager
) -> None:
    """Create and Activate are two messages: what ends between them leaves a Pre-Active key."""
    name = new_name()
    manager.create(name, KeySpec.AES_256)
    with client(server) as other:
        other.create(enums.CryptographicAlgorithm.AES, 256, name=f"{name}#2")
    info = manager.get(name)
    assert info is not None
    assert (info.versions, info.problem) == ((1,), "")
    assert manager.rotate(name).versions == (1, 3)
    manager.destroy(name)
    with client(server) as other:
        assert other.locate(attributes=[_name(f"{name}#2")]) == []


def test_nothing_is_said_to_be_done_that_is_not(
    server: PyKmip, manager: KmipKeyManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = new_name()
    manager.create(name, KeySpec.AES_256)
    with pytest.raises(KeyManagerError, match=f"key {name} is there already"):
        manager.create(name, KeySpec.AES_256)
    with client(server) as other:  # somebody is faster, after the key was looked up
        request = manager_module.messages.create

        def late(*arguments: Any) -> Any:
            other.create(enums.CryptographicAlgorithm.AES, 256, name=f"{name}#2")
            monkeypatch.setattr(manager_module.messages, "create", request)
            return request(*arguments)

        monkeypatch.setattr(manager_module.messages, "create", late)
        with pytest.raises(KeyManagerError, match=f"two keys have the name {name}#2"):
            manager.rotate(name)
        assert len(other.locate(attributes=[_name(f"{name}#2")])) == 1
    assert manager.rotate(name).versions == (1, 3)

    async def nothing(*_: Any) -> None:
        pass

    monkeypatch.setattr(manager, "_destroy", nothing)
    with pytest.raises(KeyManagerError, match=f"of key {name} are left: {name}, {name}#2"):
        manager.destroy(name)


def test_a_new_key_is_sensitive(
    server: PyKmip, manager: KmipKeyManager, caplog: pytest.LogCaptureFixture
) -> None:
    name = new_name()
    manager.create(name, KeySpec.AES_256)
    with client(server) as other:
        other.kmip_version = enums.KMIPVersion.KMIP_1_4
        (uid,) = other.locate(attributes=[_name(name)])
        _, (sensitive,) = other.get_attributes(uid, ["Sensitive"])
    assert sensitive.attribute_value.value is True
    assert f"key {name}: the server takes no Extractable: see that its policy" in caplog.text


# ---- what is larger than a message may be ------------------------------------------------------


async def test_a_message_that_is_too_large_is_divided(
    server: PyKmip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyKMIP takes 1 MiB (and its time for it); messages are kept smaller, but servers differ."""
    monkeypatch.setattr(connection_module, "_MAX_BATCH_SIZE", 1 << 30)
    big, small = new_name(), new_name()
    await in_thread_create(server, big)
    await in_thread_create(server, small)
    batch = [Encrypt(big, bytes(46_000))] * 24 + [Encrypt(small, b"x")] * 3
    async with lane_to(server, operation_timeout_ms=60_000) as lane:
        outcomes = await run(lane, *batch)
    assert {type(outcome) for outcome in outcomes} == {Encrypted}


async def test_a_wrong_ciphertext_under_a_key_that_only_decrypts(server: PyKmip) -> None:
    only, probe = new_name(), new_name()
    await in_thread_create(server, probe)
    with client(server) as other:
        key = SymmetricKey(
            enums.CryptographicAlgorithm.AES, 256, os.urandom(32), name=only,
            masks=[enums.CryptographicUsageMask.DECRYPT],
        )  # fmt: skip
        other.activate(other.register(key))
    async with lane_to(server, probe_key=probe) as lane:
        outcome = await run_one(lane, Decrypt(only, bytes(40), bytes(12), 1))
    assert fault(outcome) is Fault.INVALID_CIPHERTEXT


async def test_pykmip_makes_ivs_of_another_size(
    server: PyKmip, caplog: pytest.LogCaptureFixture
) -> None:
    """It draws 16 bytes, whatever it is asked for: that is said, and nothing comes of it."""
    name = new_name()
    await in_thread_create(server, name)
    async with lane_to(server, iv="server") as lane:
        assert fault(await run_one(lane, Encrypt(name, b"x"))) is Fault.INTERNAL
    assert "it makes IVs of 16 bytes; set iv to generator" in caplog.text
    assert "iv" in await start_error(server, iv="server", probe_key=name)
