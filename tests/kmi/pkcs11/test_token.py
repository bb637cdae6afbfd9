"""What a token does for the proxy, others undo; and what goes wrong stays with its operation."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cryptography_vectors
import pytest
from Cryptodome.Cipher import AES
from hsm import (
    Hsm,
    by_cryptodome,
    decrypt,
    encrypt,
    every_way,
    opening,
    restarts,
    straight,
    submit,
)

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
)
from xkiproxy.kmi.base import KeyManagerError, KmiState
from xkiproxy.kmi.queued import QueuedKmi

RAW = CiphertextFormat.RAW
KEYS = {name: os.urandom(size) for name, size in (("aes128", 16), ("aes192", 24), ("aes256", 32))}
SM4 = {"key_type": 0x80000101, "key_gen": 0x80000104, "gcm": 0x80000105}
GCM_VECTORS = Path(cryptography_vectors.__file__).parent / "ciphers" / "AES" / "GCM"


async def fault_of(kmi: QueuedKmi, operation: Operation) -> Fault:
    with pytest.raises(OperationError) as caught:
        await submit(kmi, operation)
    return caught.value.fault


def plant_all(hsm: Hsm, keys: dict[str, bytes]) -> None:
    hsm.elsewhere(
        *(
            ("create", {"label": label, "key_id": "00000001", "value": value.hex()})
            for label, value in keys.items()
        )
    )


async def test_every_algorithm_is_read_by_others(hsm: Hsm, kmi: QueuedKmi) -> None:
    """By the module called straight, and by PyCryptodome, which knows the keys."""
    plant_all(hsm, KEYS)
    ways = [way for label in KEYS for way in every_way(label)]
    done = await asyncio.gather(*(encrypt(kmi, way) for way in ways))
    calls, texts = [], []
    for way, made in zip(ways, done, strict=True):
        assert made.ciphertext == by_cryptodome(KEYS[way.key_id], way, made)
        assert made.algorithm is (way.algorithm or Algorithm.AES_GCM)
        assert made.version == 1
        if there := straight(way, made):
            calls.append(there[0])
            texts.append(there[1])
    assert len(calls) > 150
    assert hsm.elsewhere(*calls) == texts
    opened = await asyncio.gather(
        *(decrypt(kmi, opening(way, made)) for way, made in zip(ways, done, strict=True))
    )
    assert [o.plaintext for o in opened] == [way.plaintext for way in ways]
    ivs = [made.iv for made in done if made.iv]
    assert len(set(ivs)) == len(ivs)


async def test_what_others_wrote_is_read(hsm: Hsm, kmi: QueuedKmi) -> None:
    plant_all(hsm, KEYS)
    for label, key in KEYS.items():
        for way in every_way(label, (0, 5, 32)):
            algorithm = way.algorithm or Algorithm.AES_GCM
            size = {Algorithm.AES_GCM: 12, Algorithm.AES_CBC: 16, Algorithm.AES_ECB: 0}[algorithm]
            padding = way.padding
            if algorithm is not Algorithm.AES_GCM and padding is None:
                padding = Padding.PKCS7
            like = Encrypted(b"", os.urandom(size), 1, algorithm, padding)
            written = replace(like, ciphertext=by_cryptodome(key, way, like))
            read = await decrypt(kmi, opening(way, written))
            assert read == Decrypted(way.plaintext, 1, algorithm, padding)


async def test_an_iv_that_is_given_is_used(hsm: Hsm, kmi: QueuedKmi) -> None:
    plant_all(hsm, KEYS)
    for algorithm, size in ((Algorithm.AES_GCM, 12), (Algorithm.AES_CBC, 16)):
        way = Encrypt("aes256", b"text", algorithm, iv=os.urandom(size))
        made = await encrypt(kmi, way)
        assert made.iv == way.iv
        assert made.ciphertext == by_cryptodome(KEYS["aes256"], way, made)


def gcm_vectors(name: str, step: int) -> Iterator[dict[str, str]]:
    """Some of NIST's vectors with a 96-bit IV and a 128-bit tag."""
    section: dict[str, str] = {}
    vector: dict[str, str] = {}
    found = []
    for line in [*(GCM_VECTORS / name).read_text().splitlines(), "Count = end"]:
        left, _, right = (part.strip() for part in line.strip("[]").partition("="))
        if line.startswith("["):
            section[left.lower()] = right
        elif left.lower() == "count":
            if vector.get("ivlen") == "96" and vector["taglen"] == "128":
                found.append(vector)
            vector = {**section}
        elif line == "FAIL":
            vector["fail"] = "yes"
        elif "=" in line:
            vector[left.lower()] = right
    yield from found[::step]


