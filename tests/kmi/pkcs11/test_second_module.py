"""NSS's softoken, unrelated to SoftHSM: so that nothing here is one module's habit.

It has one of its own: it takes all secret keys of one CKA_ID for the same key, and a new one takes
the place of the old. So there are no two keys of one version here.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from hsm import (
    Hsm,
    by_cryptodome,
    decrypt,
    encrypt,
    eventually,
    every_way,
    opening,
    ready_lanes,
    restarts,
    straight,
    submit,
)

from xkiproxy.config.secrets import write_secret_file
from xkiproxy.crypto.algorithms import KEY_SIZES, KeySpec, Usage
from xkiproxy.crypto.operations import (
    Decrypt,
    Decrypted,
    Describe,
    Encrypt,
    Fault,
    KeyDescription,
    OperationError,
    Random,
)
from xkiproxy.kmi.base import KeyInfo, KeyManagerError, KmiState

SPECS = [KeySpec.AES_128, KeySpec.AES_192, KeySpec.AES_256]


@pytest.mark.parametrize("spec", SPECS)
async def test_every_algorithm_is_read_by_others(
    nss: Hsm, start_kmi, open_manager, spec: KeySpec
) -> None:
    created = open_manager(nss.settings()).create("made", spec)
    assert created == KeyInfo("made", spec, (1,), None, Usage.BOTH, "")
    known = os.urandom(KEY_SIZES[spec])
    nss.plant("known", known, "00000009")
    kmi = await start_kmi(nss.settings(lanes=2))
    assert kmi.state is KmiState.CONNECTED, kmi.error
    ways = [way for label in ("made", "known") for way in every_way(label)]
    done = await asyncio.gather(*(encrypt(kmi, way) for way in ways))
    opened = await asyncio.gather(
        *(decrypt(kmi, opening(way, made)) for way, made in zip(ways, done, strict=True))
    )
    assert [o.plaintext for o in opened] == [way.plaintext for way in ways]
    calls, texts = [], []
    for way, made in zip(ways, done, strict=True):
        if way.key_id == "known":
            assert made.version == 9
            assert made.ciphertext == by_cryptodome(known, way, made)
        if there := straight(way, made):
            calls.append(there[0])
            texts.append(there[1])
    assert nss.elsewhere(*calls) == texts
    assert restarts(kmi) == 0


async def test_wrong_tag_aad_iv_and_version(nss: Hsm, start_kmi, open_manager) -> None:
    open_manager(nss.settings()).create("key", KeySpec.AES_256)
    kmi = await start_kmi(nss.settings())
    way = Encrypt("key", b"a text", aad=b"an aad")
    right = opening(way, await encrypt(kmi, way))
    sealed = right.ciphertext
    wrong: list[Decrypt] = [
        replace(right, ciphertext=sealed[:-1] + bytes([sealed[-1] ^ 1])),
        replace(right, ciphertext=bytes([sealed[0] ^ 1]) + sealed[1:]),
        replace(right, ciphertext=sealed[-16:]),
        replace(right, aad=b"another"),
        replace(right, iv=bytes(12)),
        replace(right, iv=bytes(16)),
        replace(right, version=2),
    ]
    mixed = [operation for w in wrong for operation in (w, right)]
    outcomes = await asyncio.gather(*(submit(kmi, o) for o in mixed), return_exceptions=True)
    for position, outcome in enumerate(outcomes):
        if position % 2:
            assert isinstance(outcome, Decrypted)
            assert outcome.plaintext == b"a text"
        else:
            assert isinstance(outcome, OperationError), wrong[position // 2]
            assert outcome.fault is Fault.INVALID_CIPHERTEXT
    assert restarts(kmi) == 0


async def test_keys_are_rotated_listed_and_destroyed(nss: Hsm, start_kmi, open_manager) -> None:
    manager = open_manager(nss.settings())
    manager.create("key", KeySpec.AES_256)
    nss.plant("other", os.urandom(16), "00000007")
    kmi = await start_kmi(nss.settings(lanes=2))
    way = Encrypt("key", b"x")
    before = await encrypt(kmi, way)
    assert manager.rotate("key").versions == (1, 2)
    kmi.refresh(True)
    done = await asyncio.gather(*(encrypt(kmi, way) for _ in range(40)))
    assert {made.version for made in done} == {2}
    assert (await decrypt(kmi, opening(way, before))).plaintext == b"x"
    assert await submit(kmi, Describe("key")) == KeyDescription(
        "key", KeySpec.AES_256, Usage.BOTH, 2, None
    )
    assert {key.key_id: (key.spec, key.versions) for key in manager.list()} == {
        "key": (KeySpec.AES_256, (1, 2)),
        "other": (KeySpec.AES_128, (7,)),
    }
    manager.destroy("key")
    kmi.refresh(True)
    with pytest.raises(OperationError) as caught:
        await encrypt(kmi, way)
    assert caught.value.fault is Fault.KEY_NOT_FOUND
    assert [key.key_id for key in manager.list()] == ["other"]


async def test_what_cannot_be_used_says_why(nss: Hsm, start_kmi, open_manager) -> None:
    value = os.urandom(32)
    nss.plant("extractable", value, "00000001", EXTRACTABLE=True)
    nss.plant("generic", value, "00000003", kind="GENERIC_SECRET")
    nss.plant("enc", value, "00000004", DECRYPT=False)
    listed = {key.key_id: key for key in open_manager(nss.settings()).list()}
    assert listed["extractable"].problem.startswith("extractable")
    assert listed["generic"].problem.startswith("wrong type")
    assert (listed["enc"].usage, listed["enc"].problem) == (Usage.ENCRYPT, "")
    kmi = await start_kmi(nss.settings())
    for label in ("extractable", "generic"):
        with pytest.raises(OperationError) as caught:
            await submit(kmi, Encrypt(label, b"x"))
        assert caught.value.fault is Fault.KEY_UNUSABLE


async def test_a_key_cannot_be_read(nss: Hsm, open_manager) -> None:
    open_manager(nss.settings()).create("key", KeySpec.AES_256)
    names = ("SENSITIVE", "EXTRACTABLE", "VALUE")
    found = nss.elsewhere(*(("attribute", {"label": "key", "name": name}) for name in names))
    assert found == [True, False, "AttributeSensitive"]


def test_a_wrong_pin(nss: Hsm, open_manager, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    write_secret_file(wrong, "not-the-pin-987")
    with pytest.raises(KeyManagerError, match="PIN"):
        open_manager(nss.settings(pin=wrong))


async def test_a_lane_is_killed(nss: Hsm, start_kmi, open_manager) -> None:
    open_manager(nss.settings()).create("key", KeySpec.AES_256)
    kmi = await start_kmi(nss.settings(lanes=2))
    os.kill(ready_lanes(os.getpid())[0], signal.SIGKILL)
    done = await asyncio.gather(*(encrypt(kmi, Encrypt("key", b"x")) for _ in range(40)))
    assert len(done) == 40
    await eventually(lambda: kmi.state is KmiState.CONNECTED and restarts(kmi) == 1)
    await submit(kmi, Random(1))
