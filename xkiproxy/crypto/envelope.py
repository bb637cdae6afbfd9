"""The ciphertext envelope: how a ciphertext names its key version, bound against exchange.

Key versions belong to the KMI, so a ciphertext must say which one made it. The metadata is
`0x01 || key version (4 bytes, big-endian)`. Under GCM the KMI authenticates
`len(aad) (2 bytes BE) || aad || len(metadata) (1 byte) || metadata`: with the lengths inside,
no metadata can ever pass for an AAD, nor the other way round (AWS XKS API, "metadata in the AAD").
"""

from __future__ import annotations

import hashlib
import struct

from xkiproxy.crypto.operations import Fault, OperationError, invalid_ciphertext

METADATA_SIZE = 5
"""Bytes of metadata in front of (XKI) or beside (XKS) a ciphertext."""

MAX_AAD_SIZE = 0xFFFF
"""Bytes of AAD that the two-byte length can say."""

_FORMAT = 1
_METADATA = struct.Struct(">BI")
_AAD_LENGTH = struct.Struct(">H")


def metadata(version: int) -> bytes:
    """The 5 bytes that name a key version (1 to 2**32 - 1)."""
    return _METADATA.pack(_FORMAT, version)


def key_version(data: bytes) -> int:
    """The key version that 5 bytes of metadata name.

    Raises:
        OperationError: `INVALID_CIPHERTEXT`, if these are not such metadata.
    """
    if len(data) != METADATA_SIZE:
        raise invalid_ciphertext()
    form, version = _METADATA.unpack(data)
    if form != _FORMAT or version == 0:
        raise invalid_ciphertext()
    return int(version)


def version_unknown() -> OperationError:
    """A raw ciphertext names no version: it can only belong to a key that has one."""
    return OperationError(
        Fault.UNSUPPORTED,
        "The key was rotated, and a raw ciphertext cannot say which version made it.",
    )


def integrity_value(aad: bytes, metadata_: bytes, iv: bytes, ciphertext: bytes) -> bytes:
    """SHA-256 over all that is stored of an encryption: 32 bytes.

    `ciphertext` ends with its tag; `metadata_` is empty in the raw format. (AWS XKS API,
    "ciphertextDataIntegrityValue".)
    """
    return hashlib.sha256(b"%b%b%b%b" % (aad, metadata_, iv, ciphertext)).digest()


def authenticated_data(aad: bytes, version: int) -> bytes:
    """What a KMI authenticates under a GCM mode: AAD and metadata, each with its length.

    `aad` is at most 65,535 bytes (protocols refuse longer ones before this).
    """
    return b"%b%b\x05%b" % (_AAD_LENGTH.pack(len(aad)), aad, _METADATA.pack(_FORMAT, version))
