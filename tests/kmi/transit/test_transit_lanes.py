"""The lanes of Transit against a strict server over TLS, through the dispatcher."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import replace

import pytest
from conftest import StartKmi
from Cryptodome.Cipher import AES
from hsm import bound, decrypt, encrypt, eventually, opening, restarts, submit
from ports import free_ports
from transit import TransitSite
from transit_server import TransitServer

from xkiproxy.crypto.algorithms import Algorithm, KeySpec, Padding, Usage
from xkiproxy.crypto.operations import (
    CiphertextFormat,
    Decrypt,
    Decrypted,
    Describe,
    Encrypt,
    Encrypted,
    Fault,
    KeyDescription,
    OperationError,
    Random,
    RandomBytes,
)
from xkiproxy.kmi.base import KmiState
from xkiproxy.kmi.queued import QueuedKmi
from xkiproxy.kmi.registry import open_kmi
from xkiproxy.observability.metrics import Metrics

RAW = CiphertextFormat.RAW


@pytest.mark.parametrize("kind", ["aes256-gcm96", "aes128-gcm96"])
@pytest.mark.parametrize("form", list(CiphertextFormat))
async def test_what_is_encrypted_is_plain_gcm(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi, kind: str, form: CiphertextFormat
) -> None:
    """PyCryptodome opens it with the key's material, and Transit opens what PyCryptodome makes."""
    material = server.add_key("k", kind).versions[1]
    kmi = await start_kmi(site.settings())
    for size in (0, 1, 15, 16, 17, 5000):
        for aad in (b"", b"an aad"):
            operation = Encrypt("k", os.urandom(size), aad=aad, format=form)
            made = await encrypt(kmi, operation)
            assert (made.version, made.algorithm, made.padding) == (1, Algorithm.AES_GCM, None)
            cipher = AES.new(material, AES.MODE_GCM, nonce=made.iv)
            cipher.update(bound(operation, 1))
            text, tag = made.ciphertext[:-16], made.ciphertext[-16:]
            assert cipher.decrypt_and_verify(text, tag) == operation.plaintext

            cipher = AES.new(material, AES.MODE_GCM, nonce=bytes(12))
            cipher.update(bound(operation, 1))
            foreign = b"".join(cipher.encrypt_and_digest(operation.plaintext))
            asked = replace(opening(operation, made), ciphertext=foreign, iv=bytes(12))
            opened = await decrypt(kmi, asked)
            assert opened == Decrypted(operation.plaintext, 1, Algorithm.AES_GCM, None)