async def test_vectors_of_nist(hsm: Hsm, kmi: QueuedKmi) -> None:
    names = sorted(path.name for path in GCM_VECTORS.glob("*.rsp"))
    vectors = [vector for name in names for vector in gcm_vectors(name, 60)]
    plant_all(hsm, {str(n): bytes.fromhex(vector["key"]) for n, vector in enumerate(vectors)})
    refused = 0
    for number, vector in enumerate(vectors):
        iv, aad = bytes.fromhex(vector["iv"]), bytes.fromhex(vector["aad"])
        sealed = bytes.fromhex(vector["ct"] + vector["tag"])
        operation = Decrypt(str(number), sealed, iv, None, aad=aad, format=RAW)
        if "fail" in vector:
            assert await fault_of(kmi, operation) is Fault.INVALID_CIPHERTEXT
            refused += 1
            continue
        text = bytes.fromhex(vector["pt"])
        assert (await decrypt(kmi, operation)).plaintext == text
        made = await encrypt(kmi, Encrypt(str(number), text, iv=iv, aad=aad, format=RAW))
        assert (made.ciphertext, made.iv) == (sealed, iv)
    assert refused >= 3
    assert len(vectors) - refused >= 20


async def test_what_is_wrong_with_a_ciphertext_harms_nothing_else(hsm: Hsm, kmi: QueuedKmi) -> None:
    """Wrong ones among right ones, in one batch; the lane lives on."""
    hsm.plant("key", KEYS["aes256"])
    way = Encrypt("key", b"a text", aad=b"an aad")
    made = await encrypt(kmi, way)
    right = opening(way, made)
    sealed = right.ciphertext
    cbc_way = Encrypt("key", b"b" * 32, Algorithm.AES_CBC)
    cbc = opening(cbc_way, await encrypt(kmi, cbc_way))
    last_byte_flipped = cbc.iv[:-1] + bytes([cbc.iv[-1] ^ 1])
    wrong: list[Operation] = [
        replace(right, ciphertext=sealed[:-1] + bytes([sealed[-1] ^ 1])),
        replace(right, ciphertext=bytes([sealed[0] ^ 1]) + sealed[1:]),
        replace(right, ciphertext=sealed[:-2]),
        replace(right, ciphertext=sealed[-16:]),
        replace(right, aad=b"another aad"),
        replace(right, aad=b""),
        replace(right, iv=os.urandom(12)),
        replace(right, iv=os.urandom(16)),
        replace(right, version=2),
        replace(right, version=2**32 - 1),
        replace(right, format=RAW, version=None),
        # A block less: what is the padding now was text, and is no padding.
        replace(cbc, ciphertext=cbc.ciphertext[:32]),
        replace(cbc, ciphertext=cbc.ciphertext[:16], iv=last_byte_flipped),
    ]
    missing = [Encrypt("nothing", b"x"), replace(right, key_id="nothing"), Describe("nothing")]
    mixed: list[Operation] = []
    for operation in [*wrong, *missing]:
        mixed += [operation, right]
    outcomes = await asyncio.gather(
        *(submit(kmi, operation) for operation in mixed), return_exceptions=True
    )
    for position, outcome in enumerate(outcomes):
        if position % 2:
            assert outcome == Decrypted(b"a text", 1, Algorithm.AES_GCM, None)
        else:
            assert isinstance(outcome, OperationError), mixed[position]
            expected = (
                Fault.INVALID_CIPHERTEXT if position < 2 * len(wrong) else Fault.KEY_NOT_FOUND
            )
            assert outcome.fault is expected, mixed[position]
    assert restarts(kmi) == 0
    assert kmi.state is KmiState.CONNECTED


