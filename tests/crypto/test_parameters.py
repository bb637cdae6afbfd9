"""Which parameters go together."""

from __future__ import annotations

import pytest

from xkiproxy.crypto.algorithms import GCM_MODES, IV_SIZES, Algorithm, Padding
from xkiproxy.crypto.operations import (
    Decrypt,
    Decrypted,
    Encrypt,
    Encrypted,
    Fault,
    OperationError,
    RandomBytes,
    check_parameters,
)

BLOCK_MODES = sorted(set(Algorithm) - GCM_MODES)


def refused(operation: Encrypt | Decrypt) -> tuple[Fault, str]:
    with pytest.raises(OperationError) as caught:
        check_parameters(operation)
    return caught.value.fault, caught.value.parameter


@pytest.mark.parametrize("algorithm", [None, *Algorithm])
def test_iv_sizes(algorithm: Algorithm | None) -> None:
    right = IV_SIZES[algorithm or Algorithm.AES_GCM]
    check_parameters(Encrypt("k", b"", algorithm))
    for size in (0, 1, 11, 12, 13, 15, 16, 17):
        operations = (
            Encrypt("k", b"", algorithm, iv=bytes(size)),
            Decrypt("k", bytes(16), bytes(size), 1, algorithm),
        )
        for operation in operations:
            if size == right:
                check_parameters(operation)
            else:
                assert refused(operation) == (Fault.INVALID_PARAMETER, "iv")


@pytest.mark.parametrize("algorithm", [None, *sorted(GCM_MODES)])
@pytest.mark.parametrize("padding", Padding)
def test_gcm_takes_no_padding(algorithm: Algorithm | None, padding: Padding) -> None:
    operation = Encrypt("k", bytes(16), algorithm, padding)
    assert refused(operation) == (Fault.INVALID_PARAMETER, "padding")


@pytest.mark.parametrize("algorithm", BLOCK_MODES)
def test_block_modes_take_no_aad(algorithm: Algorithm) -> None:
    iv = bytes(IV_SIZES[algorithm])
    for operation in (
        Encrypt("k", bytes(16), algorithm, aad=b"x"),
        Decrypt("k", bytes(16), iv, 1, algorithm, aad=b"x"),
    ):
        assert refused(operation) == (Fault.INVALID_PARAMETER, "aad")


@pytest.mark.parametrize("algorithm", BLOCK_MODES)
def test_whole_blocks(algorithm: Algorithm) -> None:
    iv = bytes(IV_SIZES[algorithm])
    for size in (0, 16, 32):
        check_parameters(Encrypt("k", bytes(size), algorithm, Padding.NONE))
        check_parameters(Decrypt("k", bytes(size), iv, 1, algorithm, Padding.NONE))
    for size in (1, 15, 17):
        plain = Encrypt("k", bytes(size), algorithm, Padding.NONE)
        assert refused(plain) == (Fault.INVALID_PARAMETER, "plaintext")
        check_parameters(Encrypt("k", bytes(size), algorithm))
        for padding in (None, *Padding):
            sealed = Decrypt("k", bytes(size), iv, 1, algorithm, padding)
            assert refused(sealed) == (Fault.INVALID_CIPHERTEXT, "")
    empty = Decrypt("k", b"", iv, 1, algorithm)
    assert refused(empty) == (Fault.INVALID_CIPHERTEXT, "")


@pytest.mark.parametrize("algorithm", [None, *sorted(GCM_MODES)])
def test_a_gcm_ciphertext_has_a_tag(algorithm: Algorithm | None) -> None:
    check_parameters(Decrypt("k", bytes(16), bytes(12), 1, algorithm))
    short = Decrypt("k", bytes(15), bytes(12), 1, algorithm)
    assert refused(short) == (Fault.INVALID_CIPHERTEXT, "")


def test_no_repr_shows_what_is_secret() -> None:
    secret = b"SECRET"
    for thing in (
        Encrypt("k", secret, aad=secret),
        Encrypted(secret, b"", 1, Algorithm.AES_GCM, None),
        Decrypt("k", secret, b"", 1, aad=secret),
        Decrypted(secret, 1, Algorithm.AES_GCM, None),
        RandomBytes(secret),
    ):
        assert "SECRET" not in repr(thing)
