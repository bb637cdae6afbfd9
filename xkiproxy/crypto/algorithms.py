"""Key specs, algorithms and paddings, and which of them go together.

Names are those of NIST SP 800-38A/38D, GB/T 32907 and RFC 8998. The tables are the single
place that says which key does what; protocols translate their own names to these.
"""

from __future__ import annotations

from enum import Flag, StrEnum


class KeySpec(StrEnum):
    """The type and size of a symmetric key."""

    AES_256 = "AES_256"
    AES_192 = "AES_192"
    AES_128 = "AES_128"
    SM4 = "SM4"


class Algorithm(StrEnum):
    """A block cipher with its mode of operation."""

    AES_GCM = "AES_GCM"
    AES_CBC = "AES_CBC"
    AES_ECB = "AES_ECB"
    SM4_GCM = "SM4_GCM"


class Padding(StrEnum):
    """How a plaintext is filled up to whole blocks (PKCS #7: RFC 5652 section 6.3)."""

    PKCS7 = "PKCS7_PADDING"
    NONE = "NO_PADDING"


class Usage(Flag):
    """What a key may be used for."""

    ENCRYPT = 1
    DECRYPT = 2
    BOTH = 3


BLOCK_SIZE = 16
"""Bytes in a block of AES and of SM4."""

TAG_SIZE = 16
"""Bytes in a GCM tag; shorter tags are never used."""

KEY_SIZES = {KeySpec.AES_256: 32, KeySpec.AES_192: 24, KeySpec.AES_128: 16, KeySpec.SM4: 16}
"""Key size in bytes."""

IV_SIZES = {
    Algorithm.AES_GCM: 12,
    Algorithm.SM4_GCM: 12,
    Algorithm.AES_CBC: 16,
    Algorithm.AES_ECB: 0,
}
"""Initialization vector in bytes; 0 where the mode has none."""

GCM_MODES = frozenset({Algorithm.AES_GCM, Algorithm.SM4_GCM})
"""The modes that authenticate: they take an AAD, make a tag and use no padding."""

ALGORITHMS = {
    KeySpec.AES_256: (Algorithm.AES_GCM, Algorithm.AES_CBC, Algorithm.AES_ECB),
    KeySpec.AES_192: (Algorithm.AES_GCM, Algorithm.AES_CBC, Algorithm.AES_ECB),
    KeySpec.AES_128: (Algorithm.AES_GCM, Algorithm.AES_CBC, Algorithm.AES_ECB),
    KeySpec.SM4: (Algorithm.SM4_GCM,),
}
"""What a key of each spec can do; the first is what it does when nothing is asked for."""