async def test_what_a_key_cannot_do(hsm: Hsm, kmi: QueuedKmi) -> None:
    hsm.plant("key", KEYS["aes256"])
    assert await fault_of(kmi, Encrypt("key", b"x", Algorithm.SM4_GCM)) is Fault.UNSUPPORTED
    assert (
        await fault_of(kmi, Decrypt("key", bytes(32), bytes(12), 1, Algorithm.SM4_GCM))
        is Fault.UNSUPPORTED
    )
    unaligned = Encrypt("key", b"x", Algorithm.AES_CBC, Padding.NONE)
    assert await fault_of(kmi, unaligned) is Fault.INVALID_PARAMETER
    assert restarts(kmi) == 0


async def test_what_a_key_may_not_do(hsm: Hsm, kmi: QueuedKmi) -> None:
    value = KEYS["aes256"]
    for label, missing in (("enc", "DECRYPT"), ("dec", "ENCRYPT")):
        hsm.plant(label, value, **{missing: False})
    sealed = await encrypt(kmi, Encrypt("enc", b"x"))
    there = opening(Encrypt("dec", b"x"), sealed)
    assert (await decrypt(kmi, there)).plaintext == b"x"
    assert await fault_of(kmi, Encrypt("dec", b"x")) is Fault.USAGE_FORBIDDEN
    assert await fault_of(kmi, replace(there, key_id="enc")) is Fault.USAGE_FORBIDDEN
    for label, usage in (("enc", Usage.ENCRYPT), ("dec", Usage.DECRYPT)):
        described = await submit(kmi, Describe(label))
        assert described == KeyDescription(label, KeySpec.AES_256, usage, 1, None)


async def test_random_bytes_are_of_the_token(kmi: QueuedKmi) -> None:
    drawn = await asyncio.gather(*(submit(kmi, Random(length)) for length in (1, 16, 1024, 1024)))
    lengths = []
    for result in drawn:
        assert isinstance(result, RandomBytes)
        lengths.append(len(result.data))
    assert lengths == [1, 16, 1024, 1024]
    assert drawn[2] != drawn[3]


async def test_describe(hsm: Hsm, kmi: QueuedKmi) -> None:
    plant_all(hsm, KEYS)
    for label, spec in zip(KEYS, ("AES_128", "AES_192", "AES_256"), strict=True):
        described = await submit(kmi, Describe(label))
        assert described == KeyDescription(label, KeySpec(spec), Usage.BOTH, 1, None)


async def test_big_and_many(hsm: Hsm, start_kmi) -> None:
    hsm.plant("key", KEYS["aes256"])
    kmi = await start_kmi(hsm.settings(lanes=2))
    ways = [Encrypt("key", os.urandom(8192), aad=os.urandom(8192)) for _ in range(400)]
    done = await asyncio.gather(*(encrypt(kmi, way) for way in ways))
    for way, made in zip(ways, done, strict=True):
        assert made.ciphertext == by_cryptodome(KEYS["aes256"], way, made)
    assert len({made.iv for made in done}) == len(ways)


# ---- what vendors do differently ---------------------------------------------------------------


async def test_an_iv_that_the_hsm_makes(shimmed: Hsm, start_kmi, monkeypatch) -> None:
    monkeypatch.setenv("SHIM_MAKE_IV", "1")
    shimmed.plant("key", KEYS["aes256"])
    kmi = await start_kmi(shimmed.settings(iv="hsm", lanes=2))
    ways = [Encrypt("key", os.urandom(40), aad=b"an aad") for _ in range(200)]
    done = await asyncio.gather(*(encrypt(kmi, way) for way in ways))
    for way, made in zip(ways, done, strict=True):
        assert made.ciphertext == by_cryptodome(KEYS["aes256"], way, made)
        assert (await decrypt(kmi, opening(way, made))).plaintext == way.plaintext
    assert len({made.iv for made in done}) == len(ways)
    assert bytes(12) not in {made.iv for made in done}


