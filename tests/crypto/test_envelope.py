"""The ciphertext envelope."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xkiproxy.crypto.envelope import (
    MAX_AAD_SIZE,
    METADATA_SIZE,
    authenticated_data,
    key_version,
    metadata,
)
from xkiproxy.crypto.operations import Fault, OperationError

VERSIONS = st.integers(1, 2**32 - 1)
AADS = st.binary(max_size=64)


@given(VERSIONS)
def test_a_version_comes_back(version: int) -> None:
    data = metadata(version)
    assert len(data) == METADATA_SIZE
    assert key_version(data) == version


def test_the_bytes() -> None:
    assert metadata(0x01020304) == bytes.fromhex("0101020304")
    assert authenticated_data(b"ab", 3) == bytes.fromhex("0002 6162 05 0100000003")
    assert authenticated_data(b"", 1) == bytes.fromhex("0000 05 0100000001")
    longest = bytes(MAX_AAD_SIZE)
    assert authenticated_data(longest, 1)[:2] == b"\xff\xff"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        metadata(1)[:-1],
        metadata(1) + b"\0",
        b"\x00\0\0\0\1",
        b"\x02\0\0\0\1",
        b"\x01\0\0\0\0",
    ],
)
def test_what_is_no_metadata(data: bytes) -> None:
    with pytest.raises(OperationError) as caught:
        key_version(data)
    assert caught.value.fault is Fault.INVALID_CIPHERTEXT


@given(AADS, VERSIONS, AADS, VERSIONS)
def test_no_two_authenticate_the_same(
    aad: bytes, version: int, other_aad: bytes, other_version: int
) -> None:
    same = authenticated_data(aad, version) == authenticated_data(other_aad, other_version)
    assert same == ((aad, version) == (other_aad, other_version))
