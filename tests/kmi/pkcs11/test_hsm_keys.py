"""Keys in the token: made, listed, rotated, destroyed; and what the proxy will not touch."""

from __future__ import annotations

import asyncio
import os
import random
import string
from dataclasses import replace
from pathlib import Path

import pytest
from hsm import PIN, Hsm, decrypt, encrypt, opening, run, straight, submit

from xkiproxy.config.secrets import SecretSource, write_secret_file
from xkiproxy.crypto.algorithms import Algorithm, KeySpec, Usage
from xkiproxy.crypto.operations import (
    CiphertextFormat,
    Describe,
    Encrypt,
    Fault,
    KeyDescription,
    OperationError,
)
from xkiproxy.kmi.base import KeyInfo, KeyManagerError
from xkiproxy.kmi.pkcs11.manager import Pkcs11KeyManager
from xkiproxy.kmi.queued import QueuedKmi

VALUE = os.urandom(32)


async def fault_of(kmi: QueuedKmi, operation: Encrypt | Describe) -> Fault:
    with pytest.raises(OperationError) as caught:
        await submit(kmi, operation)
    return caught.value.fault


@pytest.mark.parametrize("spec", ["AES_256", "AES_192", "AES_128"])
def test_a_key_is_made_so_that_it_cannot_leave(
    hsm: Hsm, manager: Pkcs11KeyManager, spec: str
) -> None:
    made = manager.create("payroll", KeySpec(spec))
    assert made == KeyInfo("payroll", KeySpec(spec), (1,), None, Usage.BOTH, "")
    assert manager.get("payroll") == made
    assert manager.list() == [made]
    wanted = {
        "SENSITIVE": True, "ALWAYS_SENSITIVE": True, "EXTRACTABLE": False,
        "NEVER_EXTRACTABLE": True, "TOKEN": True, "PRIVATE": True, "ENCRYPT": True,
        "DECRYPT": True, "WRAP": False, "UNWRAP": False, "SIGN": False, "VERIFY": False,
        "DERIVE": False, "ID": "00000001", "VALUE": "AttributeSensitive",
        "VALUE_LEN": int(spec[-3:]) // 8,
    }  # fmt: skip
    found = hsm.elsewhere(*(("attribute", {"label": "payroll", "name": n}) for n in wanted))
    assert dict(zip(wanted, found, strict=True)) == wanted


def test_pkcs11_tool_cannot_read_the_key(hsm: Hsm, manager: Pkcs11KeyManager) -> None:
    manager.create("payroll", KeySpec.AES_256)
    shown = hsm.tool("--list-objects", "--type", "secrkey")
    assert "payroll" in shown
    assert "never extractable" in shown
    out = hsm.directory / "stolen"
    with pytest.raises(AssertionError, match="CKR_ATTRIBUTE_SENSITIVE"):
        hsm.tool("--read-object", "--type", "secrkey", "--label", "payroll", "-o", str(out))
    assert not out.exists() or out.read_bytes() == b""


@pytest.mark.parametrize("algorithm", [Algorithm.AES_CBC, Algorithm.AES_ECB])
async def test_pkcs11_tool_opens_a_ciphertext(
    hsm: Hsm, manager: Pkcs11KeyManager, start_kmi, tmp_path: Path, algorithm: Algorithm
) -> None:
    """OpenSC's tool knows no GCM in this version: for that see the next test."""
    manager.create("payroll", KeySpec.AES_256)
    kmi = await start_kmi(hsm.settings())
    text = b"sixteen bytes, and again sixteen"
    made = await encrypt(kmi, Encrypt("payroll", text, algorithm))
    sealed, opened = tmp_path / "sealed", tmp_path / "opened"
    sealed.write_bytes(made.ciphertext)
    cbc = algorithm is Algorithm.AES_CBC
    mechanism = ["AES-CBC-PAD", "--iv", made.iv.hex()] if cbc else ["AES-ECB"]
    hsm.tool(
        "--decrypt", "--mechanism", *mechanism, "--label", "payroll",
        "-i", str(sealed), "-o", str(opened),
    )  # fmt: skip
    assert opened.read_bytes() == (text if cbc else text + bytes([16] * 16))