async def test_a_batch_is_one_request_for_each_key_and_kind(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    server.add_key("other", "aes128-gcm96")
    kmi = await start_kmi(site.settings())
    made = [await encrypt(kmi, Encrypt(name, b"x")) for name in ("key", "other")]
    server.requests.clear()
    encrypts = [Encrypt(name, os.urandom(20)) for name in ("key", "other") for _ in range(10)]
    decrypts = [opening(Encrypt(n, b"x"), m) for n, m in zip(("key", "other"), made, strict=True)]
    randoms = [Random(n) for n in (1, 7, 32)]
    results = await asyncio.gather(
        *(submit(kmi, operation) for operation in [*encrypts, *decrypts, *randoms])
    )
    asked = sorted((path, len(body.get("batch_input", ""))) for _, path, body in server.requests)
    assert asked == [
        ("transit/decrypt/key", 1),
        ("transit/decrypt/other", 1),
        ("transit/encrypt/key", 10),
        ("transit/encrypt/other", 10),
        ("transit/random", 0),
    ]
    for operation, result in zip(encrypts, results[:20], strict=True):
        assert isinstance(result, Encrypted)
        opened = await decrypt(kmi, opening(operation, result))
        assert opened.plaintext == operation.plaintext
    assert all(isinstance(result, Decrypted) for result in results[20:22])
    drawn = [result.data for result in results[22:] if isinstance(result, RandomBytes)]
    assert [len(data) for data in drawn] == [1, 7, 32]
    assert server.asked("transit/random") == [{"bytes": 40, "format": "base64"}]


async def test_one_wrong_item_fails_alone(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    kmi = await start_kmi(site.settings())
    operation = Encrypt("key", b"a plaintext", aad=b"aad")
    right = opening(operation, await encrypt(kmi, operation))
    flipped = right.ciphertext[:-1] + bytes([right.ciphertext[-1] ^ 1])
    wrong = [
        replace(right, ciphertext=flipped),
        replace(right, aad=b"another"),
        replace(right, iv=bytes(12)),
        replace(right, version=2),
        replace(right, version=2**32 - 1),
        replace(right, ciphertext=bytes(16)),
        replace(right, format=RAW, version=None),
    ]
    batch = [right, *wrong, right]
    server.requests.clear()
    outcomes = await asyncio.gather(*(submit(kmi, o) for o in batch), return_exceptions=True)
    assert [len(body["batch_input"]) for body in server.asked("transit/decrypt")] == [len(batch)]
    assert outcomes[0] == outcomes[-1] == Decrypted(b"a plaintext", 1, Algorithm.AES_GCM, None)
    for outcome in outcomes[1:-1]:
        assert isinstance(outcome, OperationError)
        assert outcome.fault is Fault.INVALID_CIPHERTEXT
    assert kmi.state is KmiState.CONNECTED


async def test_what_transit_cannot_do_is_refused_without_asking_it(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    kmi = await start_kmi(site.settings())
    await encrypt(kmi, Encrypt("key", b"x"))
    server.requests.clear()
    for operation, words in (
        (Encrypt("key", b"x", iv=bytes(12)), "draws every IV itself"),
        (Encrypt("key", b"x", Algorithm.AES_CBC, Padding.PKCS7), "AES_GCM, not AES_CBC"),
        (Encrypt("key", b"x", Algorithm.AES_ECB, Padding.PKCS7), "AES_GCM, not AES_ECB"),
        (Encrypt("key", b"x", Algorithm.SM4_GCM), "AES_GCM, not SM4_GCM"),
        (Decrypt("key", bytes(16), bytes(16), 1, Algorithm.AES_CBC), "AES_GCM, not AES_CBC"),
    ):
        with pytest.raises(OperationError, match=words) as caught:
            await submit(kmi, operation)
        assert caught.value.fault is Fault.UNSUPPORTED
    assert server.requests == []


async def test_keys_that_cannot_be_used(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    server.add_key("signs", "ed25519")
    server.add_key("chacha", "chacha20-poly1305")
    server.add_key("derived", derived=True)
    kmi = await start_kmi(site.settings())
    for name, fault in (
        ("signs", Fault.KEY_UNUSABLE),
        ("chacha", Fault.KEY_UNUSABLE),
        ("derived", Fault.KEY_UNUSABLE),
        ("missing", Fault.KEY_NOT_FOUND),
        ("-no-name-", Fault.KEY_NOT_FOUND),
    ):
        for operation in (
            Encrypt(name, b"x"),
            Decrypt(name, bytes(16), bytes(12), 1),
            Describe(name),
        ):
            with pytest.raises(OperationError) as caught:
                await submit(kmi, operation)
            assert (name, caught.value.fault) == (name, fault)
    assert "missing" not in server.keys


async def test_describe(site: TransitSite, server: TransitServer, start_kmi: StartKmi) -> None:
    server.add_key("small", "aes128-gcm96").rotate()
    kmi = await start_kmi(site.settings())
    described = await submit(kmi, Describe("small"))
    created = float(server.keys["small"].created[1])
    assert described == KeyDescription("small", KeySpec.AES_128, Usage.BOTH, 2, created)


async def test_rotation_by_another(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    """The version that is authenticated is the one that encrypts, whoever rotates whenever."""
    kmi = await start_kmi(site.settings())
    operation = Encrypt("key", b"before", aad=b"aad")
    old = await encrypt(kmi, operation)
    server.keys["key"].rotate()
    # The latest version is known for some seconds: the older one goes on encrypting, rightly.
    between = await encrypt(kmi, operation)
    kmi.refresh(True)
    new = await encrypt(kmi, operation)
    assert (old.version, between.version, new.version) == (1, 1, 2)
    for made in (old, between, new):
        assert (await decrypt(kmi, opening(operation, made))).plaintext == b"before"
    # A version that was forbidden meanwhile is noticed at once.
    server.keys["key"].rotate()
    server.keys["key"].min_encryption = 3
    assert (await encrypt(kmi, operation)).version == 3
    # Too old: forbidden by the administrator.
    server.keys["key"].min_decryption = 2
    with pytest.raises(OperationError) as caught:
        await decrypt(kmi, opening(operation, old))
    assert caught.value.fault is Fault.INVALID_CIPHERTEXT


async def test_raw_ciphertexts_end_with_the_first_rotation(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    kmi = await start_kmi(site.settings())
    operation = Encrypt("key", b"x", format=RAW)
    made = await encrypt(kmi, operation)
    assert (await decrypt(kmi, opening(operation, made))).plaintext == b"x"
    server.keys["key"].rotate()
    kmi.refresh(True)
    for again in (operation, opening(operation, made)):
        with pytest.raises(OperationError, match="rotated") as caught:
            await submit(kmi, again)
        assert caught.value.fault is Fault.UNSUPPORTED


async def test_a_key_that_is_destroyed_is_not_made_again(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    kmi = await start_kmi(site.settings())
    made = await encrypt(kmi, Encrypt("key", b"x"))
    del server.keys["key"]
    faults = []
    for operation in (Encrypt("key", b"x"), opening(Encrypt("key", b"x"), made)):
        for _ in range(2):
            with pytest.raises(OperationError) as caught:
                await submit(kmi, operation)
            faults.append(caught.value.fault)
    # The first encryption still knows the key, and the policy does not let it be made.
    assert faults == [Fault.KEY_FORBIDDEN, *[Fault.KEY_NOT_FOUND] * 3]
    assert "key" not in server.keys


async def test_connections_are_bounded_and_kept(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    for n in range(10):
        server.add_key(f"k{n}")
    kmi = await start_kmi(site.settings(lanes=4, connections=3))
    for _ in range(5):
        await asyncio.gather(*(encrypt(kmi, Encrypt(f"k{n % 10}", b"x")) for n in range(100)))
    assert len(server.connections) <= 3


async def test_a_batch_that_is_too_large_is_divided(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    kmi = await start_kmi(site.settings())
    await encrypt(kmi, Encrypt("key", b"x"))
    server.max_request_size = 20_000
    operations = [Encrypt("key", os.urandom(5_000)) for _ in range(8)]
    made = await asyncio.gather(*(encrypt(kmi, operation) for operation in operations))
    for operation, one in zip(operations, made, strict=True):
        assert (await decrypt(kmi, opening(operation, one))).plaintext == operation.plaintext
    with pytest.raises(OperationError) as caught:
        await encrypt(kmi, Encrypt("key", bytes(20_000)))
    assert (caught.value.fault, caught.value.parameter) == (Fault.INVALID_PARAMETER, "plaintext")


async def test_the_largest_batch_is_within_the_limit_of_strings(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    kmi = await start_kmi(site.settings(max_batch=128))
    await asyncio.gather(*(encrypt(kmi, Encrypt("key", b"x")) for _ in range(400)))
    assert max(len(body["batch_input"]) for body in server.asked("transit/encrypt")) == 128


async def test_a_batch_of_many_keys_at_a_slow_server_costs_no_lane(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    names = [f"key-{number}" for number in range(40)]
    for name in names:
        server.add_key(name)
    kmi = await start_kmi(site.settings(connections=4, operation_timeout_ms=600))
    server.delay = 0.1
    await asyncio.gather(*(encrypt(kmi, Encrypt(name, b"x"), 10) for name in names))
    assert restarts(kmi) == 0
    server.delay = 2.0  # and one that does not answer in time still does
    with pytest.raises(OperationError):
        await encrypt(kmi, Encrypt("key", b"x"), 1.5)
    assert restarts(kmi) >= 1


async def test_idle_connections_that_the_server_closed_are_replaced(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    kmi = await start_kmi(site.settings())
    await encrypt(kmi, Encrypt("key", b"x"))
    port = server.port
    server.stop()
    server.start(port)
    await encrypt(kmi, Encrypt("key", b"x"))
    server.cuts = 1
    await encrypt(kmi, Encrypt("key", b"x"))
    assert kmi.state is KmiState.CONNECTED


async def test_a_server_that_goes_away_and_comes_back(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    kmi = await start_kmi(site.settings(lanes=2))
    port = server.port
    server.stop()
    with pytest.raises(OperationError) as caught:
        await encrypt(kmi, Encrypt("key", b"x"))
    assert caught.value.fault is Fault.UNAVAILABLE
    await eventually(lambda: kmi.state is KmiState.DISCONNECTED)
    assert "cannot be reached: " in kmi.error
    server.start(port)
    await eventually(lambda: kmi.state is KmiState.CONNECTED)
    await encrypt(kmi, Encrypt("key", b"x"))


async def test_lanes_are_spread_over_addresses(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    """One node of two is away: the other serves."""
    away = f"https://localhost:{free_ports(1)[0]}"
    kmi = await start_kmi(site.settings(address=[away, server.address], lanes=2))
    (failure,) = await kmi.first_failures()
    assert f"{away}: cannot be reached" in failure
    await eventually(lambda: kmi.state is KmiState.CONNECTED)
    await encrypt(kmi, Encrypt("key", b"x"))


async def test_one_lane_is_enough_for_two_addresses(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    away = f"https://localhost:{free_ports(1)[0]}"
    kmi = await start_kmi(site.settings(address=[away, server.address], lanes=1))
    await eventually(lambda: kmi.state is KmiState.CONNECTED)
    await encrypt(kmi, Encrypt("key", b"x"))


async def test_an_address_that_swallows_everything_holds_nobody_up(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        address = f"https://localhost:{hole.getsockname()[1]}"
        settings = site.settings(
            address=[address, server.address], lanes=4, start_timeout_seconds=4
        )
        kmi = open_kmi(settings, Metrics())
        assert isinstance(kmi, QueuedKmi)
        kmi.start()
        try:
            await eventually(lambda: kmi.state is KmiState.DEGRADED, 1)
            await encrypt(kmi, Encrypt("key", b"x"))
            await eventually(lambda: kmi.state is KmiState.CONNECTED, 8)
            server.stop()
            await kmi.check()
            await eventually(lambda: kmi.state is KmiState.DISCONNECTED, 4)
            server.start(server.port)
            # Some lanes are at the hole for their time; those that are not serve.
            await eventually(lambda: kmi.state is not KmiState.DISCONNECTED, 3)
        finally:
            await kmi.close()


@pytest.mark.parametrize("version", ["1.12.11", "1.12.3+ent", "0.11.6", None, "", "next"])
async def test_a_server_that_may_drop_associated_data_is_refused(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi, version: str | None
) -> None:
    server.version, server.drops_associated_data = version, True
    kmi = await start_kmi(site.settings())
    assert kmi.state is KmiState.DISCONNECTED
    assert "associated data" in kmi.error
    with pytest.raises(OperationError):
        await encrypt(kmi, Encrypt("key", b"x", aad=b"an aad"))
    assert not server.asked("transit/encrypt")


@pytest.mark.parametrize("version", ["1.13.0", "1.19.0-rc1+ent.hsm", "v2.3.1"])
async def test_newer_ones_are_known_by_their_version(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi, version: str
) -> None:
    server.version = version
    assert (await start_kmi(site.settings())).state is KmiState.CONNECTED


@pytest.mark.parametrize("drops", [True, False])
async def test_with_a_probe_key_evidence_decides_whatever_the_version(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi, drops: bool
) -> None:
    server.version, server.drops_associated_data = "9.9" if drops else None, drops
    kmi = await start_kmi(site.settings(probe_key="key"))
    assert kmi.state is (KmiState.DISCONNECTED if drops else KmiState.CONNECTED)
    assert ("decrypts under any associated data" in kmi.error) == drops
