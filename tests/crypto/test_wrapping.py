"""Wrapping, checked by decrypting with OpenSSL, and every key that must be refused."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from xkiproxy.crypto import wrapping
from xkiproxy.crypto.wrapping import (
    PublicKeyError,
    Sm2PublicKey,
    Wrapping,
    WrappingAlgorithm,
    WrappingAlgorithmError,
    WrappingKeySpec,
    WrappingLengthError,
    check_wrapping,
    load_public_key,
    wrap,
)

SM2_PREFIX = bytes.fromhex("3059301306072a8648ce3d020106082a811ccf5501822d03420004")
P = int("FFFFFFFEFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF00000000FFFFFFFFFFFFFFFF", 16)

# The example of GM/T 0003.5 annex C.
GMT_POINT = bytes.fromhex(
    "09F9DF311E5421A150DD7D161E4BC5C672179FAD1833FC076BB08FF356F35020"
    "CCEA490CE26775A52DC6EA718CC1AA600AED05FBF35E084A6632F6072DA9AD13"
)
GMT_K = int("59276E27D506861A16680F3AD9C02DCCEF3CC1FA3CDBE4CE6D54B80DEAC1BC21", 16)
GMT_C1_X = "04EBFC718E8D1798620432268E77FEB6415E2EDE0E073C0F4F640ECD2E149A73"
GMT_C1_Y = "E858F9D81E5430A57B36DAAB8F950A3C64E6EE6A63094D99283AFF767E124DF0"
GMT_C3 = "59983C18F809E262923C53AEC295D30383B54E39D609D160AFCB1908D0BD8766"
GMT_C2 = "21886CA989CA9C7D58087307CA93092D651EFA"


def openssl(*arguments: str | Path) -> bytes:
    return subprocess.run(["openssl", *arguments], check=True, capture_output=True).stdout


def sm2_key(directory: Path) -> tuple[Path, bytes]:
    """A private key file and the SubjectPublicKeyInfo that OpenSSL writes of it."""
    key = directory / "sm2.pem"
    openssl("genpkey", "-algorithm", "SM2", "-out", key)
    return key, openssl("pkey", "-in", key, "-pubout", "-outform", "DER")


def sm2_key_like(directory: Path, wanted: Callable[[bytes], bool]) -> tuple[Path, bytes]:
    for _ in range(3000):
        key, der = sm2_key(directory)
        if wanted(der[len(SM2_PREFIX) :]):
            return key, der
    pytest.fail("no such key was drawn")


def decrypt(key: Path, wrapped: bytes, directory: Path, *options: str) -> bytes:
    file = directory / "wrapped"
    file.write_bytes(wrapped)
    return openssl("pkeyutl", "-decrypt", "-inkey", key, "-in", file, *options)


def rsa_der(bits: int, exponent: int = 65537) -> bytes:
    key = rsa.generate_private_key(exponent, bits).public_key()  # type: ignore[arg-type]
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def rsa_der_of(n: int, e: int) -> bytes:
    def tlv(tag: int, value: bytes) -> bytes:
        size = len(value)
        head = bytes([size]) if size < 128 else b"\x82" + size.to_bytes(2, "big")
        return bytes([tag]) + head + value

    def integer(value: int) -> bytes:
        return tlv(2, value.to_bytes(value.bit_length() // 8 + 1, "big"))

    name = bytes.fromhex("300d06092a864886f70d0101010500")
    return tlv(0x30, name + tlv(3, b"\x00" + tlv(0x30, integer(n) + integer(e))))


@pytest.fixture(scope="module")
def rsa_2048(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    key = tmp_path_factory.mktemp("rsa") / "rsa.pem"
    openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", key)
    return key, openssl("pkey", "-in", key, "-pubout", "-outform", "DER")


@pytest.mark.parametrize(
    ("algorithm", "digest", "lengths"),
    [
        (WrappingAlgorithm.RSAES_OAEP_SHA1, "sha1", (1, 32, 214)),
        (WrappingAlgorithm.RSAES_OAEP_SHA256, "sha256", (1, 32, 190)),
    ],
)
def test_openssl_decrypts_oaep(
    rsa_2048: tuple[Path, bytes],
    tmp_path: Path,
    algorithm: WrappingAlgorithm,
    digest: str,
    lengths: tuple[int, ...],
) -> None:
    key, der = rsa_2048
    options = ("rsa_padding_mode:oaep", f"rsa_oaep_md:{digest}", f"rsa_mgf1_md:{digest}")
    flags = [flag for option in options for flag in ("-pkeyopt", option)]
    for length in lengths:
        data = bytes(range(256))[:length]
        wrapped = wrap(Wrapping(algorithm, der), data)
        assert len(wrapped) == 256
        assert decrypt(key, wrapped, tmp_path, *flags) == data


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 1024])
def test_openssl_decrypts_sm2(tmp_path: Path, length: int) -> None:
    key, der = sm2_key(tmp_path)
    data = bytes(i % 256 for i in range(length))
    wrapped = wrap(Wrapping(WrappingAlgorithm.SM2PKE, der), data)
    assert decrypt(key, wrapped, tmp_path) == data


@pytest.mark.parametrize("start", ["04", "00", "40"])
def test_no_digit_of_x_is_lost(tmp_path: Path, start: str) -> None:
    key, der = sm2_key_like(tmp_path, lambda point: point.hex().startswith(start))
    wrapped = wrap(Wrapping(WrappingAlgorithm.SM2PKE, der), b"0123456789abcdef")
    assert decrypt(key, wrapped, tmp_path) == b"0123456789abcdef"


def test_no_digit_of_y_is_lost(tmp_path: Path) -> None:
    key, der = sm2_key_like(tmp_path, lambda point: point[32] == 0)
    wrapped = wrap(Wrapping(WrappingAlgorithm.SM2PKE, der), b"0123456789abcdef")
    assert decrypt(key, wrapped, tmp_path) == b"0123456789abcdef"


def test_the_example_of_gmt_0003_5() -> None:
    wrapped = wrapping._encrypt_sm2(Sm2PublicKey(GMT_POINT), GMT_K, b"encryption standard")
    # x has its high bit clear and y has it set: the DER INTEGER of y has a zero in front.
    expected = f"307c0220{GMT_C1_X}022100{GMT_C1_Y}0420{GMT_C3}0413{GMT_C2}"
    assert wrapped == bytes.fromhex(expected)


def test_every_wrapping_has_its_own_k(rsa_2048: tuple[Path, bytes]) -> None:
    operation = Wrapping(WrappingAlgorithm.SM2PKE, SM2_PREFIX + GMT_POINT)
    assert len({wrap(operation, b"same") for _ in range(8)}) == 8
    operation = Wrapping(WrappingAlgorithm.RSAES_OAEP_SHA256, rsa_2048[1])
    assert len({wrap(operation, b"same") for _ in range(8)}) == 8


def test_k_is_drawn_again_where_the_mask_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Sm2PublicKey(GMT_POINT)
    refused = next(k for k in range(1, 5000) if wrapping._encrypt_sm2(key, k, b"x") is None)
    drawn = iter([refused - 1, GMT_K - 1])
    monkeypatch.setattr(wrapping.secrets, "randbelow", lambda _: next(drawn))
    assert wrapping._wrap_sm2(key, b"x") == wrapping._encrypt_sm2(key, GMT_K, b"x")


def test_k_is_uniform_in_1_to_n_minus_1(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def smallest(limit: int) -> int:
        limits.append(limit)
        return 0

    monkeypatch.setattr(wrapping.secrets, "randbelow", smallest)
    wrapped = wrapping._wrap_sm2(Sm2PublicKey(GMT_POINT), b"sixteen bytes...")
    n = int("FFFFFFFEFFFFFFFFFFFFFFFFFFFFFFFF7203DF6B21C6052B53BBF40939D54123", 16)
    assert limits == [n - 1]
    # k = 1: C1 is the generator.
    assert bytes.fromhex("32c4ae2c1f1981195f9904466a39c9948fe30bbff2660be1715a4589334c74c7") in (
        wrapped
    )


def test_arguments_can_be_pickled(rsa_2048: tuple[Path, bytes]) -> None:
    operation = Wrapping(WrappingAlgorithm.RSAES_OAEP_SHA1, rsa_2048[1])
    assert pickle.loads(pickle.dumps(operation)) == operation


def test_what_goes_together() -> None:
    for spec, algorithms in wrapping.ALGORITHMS.items():
        for algorithm in WrappingAlgorithm:
            if algorithm in algorithms:
                check_wrapping(spec, algorithm, 1)
                check_wrapping(spec, algorithm, wrapping.MAX_LENGTHS[algorithm])
            else:
                with pytest.raises(WrappingAlgorithmError, match="wraps with"):
                    check_wrapping(spec, algorithm, 1)


@pytest.mark.parametrize(
    ("algorithm", "limit"),
    [
        (WrappingAlgorithm.RSAES_OAEP_SHA1, 214),
        (WrappingAlgorithm.RSAES_OAEP_SHA256, 190),
        (WrappingAlgorithm.SM2PKE, 1024),
    ],
)
def test_lengths_are_limited(
    rsa_2048: tuple[Path, bytes], algorithm: WrappingAlgorithm, limit: int
) -> None:
    sm2 = algorithm is WrappingAlgorithm.SM2PKE
    spec = WrappingKeySpec.EC_SM2 if sm2 else WrappingKeySpec.RSA_2048
    der = SM2_PREFIX + GMT_POINT if sm2 else rsa_2048[1]
    for length in (0, limit + 1):
        with pytest.raises(WrappingLengthError, match=f"1 to {limit} bytes"):
            check_wrapping(spec, algorithm, length)
        with pytest.raises(WrappingLengthError):
            wrap(Wrapping(algorithm, der), bytes(length))


@pytest.mark.parametrize("bits", [1024, 3072, 4096])
def test_rsa_keys_of_other_sizes_are_refused(bits: int) -> None:
    with pytest.raises(PublicKeyError, match=f"{bits} bits"):
        load_public_key(rsa_der(bits), WrappingKeySpec.RSA_2048)


def test_rsa_numbers(rsa_2048: tuple[Path, bytes]) -> None:
    key = load_public_key(rsa_2048[1], WrappingKeySpec.RSA_2048)
    assert isinstance(key, rsa.RSAPublicKey)
    n = key.public_numbers().n
    assert rsa_der_of(n, 65537) == rsa_2048[1]
    load_public_key(rsa_der_of(n, 2**256 - 1), WrappingKeySpec.RSA_2048)
    for modulus, exponent in [
        (n, 3),
        (n, 65535),
        (n, 65538),
        (n, 2**256 + 1),
        (n, n + 2),
        (n, 1),
        (n - 1, 65537),
        (n >> 1 | 1, 65537),
        (n << 1 | 1, 65537),
    ]:
        with pytest.raises(PublicKeyError):
            load_public_key(rsa_der_of(modulus, exponent), WrappingKeySpec.RSA_2048)


def test_other_rsa_encodings_are_refused(rsa_2048: tuple[Path, bytes], tmp_path: Path) -> None:
    key, der = rsa_2048
    pss = tmp_path / "pss.pem"
    openssl("genpkey", "-algorithm", "RSA-PSS", "-pkeyopt", "rsa_keygen_bits:2048", "-out", pss)
    elliptic = ec.generate_private_key(ec.SECP256R1()).public_key()
    edwards = ed25519.Ed25519PrivateKey.generate().public_key()
    for wrong in [
        der + b"\x00",
        der[:-1],
        der[1:],
        b"",
        b"garbage",
        openssl("pkey", "-in", key, "-pubout"),
        openssl("rsa", "-in", key, "-RSAPublicKey_out", "-outform", "DER"),
        openssl("pkey", "-in", key, "-outform", "DER"),
        openssl("pkey", "-in", pss, "-pubout", "-outform", "DER"),
        elliptic.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        edwards.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        SM2_PREFIX + GMT_POINT,
    ]:
        with pytest.raises(PublicKeyError):
            load_public_key(wrong, WrappingKeySpec.RSA_2048)
        with pytest.raises(PublicKeyError):
            wrap(Wrapping(WrappingAlgorithm.RSAES_OAEP_SHA256, wrong), b"data")


def sm2_keys_to_refuse() -> list[bytes]:
    x, y = GMT_POINT[:32], GMT_POINT[32:]
    prefix = SM2_PREFIX[:-1]
    p256 = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
    small = bytes.fromhex("3039301306072a8648ce3d020106082a811ccf5501822d032200")
    infinity = bytes.fromhex("3018301306072a8648ce3d020106082a811ccf5501822d03020000")
    wrong_key_oid = bytes.fromhex("3059301306072a8648ce3d020206082a811ccf5501822d03420004")
    return [
        SM2_PREFIX + x + bytes(32),
        SM2_PREFIX + bytes(64),  # infinity, as some write it
        infinity,
        SM2_PREFIX + y + x,
        SM2_PREFIX + x[:-1] + bytes([x[-1] ^ 1]) + y,
        SM2_PREFIX + x + (int.from_bytes(y, "big") ^ 1).to_bytes(32, "big"),
        SM2_PREFIX + b"\xff" * 64,
        small + bytes([2 | y[-1] & 1]) + x,  # compressed
        prefix + bytes([6 | y[-1] & 1]) + x + y,  # hybrid
        p256 + x + y,
        wrong_key_oid + x + y,
        SM2_PREFIX + x + y + b"\x00",
        SM2_PREFIX + x + y[:-1],
        b"\x04" + x + y,
        x + y,
        b"",
    ]


def test_sm2_keys_that_are_refused() -> None:
    for wrong in sm2_keys_to_refuse():
        with pytest.raises(PublicKeyError):
            load_public_key(wrong, WrappingKeySpec.EC_SM2)
        with pytest.raises(PublicKeyError):
            wrap(Wrapping(WrappingAlgorithm.SM2PKE, wrong), b"data")


def test_sm2_coordinates_are_below_p() -> None:
    # A point with a small x can be written again as x + p: still 32 bytes, but not the same key.
    a, b = P - 3, 0x28E9FA9E9D9F5E344D5A9E4BCF6509A7F39789F515AB8F92DDBCBD414D940E93
    for x in range(100):
        square = (x**3 + a * x + b) % P
        y = pow(square, (P + 1) // 4, P)
        if y * y % P == square:
            break
    good = SM2_PREFIX + x.to_bytes(32, "big") + y.to_bytes(32, "big")
    load_public_key(good, WrappingKeySpec.EC_SM2)
    with pytest.raises(PublicKeyError, match="not a point"):
        load_public_key(
            SM2_PREFIX + (x + P).to_bytes(32, "big") + y.to_bytes(32, "big"), WrappingKeySpec.EC_SM2
        )


@given(
    st.binary(max_size=400),
    st.sampled_from(WrappingKeySpec),
    st.sampled_from([b"", SM2_PREFIX, bytes.fromhex("30820122300d06092a864886f70d01010105000382")]),
)
def test_random_bytes_give_value_errors_only(
    data: bytes, spec: WrappingKeySpec, prefix: bytes
) -> None:
    with pytest.raises(PublicKeyError):
        load_public_key(prefix + data, spec)


@given(st.data(), st.sampled_from([rsa_der(2048), SM2_PREFIX + GMT_POINT]))
def test_changed_keys_give_value_errors_only(data: st.DataObject, der: bytes) -> None:
    changed = bytearray(der)
    for place in data.draw(st.lists(st.integers(0, len(der) - 1), min_size=1, max_size=4)):
        changed[place] = data.draw(st.integers(0, 255))
    for spec in WrappingKeySpec:
        with contextlib.suppress(PublicKeyError):
            load_public_key(bytes(changed), spec)
