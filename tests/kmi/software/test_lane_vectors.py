"""The software lane against published vectors: NIST CAVP, RFC 8998, GB/T 32907."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cryptography_vectors
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, modes

from xkiproxy.crypto.algorithms import Algorithm, KeySpec, Padding
from xkiproxy.crypto.operations import (
    CiphertextFormat,
    Decrypt,
    Decrypted,
    Encrypt,
    Encrypted,
    Fault,
    OperationError,
)
from xkiproxy.kmi.software import SoftwareLane
from xkiproxy.kmi.software.lane import _Version

CIPHERS = Path(cryptography_vectors.__file__).parent / "ciphers"
RAW = CiphertextFormat.RAW
BLOCK_FILES = sorted([*CIPHERS.glob("AES/CBC/*.rsp"), *CIPHERS.glob("AES/ECB/*.rsp")])


def vectors(file: Path) -> Iterator[dict[str, str]]:
    """The vectors of a .rsp file, each with the [sections] that it stands under."""
    section: dict[str, str] = {}
    vector: dict[str, str] = {}
    for line in [*file.read_text().splitlines(), "COUNT = end"]:
        name, _, value = (part.strip() for part in line.strip("[]").partition("="))
        if line.startswith("["):
            section[name.lower() if value else "direction"] = value or name
        elif name.lower() == "count":
            if vector:
                yield vector
            vector = {**section}
        elif line == "FAIL":
            vector["fail"] = "yes"
        elif value or line.endswith("=") or line.endswith("= "):
            vector[name.lower()] = value


@pytest.mark.parametrize("name", sorted(p.name for p in CIPHERS.glob("AES/GCM/*.rsp")))
def test_aes_gcm(name: str, plant, lane: SoftwareLane) -> None:
    count = 0
    wanted = [
        vector
        for vector in vectors(CIPHERS / "AES/GCM" / name)
        if vector["ivlen"] == "96" and vector["taglen"] == "128"
    ]
    for number, vector in enumerate(wanted):
        key = bytes.fromhex(vector["key"])
        plant(str(number), KeySpec(f"AES_{len(key) * 8}"), {1: key})
    lane.refresh()
    for number, vector in enumerate(wanted):
        iv, aad = bytes.fromhex(vector["iv"]), bytes.fromhex(vector["aad"])
        sealed = bytes.fromhex(vector["ct"] + vector["tag"])
        decrypt = Decrypt(str(number), sealed, iv, None, aad=aad, format=RAW)
        if "fail" in vector:
            with pytest.raises(OperationError) as caught:
                lane.execute(decrypt)
            assert caught.value.fault is Fault.INVALID_CIPHERTEXT
        else:
            plaintext = bytes.fromhex(vector["pt"])
            assert lane.execute(decrypt) == Decrypted(plaintext, 1, Algorithm.AES_GCM, None)
            encrypt = Encrypt(str(number), plaintext, iv=iv, aad=aad, format=RAW)
            assert lane.execute(encrypt) == Encrypted(sealed, iv, 1, Algorithm.AES_GCM, None)
        count += 1
    assert count >= 300


@pytest.mark.parametrize("file", BLOCK_FILES, ids=lambda file: file.stem)
def test_aes_block_modes(file: Path, plant, lane: SoftwareLane) -> None:
    algorithm = Algorithm(f"AES_{file.parent.name}")
    wanted = list(vectors(file))[:40]
    for number, vector in enumerate(wanted):
        key = bytes.fromhex(vector["key"])
        plant(str(number), KeySpec(f"AES_{len(key) * 8}"), {1: key})
    lane.refresh()
    for number, vector in enumerate(wanted):
        iv = bytes.fromhex(vector.get("iv", ""))
        text, sealed = bytes.fromhex(vector["plaintext"]), bytes.fromhex(vector["ciphertext"])
        encrypt = Encrypt(str(number), text, algorithm, Padding.NONE, iv, format=RAW)
        assert lane.execute(encrypt) == Encrypted(sealed, iv, 1, algorithm, Padding.NONE)
        decrypt = Decrypt(str(number), sealed, iv, None, algorithm, Padding.NONE, format=RAW)
        assert lane.execute(decrypt) == Decrypted(text, 1, algorithm, Padding.NONE)
    assert len(wanted) >= 10


def test_sm4_gcm_of_rfc_8998(plant, lane: SoftwareLane) -> None:
    (vector,) = vectors(CIPHERS / "SM4/rfc8998.txt")
    plant("sm4", KeySpec.SM4, {1: bytes.fromhex(vector["key"])})
    iv, aad, text = (bytes.fromhex(vector[name]) for name in ("iv", "aad", "plaintext"))
    sealed = bytes.fromhex(vector["ciphertext"] + vector["tag"])
    encrypted = lane.execute(Encrypt("sm4", text, iv=iv, aad=aad, format=RAW))
    assert encrypted == Encrypted(sealed, iv, 1, Algorithm.SM4_GCM, None)
    decrypted = lane.execute(Decrypt("sm4", sealed, iv, None, aad=aad, format=RAW))
    assert decrypted == Decrypted(text, 1, Algorithm.SM4_GCM, None)


def test_sm4_block_of_gbt_32907() -> None:
    found = list(vectors(CIPHERS / "SM4/draft-ribose-cfrg-sm4-10-ecb.txt"))
    for vector in found:
        block = _Version(KeySpec.SM4, bytes.fromhex(vector["key"])).block
        encryptor = Cipher(block, modes.ECB()).encryptor()
        assert encryptor.update(bytes.fromhex(vector["plaintext"])).hex() == vector["ciphertext"]
    assert len(found) == 4