async def test_the_module_called_straight_opens_a_ciphertext(
    hsm: Hsm, manager: Pkcs11KeyManager, start_kmi
) -> None:
    manager.create("payroll", KeySpec.AES_256)
    kmi = await start_kmi(hsm.settings())
    for form in CiphertextFormat:
        way = Encrypt("payroll", b"a text", aad=b"an aad", format=form)
        there = straight(way, await encrypt(kmi, way))
        assert there is not None
        assert hsm.elsewhere(there[0]) == [b"a text".hex()]


def test_a_name_that_is_taken(hsm: Hsm, manager: Pkcs11KeyManager) -> None:
    manager.create("payroll", KeySpec.AES_256)
    with pytest.raises(KeyManagerError, match="payroll: the token has a key of this label"):
        manager.create("payroll", KeySpec.AES_128)
    assert manager.get("payroll").versions == (1,)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", "ä", "x" * 129])
def test_a_name_that_could_not_stand_in_a_path(manager: Pkcs11KeyManager, name: str) -> None:
    with pytest.raises(KeyManagerError, match="key ID"):
        manager.create(name, KeySpec.AES_256)


async def test_rotation_is_used_at_once_by_every_lane(
    hsm: Hsm, manager: Pkcs11KeyManager, start_kmi
) -> None:
    manager.create("payroll", KeySpec.AES_256)
    kmi = await start_kmi(hsm.settings(lanes=3, max_batch=1))
    ways = [Encrypt("payroll", str(n).encode(), aad=b"a") for n in range(60)]
    written = [opening(ways[0], await encrypt(kmi, ways[0]))]
    for version in (2, 3):
        # Every lane has the key's handle of before.
        assert {(await encrypt(kmi, way)).version for way in ways[:6]} == {version - 1}
        assert manager.rotate("payroll").versions == tuple(range(1, version + 1))
        kmi.refresh(True)
        done = await asyncio.gather(*(encrypt(kmi, way) for way in ways))
        assert {made.version for made in done} == {version}
        written.append(opening(ways[0], done[0]))
    for number, old in enumerate(written, 1):
        assert old.version == number
        assert (await decrypt(kmi, old)).plaintext == b"0"
        assert (await decrypt(kmi, old)).version == number
    for change in ({"version": 2}, {"version": 4}):
        with pytest.raises(OperationError) as caught:
            await decrypt(kmi, replace(written[0], **change))
        assert caught.value.fault is Fault.INVALID_CIPHERTEXT
    described = await submit(kmi, Describe("payroll"))
    assert described == KeyDescription("payroll", KeySpec.AES_256, Usage.BOTH, 3, None)


async def test_a_rotated_key_has_no_raw_format(
    hsm: Hsm, manager: Pkcs11KeyManager, start_kmi
) -> None:
    manager.create("payroll", KeySpec.AES_256)
    kmi = await start_kmi(hsm.settings())
    way = Encrypt("payroll", b"x", format=CiphertextFormat.RAW)
    await encrypt(kmi, way)
    manager.rotate("payroll")
    kmi.refresh(True)
    assert await fault_of(kmi, way) is Fault.UNSUPPORTED


async def test_destroyed(hsm: Hsm, manager: Pkcs11KeyManager, start_kmi) -> None:
    for name in ("payroll", "other"):
        manager.create(name, KeySpec.AES_256)
    manager.rotate("payroll")
    kmi = await start_kmi(hsm.settings(lanes=2))
    await encrypt(kmi, Encrypt("payroll", b"x"))
    manager.destroy("payroll")
    assert manager.get("payroll") is None
    assert [key.key_id for key in manager.list()] == ["other"]
    # The handle of before is dead: with or without a word of it, the key is gone.
    assert await fault_of(kmi, Encrypt("payroll", b"x")) is Fault.KEY_NOT_FOUND
    kmi.refresh(True)
    assert await fault_of(kmi, Encrypt("payroll", b"x")) is Fault.KEY_NOT_FOUND
    assert (await encrypt(kmi, Encrypt("other", b"x"))).version == 1
    with pytest.raises(KeyManagerError, match="no such key"):
        manager.rotate("payroll")


async def test_a_key_that_is_made_again_is_found_by_its_new_handle(
    hsm: Hsm, manager: Pkcs11KeyManager, start_kmi
) -> None:
    manager.create("payroll", KeySpec.AES_256)
    kmi = await start_kmi(hsm.settings(lanes=2))
    await asyncio.gather(*(encrypt(kmi, Encrypt("payroll", b"x")) for _ in range(20)))
    manager.destroy("payroll")
    manager.create("payroll", KeySpec.AES_128)
    done = await asyncio.gather(*(encrypt(kmi, Encrypt("payroll", b"x")) for _ in range(20)))
    assert {made.version for made in done} == {1}