async def test_a_module_that_makes_no_iv_is_refused(hsm: Hsm, start_kmi) -> None:
    """It would use zeros every time, which gives the key away: nothing is encrypted so."""
    hsm.plant("key", KEYS["aes256"])
    kmi = await start_kmi(hsm.settings(iv="hsm"))
    assert await fault_of(kmi, Encrypt("key", b"x")) is Fault.UNAVAILABLE


async def test_a_module_that_makes_another_ciphertext_than_gcm_does_is_refused(
    shimmed: Hsm, start_kmi, monkeypatch
) -> None:
    """With its IV in it, it would look well and never decrypt."""
    monkeypatch.setenv("SHIM_APPEND_IV", "1")
    shimmed.plant("key", KEYS["aes256"])
    kmi = await start_kmi(shimmed.settings())
    for iv in (None, os.urandom(12)):
        assert await fault_of(kmi, Encrypt("key", b"a text", iv=iv)) is Fault.UNAVAILABLE
    monkeypatch.setenv("SHIM_MAKE_IV", "1")
    kmi = await start_kmi(shimmed.settings(iv="hsm"))
    made = await encrypt(kmi, Encrypt("key", b"a text"))
    assert (await decrypt(kmi, opening(Encrypt("key", b"a text"), made))).plaintext == b"a text"


async def test_a_module_that_is_strict(shimmed: Hsm, start_kmi, open_manager, monkeypatch) -> None:
    """No read-only sessions, no key that may do more than it needs to."""
    monkeypatch.setenv("SHIM_STRICT", "1")
    open_manager(shimmed.settings()).create("key", KeySpec.AES_256)
    kmi = await start_kmi(shimmed.settings(lanes=2))
    assert kmi.state is KmiState.CONNECTED, kmi.error
    way = Encrypt("key", b"a text", aad=b"an aad")
    made = await encrypt(kmi, way)
    assert (await decrypt(kmi, opening(way, made))).plaintext == b"a text"


async def test_sm4_by_a_vendors_numbers(shimmed: Hsm, start_kmi, open_manager, monkeypatch) -> None:
    """The path of SM4 over a stand-in: behind the vendor's numbers AES-128 does the work."""
    monkeypatch.setenv("SHIM_VENDOR", "1")
    settings = shimmed.settings(sm4=SM4)
    manager = open_manager(settings)
    made_key = manager.create("sm4", KeySpec.SM4)
    assert (made_key.spec, made_key.problem) == (KeySpec.SM4, "")
    shimmed.plant("known", KEYS["aes128"])
    kmi = await start_kmi(settings)
    assert await submit(kmi, Describe("sm4")) == KeyDescription(
        "sm4", KeySpec.SM4, Usage.BOTH, 1, None
    )
    for form in CiphertextFormat:
        for algorithm in (None, Algorithm.SM4_GCM):
            for size in (0, 1, 500):
                way = Encrypt("known", os.urandom(size), algorithm, aad=b"an aad", format=form)
                made = await encrypt(kmi, way)
                assert made.algorithm is Algorithm.SM4_GCM
                assert made.ciphertext == by_cryptodome(KEYS["aes128"], way, made)
                assert (await decrypt(kmi, opening(way, made))).plaintext == way.plaintext
    way = Encrypt("sm4", b"x")
    first = await encrypt(kmi, way)
    manager.rotate("sm4")
    kmi.refresh(True)
    assert (await encrypt(kmi, way)).version == 2
    assert (await decrypt(kmi, opening(way, first))).plaintext == b"x"
    tampered = replace(opening(way, first), aad=b"not this")
    assert await fault_of(kmi, tampered) is Fault.INVALID_CIPHERTEXT
    assert await fault_of(kmi, Encrypt("sm4", b"x", Algorithm.AES_GCM)) is Fault.UNSUPPORTED
    assert restarts(kmi) == 0


