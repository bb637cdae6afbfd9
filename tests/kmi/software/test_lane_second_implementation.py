"""What the lane writes, others read, and the other way round.

AES: PyCryptodome. SM4: GCM after NIST SP 800-38D, written here, over gmssl's block cipher.
"""

from __future__ import annotations

import itertools
from os import urandom

import pytest
from Cryptodome.Cipher import AES
from Cryptodome.Util.Padding import pad, unpad
from gmssl.sm4 import SM4_ENCRYPT, CryptSM4

from xkiproxy.crypto.algorithms import ALGORITHMS, GCM_MODES, KEY_SIZES, Algorithm, KeySpec, Padding
from xkiproxy.crypto.envelope import METADATA_SIZE, authenticated_data, key_version, metadata
from xkiproxy.crypto.operations import CiphertextFormat, Decrypt, Decrypted, Encrypt, Encrypted
from xkiproxy.kmi.software import SoftwareLane

VERSION = 3


def _multiply(x: int, y: int) -> int:
    """The product in GF(2**128) of SP 800-38D section 6.3."""
    product = 0
    for bit in range(127, -1, -1):
        if y >> bit & 1:
            product ^= x
        x = x >> 1 ^ (0xE1 << 120 if x & 1 else 0)
    return product


class Sm4Gcm:
    def __init__(self, key: bytes) -> None:
        self._cipher = CryptSM4()
        self._cipher.set_key(key, SM4_ENCRYPT)
        self._h = int.from_bytes(self._block(bytes(16)))

    def _block(self, block: bytes) -> bytes:
        return bytes(self._cipher.one_round(self._cipher.sk, list(block)))

    def _xor_stream(self, iv: bytes, data: bytes) -> bytes:
        stream = b"".join(
            self._block(iv + counter.to_bytes(4)) for counter in range(2, 2 + -(-len(data) // 16))
        )
        return bytes(a ^ b for a, b in zip(data, stream, strict=False))

    def _tag(self, iv: bytes, aad: bytes, data: bytes) -> bytes:
        blocks = aad + bytes(-len(aad) % 16) + data + bytes(-len(data) % 16)
        blocks += (len(aad) * 8).to_bytes(8) + (len(data) * 8).to_bytes(8)
        y = 0
        for start in range(0, len(blocks), 16):
            y = _multiply(y ^ int.from_bytes(blocks[start : start + 16]), self._h)
        return (y ^ int.from_bytes(self._block(iv + b"\0\0\0\1"))).to_bytes(16)

    def encrypt(self, iv: bytes, text: bytes, aad: bytes) -> bytes:
        data = self._xor_stream(iv, text)
        return data + self._tag(iv, aad, data)

    def decrypt(self, iv: bytes, sealed: bytes, aad: bytes) -> bytes:
        data, tag = sealed[:-16], sealed[-16:]
        assert self._tag(iv, aad, data) == tag
        return self._xor_stream(iv, data)


def _second_encrypt(
    key: bytes, algorithm: Algorithm, padding: Padding | None, iv: bytes, text: bytes, aad: bytes
) -> bytes:
    if algorithm is Algorithm.SM4_GCM:
        return Sm4Gcm(key).encrypt(iv, text, aad)
    if algorithm is Algorithm.AES_GCM:
        cipher = AES.new(key, AES.MODE_GCM, nonce=iv)
        cipher.update(aad)
        return b"".join(cipher.encrypt_and_digest(text))
    if padding is Padding.PKCS7:
        text = pad(text, 16)
    return _aes_blocks(key, algorithm, iv).encrypt(text)


def _second_decrypt(
    key: bytes, algorithm: Algorithm, padding: Padding | None, iv: bytes, sealed: bytes, aad: bytes
) -> bytes:
    if algorithm is Algorithm.SM4_GCM:
        return Sm4Gcm(key).decrypt(iv, sealed, aad)
    if algorithm is Algorithm.AES_GCM:
        cipher = AES.new(key, AES.MODE_GCM, nonce=iv)
        cipher.update(aad)
        return cipher.decrypt_and_verify(sealed[:-16], sealed[-16:])
    text = _aes_blocks(key, algorithm, iv).decrypt(sealed)
    return unpad(text, 16) if padding is Padding.PKCS7 else text


def _aes_blocks(key: bytes, algorithm: Algorithm, iv: bytes):
    if algorithm is Algorithm.AES_CBC:
        return AES.new(key, AES.MODE_CBC, iv=iv)
    assert iv == b""
    return AES.new(key, AES.MODE_ECB)


CASES = [
    (spec, algorithm, padding, form)
    for spec in KeySpec
    for algorithm in ALGORITHMS[spec]
    for padding in ([None] if algorithm in GCM_MODES else Padding)
    for form in CiphertextFormat
]


@pytest.mark.parametrize(("spec", "algorithm", "padding", "form"), CASES)
def test_both_ways(spec, algorithm, padding, form, plant, lane: SoftwareLane) -> None:
    key = urandom(KEY_SIZES[spec])
    raw = form is CiphertextFormat.RAW
    plant("k", spec, {VERSION: key} if raw else {1: urandom(len(key)), VERSION: key})
    lane.refresh()
    sizes = [0, 16, 48, 6144] if padding is Padding.NONE else [0, 1, 15, 16, 17, 47, 6145]
    for size, aad in itertools.product(sizes, [b"", b"context"]):
        if aad and algorithm not in GCM_MODES:
            continue
        text = urandom(size)
        bound = aad if raw else authenticated_data(aad, VERSION)
        made = lane.execute(Encrypt("k", text, algorithm, padding, aad=aad, format=form))
        assert isinstance(made, Encrypted)
        assert (made.version, made.algorithm, made.padding) == (VERSION, algorithm, padding)
        assert _second_decrypt(key, algorithm, padding, made.iv, made.ciphertext, bound) == text
        iv = urandom(len(made.iv))
        sealed = _second_encrypt(key, algorithm, padding, iv, text, bound)
        version = None if raw else VERSION
        back = lane.execute(Decrypt("k", sealed, iv, version, algorithm, padding, aad, form))
        assert back == Decrypted(text, VERSION, algorithm, padding)


def test_the_blob_names_its_version(plant, lane: SoftwareLane) -> None:
    """The whole envelope, taken apart by hand."""
    key = urandom(32)
    plant("k", KeySpec.AES_256, {7: key})
    lane.refresh()
    made = lane.execute(Encrypt("k", b"text", aad=b"ctx"))
    assert isinstance(made, Encrypted)
    blob = metadata(made.version) + made.ciphertext
    assert blob[:METADATA_SIZE] == b"\x01\x00\x00\x00\x07"
    assert key_version(blob[:METADATA_SIZE]) == 7
    cipher = AES.new(key, AES.MODE_GCM, nonce=made.iv)
    cipher.update(b"\x00\x03ctx\x05\x01\x00\x00\x00\x07")
    assert cipher.decrypt_and_verify(blob[METADATA_SIZE:-16], blob[-16:]) == b"text"