@pytest.mark.parametrize("key_id", ["", "77", "00000000", "0102030405", "00000005"])
async def test_a_key_made_elsewhere(hsm: Hsm, kmi: QueuedKmi, manager, key_id: str) -> None:
    """Alone under its label it is version 1; four bytes are its version."""
    hsm.plant("foreign", VALUE, key_id)
    version = 5 if key_id == "00000005" else 1
    found = manager.get("foreign")
    assert found == KeyInfo("foreign", KeySpec.AES_256, (version,), None, Usage.BOTH, "")
    assert (await encrypt(kmi, Encrypt("foreign", b"x"))).version == version
    raw = Encrypt("foreign", b"x", format=CiphertextFormat.RAW)
    assert (await decrypt(kmi, opening(raw, await encrypt(kmi, raw)))).plaintext == b"x"


async def test_a_key_made_by_pkcs11_tool(hsm: Hsm, kmi: QueuedKmi, manager) -> None:
    hsm.tool("--keygen", "--key-type", "AES:32", "--label", "theirs", "--id", "4711", "--sensitive")
    assert manager.get("theirs") == KeyInfo("theirs", KeySpec.AES_256, (1,), None, Usage.BOTH, "")
    way = Encrypt("theirs", b"x")
    made = await encrypt(kmi, way)
    assert (await decrypt(kmi, opening(way, made))).plaintext == b"x"


UNUSABLE = {
    "extractable": ({"EXTRACTABLE": True}, VALUE, "extractable"),
    "not-sensitive": ({"SENSITIVE": False}, VALUE, "not sensitive"),
    "generic": ({"kind": "GENERIC_SECRET"}, VALUE, "wrong type"),
    "des3": ({"kind": "DES3"}, bytes.fromhex("0123456789abcdef23456789abcdef014567890123456789"),
             "wrong type"),
    "does-nothing": ({"ENCRYPT": False, "DECRYPT": False}, VALUE, "no ENCRYPT and no DECRYPT"),
}  # fmt: skip


async def test_what_cannot_be_used_is_listed_with_its_reason(
    hsm: Hsm, kmi: QueuedKmi, manager
) -> None:
    for label, (attributes, value, _) in UNUSABLE.items():
        hsm.plant(label, value, **attributes)
    for _ in range(2):
        hsm.plant("twins", VALUE)
    hsm.plant("lost-count", VALUE, "77")
    hsm.plant("lost-count", VALUE, "78")
    hsm.plant("mixed", VALUE)
    hsm.plant("mixed", VALUE[:16], "00000002")
    hsm.plant("good", VALUE)
    reasons = {
        **{label: reason for label, (_, _, reason) in UNUSABLE.items()},
        "twins": "several keys under one label",
        "lost-count": "several keys under one label",
        "mixed": "wrong type",
        "good": "",
    }
    listed = {key.key_id: key for key in manager.list()}
    assert sorted(listed) == sorted(reasons)
    for label, reason in reasons.items():
        problem = listed[label].problem
        assert problem.startswith(reason) if reason else problem == "", (label, problem)
        assert manager.get(label) == listed[label]
        if reason:
            assert await fault_of(kmi, Encrypt(label, b"x")) is Fault.KEY_UNUSABLE
            assert await fault_of(kmi, Describe(label)) is Fault.KEY_UNUSABLE
            with pytest.raises(KeyManagerError, match=f"{label}: {reason}"):
                manager.rotate(label)
    assert (await encrypt(kmi, Encrypt("good", b"x"))).version == 1


async def test_usage_is_listed(hsm: Hsm, manager) -> None:
    hsm.plant("enc", VALUE, DECRYPT=False)
    hsm.plant("dec", VALUE, ENCRYPT=False)
    assert {key.key_id: (key.usage, key.problem) for key in manager.list()} == {
        "enc": (Usage.ENCRYPT, ""),
        "dec": (Usage.DECRYPT, ""),
    }