async def test_sm4_with_an_iv_that_the_hsm_makes(shimmed: Hsm, start_kmi, monkeypatch) -> None:
    monkeypatch.setenv("SHIM_VENDOR", "1")
    monkeypatch.setenv("SHIM_MAKE_IV", "1")
    shimmed.plant("known", KEYS["aes128"])
    kmi = await start_kmi(shimmed.settings(sm4=SM4, iv="hsm"))
    way = Encrypt("known", b"a text", aad=b"an aad")
    made = [await encrypt(kmi, way) for _ in range(20)]
    assert len({m.iv for m in made}) == 20
    for m in made:
        assert m.ciphertext == by_cryptodome(KEYS["aes128"], way, m)


def test_sm4_without_a_vendors_numbers(manager) -> None:
    with pytest.raises(KeyManagerError, match=r"\[kmi.sm4\]"):
        manager.create("sm4", KeySpec.SM4)


@pytest.mark.parametrize("code", ["5", "6", "7", "20", "21", "40", "41", "42", "C0"])
async def test_a_module_with_odd_codes_for_a_wrong_tag(shimmed: Hsm, start_kmi, code: str) -> None:
    """CKR_GENERAL_ERROR and the like: the probe key says that the device is well."""
    shimmed.plant("key", KEYS["aes256"])
    kmi = await start_kmi(shimmed.settings())
    sealed = f"SHIM-RV:{code};".encode() + bytes(32)
    assert await fault_of(kmi, Decrypt("key", sealed, bytes(12), 1)) is Fault.INVALID_CIPHERTEXT
    assert restarts(kmi) == 0


@pytest.mark.parametrize("code", ["50", "200", "30000000", "80000001"])
async def test_a_code_that_says_nothing_of_the_ciphertext(
    shimmed: Hsm, start_kmi, code: str
) -> None:
    """Whoever hears that a ciphertext is wrong may throw it away."""
    shimmed.plant("key", KEYS["aes256"])
    kmi = await start_kmi(shimmed.settings())
    sealed = f"SHIM-RV:{code};".encode() + bytes(32)
    assert await fault_of(kmi, Decrypt("key", sealed, bytes(12), 1)) is Fault.INTERNAL
    assert restarts(kmi) == 0


@pytest.mark.parametrize("code", ["5", "6", "40", "50", "200", "80000001"])
async def test_a_decrypt_that_fails_for_a_moment(
    shimmed: Hsm, start_kmi, tmp_path: Path, monkeypatch, code: str
) -> None:
    planted = tmp_path / "planted"
    monkeypatch.setenv("SHIM_FAIL_DECRYPT", str(planted))
    shimmed.plant("key", KEYS["aes256"])
    kmi = await start_kmi(shimmed.settings())
    way = Encrypt("key", b"a text that is long enough for the shim", aad=b"an aad")
    made = await encrypt(kmi, way)
    planted.write_text(code)
    assert (await decrypt(kmi, opening(way, made))).plaintext == way.plaintext
    assert not planted.exists()
    assert restarts(kmi) == 0
    planted.write_text(code)  # and SoftHSM says something else of a wrong one, but for 5
    wrong = replace(opening(way, made), aad=b"another")
    assert await fault_of(kmi, wrong) is Fault.INVALID_CIPHERTEXT
    assert restarts(kmi) == (code != "5")


async def test_the_aad_of_the_envelope_binds_the_version(hsm: Hsm, kmi: QueuedKmi) -> None:
    """The same key material under two versions: a ciphertext of one is not one of the other."""
    hsm.plant("key", KEYS["aes256"])
    hsm.plant("key", KEYS["aes256"], "00000002")
    way = Encrypt("key", b"x", aad=b"y")
    made = await encrypt(kmi, way)
    assert made.version == 2
    cipher = AES.new(KEYS["aes256"], AES.MODE_GCM, nonce=made.iv)
    cipher.update(authenticated_data(b"y", 2))
    assert cipher.decrypt_and_verify(made.ciphertext[:-16], made.ciphertext[-16:]) == b"x"
    other = replace(opening(way, made), version=1)
    assert await fault_of(kmi, other) is Fault.INVALID_CIPHERTEXT
