"""Wrapping random bytes under a caller's public key: RSAES-OAEP and SM2 encryption.

RSAES-OAEP follows RFC 8017 section 7.1, with MGF1 over the same hash and an empty label. SM2
follows GM/T 0003.4 section 6 (GB/T 32918.4), and its ciphertext is the ASN.1 SEQUENCE of GM/T 0009
section 7.2: INTEGER x, INTEGER y, OCTET STRING hash (C3), OCTET STRING ciphertext (C2).

`cryptography` has SM3 and a KDF, but no SM2 encryption: the multiplication of points on the SM2
curve, and nothing else, comes from `gmssl`. What gmssl 3.2.2 does around it must not be used:

- `CryptSM2.encrypt` draws the ephemeral k with `func.random_hex`, from the `random` module: who has
  seen some outputs knows the next k, and with it every plaintext. k is drawn with `secrets` here.
- `CryptSM2(public_key=...)` strips a leading "04" with `lstrip`, which eats every leading 0 and 4
  of X too. The constructor gets no key here; the point goes straight to the multiplication.
- `encrypt` returns None where the KDF's output is all zeros (1 in 256 for a single byte). GM/T
  0003.4 step A5 wants another k, and gets one here.
- `decrypt` computes C3 and never compares it. Nothing is decrypted here.
- Neither the point nor its coordinates are ever checked. They are here, when a key is loaded.
- It is not constant-time. k is used once, so that timings of many wrappings tell nothing together.

Wrapping under SM2 takes many milliseconds in pure Python: `wrap` is to be called in a thread.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from Cryptodome.Util.asn1 import DerInteger, DerOctetString, DerSequence
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey, RSAPublicNumbers
from cryptography.hazmat.primitives.kdf.x963kdf import X963KDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)
from gmssl import sm2


class WrappingKeySpec(StrEnum):
    """The type and size of a public key that wraps."""

    RSA_2048 = "RSA_2048"
    EC_SM2 = "EC_SM2"


class WrappingAlgorithm(StrEnum):
    """How bytes are encrypted under a public key."""

    RSAES_OAEP_SHA1 = "RSAES_OAEP_SHA1"
    RSAES_OAEP_SHA256 = "RSAES_OAEP_SHA256"
    SM2PKE = "SM2PKE"


class WrappingError(ValueError):
    """Bytes cannot be wrapped as asked; the text may be sent to the client."""


class PublicKeyError(WrappingError):
    """The public key cannot be used."""


class WrappingAlgorithmError(WrappingError):
    """The algorithm does not go with the key."""


class WrappingLengthError(WrappingError):
    """There are too few or too many bytes for the algorithm."""


@dataclass(frozen=True, slots=True)
class Sm2PublicKey:
    """A point on the SM2 curve: 32 bytes of X, 32 bytes of Y, big-endian."""

    point: bytes


PublicKey = RSAPublicKey | Sm2PublicKey


@dataclass(frozen=True, slots=True)
class Wrapping:
    """How to wrap: the algorithm, and the key as a SubjectPublicKeyInfo in DER."""

    algorithm: WrappingAlgorithm
    public_key_der: bytes


ALGORITHMS: Final = {
    WrappingKeySpec.RSA_2048: (
        WrappingAlgorithm.RSAES_OAEP_SHA1,
        WrappingAlgorithm.RSAES_OAEP_SHA256,
    ),
    WrappingKeySpec.EC_SM2: (WrappingAlgorithm.SM2PKE,),
}
"""The algorithms that go with each kind of key."""

_SPECS: Final = {algorithm: spec for spec, names in ALGORITHMS.items() for algorithm in names}

MAX_LENGTHS: Final = {
    WrappingAlgorithm.RSAES_OAEP_SHA1: 214,
    WrappingAlgorithm.RSAES_OAEP_SHA256: 190,
    WrappingAlgorithm.SM2PKE: 1024,
}
"""Bytes that can be wrapped: RFC 8017's k - 2 hLen - 2 for 2048 bits; for SM2 a limit of ours."""

_RSA_BITS = 2048
_MIN_EXPONENT = 65537
_MAX_EXPONENT_BITS = 256

_SM2_P: Final = int(sm2.default_ecc_table["p"], 16)
_SM2_A: Final = int(sm2.default_ecc_table["a"], 16)
_SM2_B: Final = int(sm2.default_ecc_table["b"], 16)
_SM2_N: Final = int(sm2.default_ecc_table["n"], 16)
_SM2_G: Final = bytes.fromhex(sm2.default_ecc_table["g"])
_CURVE: Final = sm2.CryptSM2(private_key="", public_key="")
_COORDINATE_SIZE = 32

# SubjectPublicKeyInfo (RFC 5480) up to X: id-ecPublicKey, curve 1.2.156.10197.1.301, a BIT STRING
# of 65 bytes, and the 0x04 of an uncompressed point. With 64 bytes of X and Y the form is complete.
_SM2_PREFIX: Final = bytes.fromhex("3059301306072a8648ce3d020106082a811ccf5501822d03420004")


def check_wrapping(spec: WrappingKeySpec, algorithm: WrappingAlgorithm, length: int) -> None:
    """Refuse an algorithm that does not go with a key, or a number of bytes that it cannot wrap.

    Raises:
        WrappingAlgorithmError, WrappingLengthError: both are ValueErrors.
    """
    if algorithm not in ALGORITHMS[spec]:
        known = " or ".join(ALGORITHMS[spec])
        raise WrappingAlgorithmError(f"a key of {spec} wraps with {known}, not {algorithm}")
    if not 1 <= length <= MAX_LENGTHS[algorithm]:
        limit = MAX_LENGTHS[algorithm]
        raise WrappingLengthError(f"{algorithm} wraps 1 to {limit} bytes, not {length}")