async def test_strange_objects_do_not_hide_the_others(hsm: Hsm, kmi: QueuedKmi, manager) -> None:
    """Labels that are no key IDs, and a key without a label."""
    names = ["good", "a label with spaces", "über", ""]
    for name in names:
        hsm.plant(name, VALUE)
    listed = {key.key_id for key in manager.list()}
    assert {"good", "a label with spaces", "über"} <= listed
    assert "" not in listed
    assert (await encrypt(kmi, Encrypt("good", b"x"))).version == 1


async def test_a_key_of_a_type_that_nobody_knows(
    shimmed: Hsm, open_manager, start_kmi, monkeypatch
) -> None:
    """A vendor's key type without [kmi.sm4]: it cannot be used, and harms no other key."""
    monkeypatch.setenv("SHIM_VENDOR", "1")
    shimmed.plant("vendors", VALUE[:16])
    shimmed.plant("good", VALUE)
    problems = {key.key_id: key.problem for key in open_manager(shimmed.settings()).list()}
    assert problems["good"] == ""
    assert problems["vendors"].startswith("wrong type")
    kmi = await start_kmi(shimmed.settings())
    assert await fault_of(kmi, Encrypt("vendors", b"x")) is Fault.KEY_UNUSABLE
    assert (await encrypt(kmi, Encrypt("good", b"x"))).version == 1


def test_many_keys_are_listed(hsm: Hsm, manager) -> None:
    names = ["".join(random.choices(string.ascii_letters, k=12)) for _ in range(30)]
    for name in names:
        manager.create(name, KeySpec.AES_256)
    assert [key.key_id for key in manager.list()] == sorted(names)


# ---- opening ---------------------------------------------------------------------------------


def refusal(open_manager, settings) -> str:
    with pytest.raises(KeyManagerError) as caught:
        open_manager(settings)
    assert PIN not in str(caught.value)
    return str(caught.value)


def test_why_a_token_cannot_be_opened(hsm: Hsm, open_manager, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.so"
    assert str(nowhere) in refusal(open_manager, hsm.settings(module=nowhere))
    libc = next(Path("/usr/lib").glob("*/libc.so.6"))
    assert str(libc) in refusal(open_manager, hsm.settings(module=libc))
    said = refusal(open_manager, hsm.settings(token="another"))
    assert "no token of label 'another'" in said
    said = refusal(open_manager, hsm.settings(token={"serial": "0000"}))
    assert "no token of serial '0000'" in said


def test_a_wrong_pin_is_named_and_not_shown(hsm: Hsm, open_manager, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    write_secret_file(wrong, "not-the-pin-987")
    said = refusal(open_manager, hsm.settings(pin=wrong))
    assert "PIN" in said
    assert "not-the-pin-987" not in said


def test_a_pin_from_the_environment(hsm: Hsm, open_manager, monkeypatch) -> None:
    monkeypatch.setenv("A_PIN_OF_THE_TEST", PIN)
    manager = open_manager(hsm.settings(pin=SecretSource(env="A_PIN_OF_THE_TEST")))
    assert manager.list() == []


def test_a_token_by_its_serial(hsm: Hsm, open_manager) -> None:
    hsm.add_token("t2")
    slots = run("softhsm2-util", "--show-slots").split("Slot ")
    slot = next(s for s in slots if "t2" in s)
    serial = next(line.split()[-1] for line in slot.splitlines() if "Serial number" in line)
    manager = open_manager(hsm.settings(token={"serial": serial}))
    manager.create("in-t2", KeySpec.AES_256)
    assert hsm.elsewhere(("attribute", {"label": "in-t2", "name": "ID"}), token="t2") == [
        "00000001"
    ]


def test_two_tokens_of_one_label(hsm: Hsm, open_manager) -> None:
    hsm.add_token("t1")
    assert "2 tokens of label 't1'; name its serial" in refusal(open_manager, hsm.settings())


def test_keys_of_several_tokens_are_made_by_their_own_replication(hsm: Hsm, open_manager) -> None:
    hsm.add_token("t2")
    hsm.plant("there", VALUE)
    manager = open_manager(hsm.settings(token=["t1", "t2"]))
    assert [key.key_id for key in manager.list()] == ["there"]
    for change in (
        lambda: manager.create("payroll", KeySpec.AES_256),
        lambda: manager.rotate("there"),
        lambda: manager.destroy("there"),
    ):
        with pytest.raises(KeyManagerError, match="several tokens"):
            change()
