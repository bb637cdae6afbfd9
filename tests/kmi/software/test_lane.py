"""The software lane: what it refuses, rotation, defaults, health."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from xkiproxy.crypto.algorithms import ALGORITHMS, IV_SIZES, Algorithm, KeySpec, Padding, Usage
from xkiproxy.crypto.envelope import metadata
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
    invalid_ciphertext,
)
from xkiproxy.kmi.software import Keyring, SoftwareLane

RAW = CiphertextFormat.RAW
GCM_SPECS = [KeySpec.AES_256, KeySpec.SM4]


def fault(lane: SoftwareLane, operation: Operation) -> Fault:
    with pytest.raises(OperationError) as caught:
        lane.execute(operation)
    return caught.value.fault


def encrypt(lane: SoftwareLane, operation: Encrypt) -> Encrypted:
    result = lane.execute(operation)
    assert isinstance(result, Encrypted)
    return result


def flip(data: bytes, bit: int) -> bytes:
    index, shift = divmod(bit, 8)
    return data[:index] + bytes([data[index] ^ 1 << shift]) + data[index + 1 :]


@pytest.mark.parametrize("spec", GCM_SPECS)
@pytest.mark.parametrize("form", CiphertextFormat)
def test_every_flipped_bit_is_refused(spec, form, keyring: Keyring, lane: SoftwareLane) -> None:
    keyring.create("k", spec)
    made = encrypt(lane, Encrypt("k", b"a secret text", aad=b"ctx", format=form))
    version = None if form is RAW else 1
    good = Decrypt("k", made.ciphertext, made.iv, version, aad=b"ctx", format=form)
    assert lane.execute(good) == Decrypted(b"a secret text", 1, ALGORITHMS[spec][0], None)
    wrong = [
        *(
            replace(good, ciphertext=flip(made.ciphertext, i))
            for i in range(len(made.ciphertext) * 8)
        ),
        *(replace(good, iv=flip(made.iv, i)) for i in range(len(made.iv) * 8)),
        *(replace(good, aad=flip(b"ctx", i)) for i in range(24)),
        replace(good, aad=b""),
        replace(good, ciphertext=made.ciphertext[:-1]),
        replace(good, ciphertext=made.ciphertext + b"\0"),
        replace(good, ciphertext=made.ciphertext[-16:]),
        replace(good, ciphertext=b""),
    ]
    for operation in wrong:
        with pytest.raises(OperationError) as caught:
            lane.execute(operation)
        assert caught.value.args == invalid_ciphertext().args


@pytest.mark.parametrize("spec", GCM_SPECS)
def test_a_version_cannot_be_swapped(spec, plant, lane: SoftwareLane) -> None:
    """Even where both versions had the same material, the metadata is bound."""
    same = bytes(32 if spec is KeySpec.AES_256 else 16)
    plant("k", spec, {1: same, 2: same})
    made = encrypt(lane, Encrypt("k", b"text"))
    assert made.version == 2
    assert fault(lane, Decrypt("k", made.ciphertext, made.iv, 1)) is Fault.INVALID_CIPHERTEXT
    assert fault(lane, Decrypt("k", made.ciphertext, made.iv, 3)) is Fault.INVALID_CIPHERTEXT


def test_metadata_is_no_aad(plant, lane: SoftwareLane) -> None:
    plant("k", KeySpec.AES_256, {1: bytes(32)})
    made = encrypt(lane, Encrypt("k", b"text"))
    for aad in (metadata(1), b"\x00\x00\x05" + metadata(1)):
        operation = Decrypt("k", made.ciphertext, made.iv, 1, aad=aad)
        assert fault(lane, operation) is Fault.INVALID_CIPHERTEXT
    raw = encrypt(lane, Encrypt("k", b"text", aad=b"x", format=RAW))
    operation = Decrypt("k", raw.ciphertext, raw.iv, 1, aad=b"x")
    assert fault(lane, operation) is Fault.INVALID_CIPHERTEXT


def test_another_key_does_not_decrypt(keyring: Keyring, lane: SoftwareLane) -> None:
    keyring.create("a", KeySpec.AES_256)
    keyring.create("b", KeySpec.AES_256)
    made = encrypt(lane, Encrypt("a", b"text"))
    assert fault(lane, Decrypt("b", made.ciphertext, made.iv, 1)) is Fault.INVALID_CIPHERTEXT


@pytest.mark.parametrize("algorithm", [Algorithm.AES_CBC, Algorithm.AES_ECB])
def test_wrong_padding(algorithm, keyring: Keyring, lane: SoftwareLane) -> None:
    keyring.create("k", KeySpec.AES_256)
    made = encrypt(lane, Encrypt("k", bytes(16), algorithm, Padding.NONE))
    assert made.padding is Padding.NONE
    bad = Decrypt("k", made.ciphertext, made.iv, 1, algorithm)
    with pytest.raises(OperationError) as caught:
        lane.execute(bad)
    assert caught.value.args == invalid_ciphertext().args
    for ciphertext in (b"", made.ciphertext[:-1]):
        operation = replace(bad, ciphertext=ciphertext)
        assert fault(lane, operation) is Fault.INVALID_CIPHERTEXT


def test_defaults(keyring: Keyring, lane: SoftwareLane) -> None:
    for spec in KeySpec:
        keyring.create(spec.value, spec)
        made = encrypt(lane, Encrypt(spec.value, b"text"))
        assert (made.algorithm, made.padding) == (ALGORITHMS[spec][0], None)
        for algorithm in ALGORITHMS[spec][1:]:
            made = encrypt(lane, Encrypt(spec.value, b"text", algorithm))
            assert made.padding is Padding.PKCS7
            assert len(made.iv) == IV_SIZES[algorithm]


def test_an_iv_is_never_used_twice(keyring: Keyring, lane: SoftwareLane) -> None:
    keyring.create("k", KeySpec.AES_256)
    assert len({encrypt(lane, Encrypt("k", b"")).iv for _ in range(1000)}) == 1000


@pytest.mark.parametrize("spec", KeySpec)
def test_an_algorithm_of_another_spec(spec, keyring: Keyring, lane: SoftwareLane) -> None:
    keyring.create("k", spec)
    for algorithm in set(Algorithm) - set(ALGORITHMS[spec]):
        assert fault(lane, Encrypt("k", b"", algorithm)) is Fault.UNSUPPORTED
        operation = Decrypt("k", bytes(16), bytes(12), 1, algorithm)
        assert fault(lane, operation) is Fault.UNSUPPORTED


def test_unknown_key(lane: SoftwareLane) -> None:
    operations = [Encrypt("no", b""), Decrypt("no", bytes(16), bytes(12), 1), Describe("no")]
    assert {fault(lane, operation) for operation in operations} == {Fault.KEY_NOT_FOUND}


def test_rotation_by_another_process(keyring: Keyring, lane: SoftwareLane) -> None:
    """The lane has a connection of its own: the keyring's changes are another's to it."""
    keyring.create("k", KeySpec.AES_256)
    old = encrypt(lane, Encrypt("k", b"old"))
    other = SoftwareLane(keyring)
    keyring.rotate("k")
    other.refresh()
    new = encrypt(other, Encrypt("k", b"new"))
    assert (old.version, new.version) == (1, 2)
    # No refresh between: the unknown version makes the lane look.
    found = lane.execute(Decrypt("k", new.ciphertext, new.iv, 2))
    assert isinstance(found, Decrypted)
    assert found.plaintext == b"new"
    found = lane.execute(Decrypt("k", old.ciphertext, old.iv, 1))
    assert isinstance(found, Decrypted)
    assert found.plaintext == b"old"
    assert encrypt(lane, Encrypt("k", b"")).version == 2


def test_destruction_by_another_process(keyring: Keyring, lane: SoftwareLane) -> None:
    keyring.create("k", KeySpec.AES_256)
    encrypt(lane, Encrypt("k", b"text"))
    keyring.destroy("k")
    lane.refresh()
    assert fault(lane, Encrypt("k", b"text")) is Fault.KEY_NOT_FOUND


def test_a_rotated_key_does_nothing_raw(keyring: Keyring, lane: SoftwareLane) -> None:
    keyring.create("k", KeySpec.AES_256)
    keyring.rotate("k")
    for algorithm in ALGORITHMS[KeySpec.AES_256]:
        iv = bytes(IV_SIZES[algorithm])
        assert fault(lane, Encrypt("k", b"", algorithm, format=RAW)) is Fault.UNSUPPORTED
        for version in (None, 1):
            operation = Decrypt("k", bytes(16), iv, version, algorithm, format=RAW)
            with pytest.raises(OperationError, match="rotated") as caught:
                lane.execute(operation)
            assert caught.value.fault is Fault.UNSUPPORTED


def test_an_unusable_key_leaves_the_others(path: Path, keyring: Keyring, plant, lane) -> None:
    plant("good", KeySpec.AES_256, {1: bytes(32)})
    keyring.create("bad", KeySpec.AES_256)
    with keyring._database.writing() as connection:
        connection.execute("UPDATE versions SET wrapped = zeroblob(60) WHERE key_id = 'bad'")
    operations = [Encrypt("bad", b""), Decrypt("bad", bytes(16), bytes(12), 1), Describe("bad")]
    assert {fault(lane, operation) for operation in operations} == {Fault.KEY_UNUSABLE}
    assert encrypt(lane, Encrypt("good", b"")).version == 1


def test_describe_and_random(keyring: Keyring, lane: SoftwareLane) -> None:
    info = keyring.create("k", KeySpec.SM4)
    described = lane.execute(Describe("k"))
    assert described == KeyDescription("k", KeySpec.SM4, Usage.BOTH, 1, info.created)
    drawn = [lane.execute(Random(length)) for length in (1, 32, 1024)]
    assert [len(one.data) for one in drawn if isinstance(one, RandomBytes)] == [1, 32, 1024]
    assert lane.execute(Random(32)) != lane.execute(Random(32))


def test_a_keyring_that_is_gone(path: Path, keyring: Keyring, lane: SoftwareLane) -> None:
    lane.probe()
    path.rename(path.with_name("elsewhere.db"))
    for check in (lane.probe, lane.refresh):
        with pytest.raises(OperationError, match="no such file") as caught:
            check()
        assert caught.value.fault is Fault.UNAVAILABLE
    # An unknown key could be in the file that cannot be read.
    assert fault(lane, Encrypt("k", b"")) is Fault.UNAVAILABLE
    path.write_bytes(b"")
    path.chmod(0o600)
    with pytest.raises(OperationError, match="replaced"):
        lane.probe()


def test_probe_notices_another_check_value(keyring: Keyring, lane: SoftwareLane) -> None:
    with keyring._database.writing() as connection:
        connection.execute("UPDATE meta SET value = zeroblob(32) WHERE name = 'check'")
    lane.probe()  # the keys in memory are as good as before
    assert "not the one" in lane.warning
    assert fault(lane, Encrypt("k", b"")) is Fault.UNAVAILABLE


def test_nothing_shows_material(plant, lane: SoftwareLane, keyring: Keyring) -> None:
    plant("k", KeySpec.AES_256, {1: b"M" * 32})
    lane.refresh()
    (unwrapped,) = keyring.unwrap_all()
    key = lane._keys["k"]
    for thing in (unwrapped, keyring, lane, key, key.versions[1], key.versions, keyring.list()):
        assert "MMMM" not in repr(thing)