def load_public_key(der: bytes, spec: WrappingKeySpec) -> PublicKey:
    """Load a SubjectPublicKeyInfo (RFC 5280; DER and nothing after it) of the given kind.

    RSA_2048 wants a modulus of exactly 2048 bits and an odd exponent of 65537 to 2**256 (the range
    of FIPS 186-5); EC_SM2 an uncompressed point on the SM2 curve (RFC 8998), named by its OID.

    Raises:
        PublicKeyError: a ValueError; whatever else the bytes are.
    """
    return _load_rsa(der) if spec is WrappingKeySpec.RSA_2048 else _load_sm2(der)


def wrap(wrapping: Wrapping, data: bytes) -> bytes:
    """Encrypt `data`: 256 bytes under RSA, a DER SEQUENCE of GM/T 0009 under SM2.

    Raises:
        WrappingLengthError: as `check_wrapping`.
        PublicKeyError: as `load_public_key`.
    """
    algorithm = wrapping.algorithm
    spec = _SPECS[algorithm]
    check_wrapping(spec, algorithm, len(data))
    key = load_public_key(wrapping.public_key_der, spec)
    if isinstance(key, Sm2PublicKey):
        return _wrap_sm2(key, data)
    return _wrap_rsa(key, algorithm, data)


def _load_rsa(der: bytes) -> RSAPublicKey:
    try:
        key = load_der_public_key(der)
        # Written again it must be the same: no other encoding, no RSASSA-PSS key, nothing after it.
        canonical = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == der
    except (ValueError, UnsupportedAlgorithm):
        raise PublicKeyError("the public key is not a SubjectPublicKeyInfo in DER") from None
    if not isinstance(key, RSAPublicKey) or not canonical:
        raise PublicKeyError("the public key is not an RSA SubjectPublicKeyInfo in DER")
    _check_rsa_numbers(key.public_numbers())
    return key


def _check_rsa_numbers(numbers: RSAPublicNumbers) -> None:
    bits = numbers.n.bit_length()
    if bits != _RSA_BITS:
        raise PublicKeyError(f"the RSA key has {bits} bits, not {_RSA_BITS}")
    if numbers.n % 2 == 0:
        raise PublicKeyError("the RSA modulus is even")
    too_long = numbers.e.bit_length() > _MAX_EXPONENT_BITS
    if numbers.e < _MIN_EXPONENT or numbers.e % 2 == 0 or too_long:
        raise PublicKeyError("the RSA exponent must be odd, 65537 or more, and below 2**256")


def _load_sm2(der: bytes) -> Sm2PublicKey:
    point = der[len(_SM2_PREFIX) :]
    if not der.startswith(_SM2_PREFIX) or len(point) != 2 * _COORDINATE_SIZE:
        raise PublicKeyError(
            "the public key is not an SM2 SubjectPublicKeyInfo in DER with an uncompressed point"
        )
    x, y = _coordinates(point)
    # The curve's order is prime: any point but infinity (which has no such form) is good.
    on_curve = (y * y - (x * x * x + _SM2_A * x + _SM2_B)) % _SM2_P == 0
    if x >= _SM2_P or y >= _SM2_P or not on_curve:
        raise PublicKeyError("the public key is not a point on the SM2 curve")
    return Sm2PublicKey(point)


def _coordinates(point: bytes) -> tuple[int, int]:
    x, y = point[:_COORDINATE_SIZE], point[_COORDINATE_SIZE:]
    return int.from_bytes(x, "big"), int.from_bytes(y, "big")


def _wrap_rsa(key: RSAPublicKey, algorithm: WrappingAlgorithm, data: bytes) -> bytes:
    # SHA-1 is sound in OAEP, which needs no collision resistance, and it is what KMS asks for.
    sha1 = algorithm is WrappingAlgorithm.RSAES_OAEP_SHA1
    digest: hashes.HashAlgorithm = hashes.SHA1() if sha1 else hashes.SHA256()  # noqa: S303
    return key.encrypt(data, padding.OAEP(padding.MGF1(digest), digest, label=None))


def _wrap_sm2(key: Sm2PublicKey, data: bytes) -> bytes:
    wrapped = None
    while wrapped is None:
        wrapped = _encrypt_sm2(key, 1 + secrets.randbelow(_SM2_N - 1), data)
    return wrapped


def _encrypt_sm2(key: Sm2PublicKey, k: int, data: bytes) -> bytes | None:
    """GM/T 0003.4 section 6.1 with the ephemeral `k`; None where it asks for another k."""
    c1 = _multiply(k, _SM2_G)
    shared = _multiply(k, key.point)
    mask = X963KDF(hashes.SM3(), len(data), sharedinfo=None).derive(shared)
    if not any(mask):
        return None
    c2 = bytes(a ^ b for a, b in zip(data, mask, strict=True))
    digest = hashes.Hash(hashes.SM3())
    digest.update(shared[:_COORDINATE_SIZE] + data + shared[_COORDINATE_SIZE:])
    return _ciphertext_der(c1, digest.finalize(), c2)


def _ciphertext_der(c1: bytes, c3: bytes, c2: bytes) -> bytes:
    """The SM2Cipher of GM/T 0009."""
    x, y = _coordinates(c1)
    fields = [DerInteger(x), DerInteger(y), DerOctetString(c3), DerOctetString(c2)]
    return bytes(DerSequence(fields).encode())


def _multiply(k: int, point: bytes) -> bytes:
    """`k` (1 to n - 1) times a point; a point is 32 bytes of X and 32 bytes of Y."""
    return bytes.fromhex(_CURVE._kg(k, point.hex()))
