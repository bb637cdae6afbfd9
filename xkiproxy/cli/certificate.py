"""A self-signed server certificate (RFC 5280): the cloud pins it, so no authority is needed."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID_DAYS = 825
"""What TLS clients take at most from a private authority."""

_RSA_BITS = 3072
_LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")


class CertificateKey(StrEnum):
    """The kind of a server's private key: ECDSA on P-256, or RSA of 3072 bits."""

    EC = "ec"
    RSA = "rsa"


def host_names(wanted: Sequence[str]) -> list[str]:
    """The names that a server's certificate needs: those of this machine, and `wanted`.

    Raises:
        ValueError: one of `wanted` is neither a host name nor an IP address.
    """
    for name in wanted:
        if not _is_host(name):
            raise ValueError(f"{name!r} is neither a host name nor an IP address")
    machine = [name for name in (socket.gethostname(),) if _is_host(name)]
    return list(dict.fromkeys([*wanted, "localhost", *machine, "127.0.0.1", "::1"]))


def self_signed(names: Sequence[str], kind: CertificateKey, now: datetime) -> tuple[str, str]:
    """(certificate, private key), both as PEM; valid from `now` on for 825 days."""
    key = _new_key(kind)
    public = key.public_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "xkiproxy")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        # A clock that is a little behind must not find the certificate in its future.
        .not_valid_before(now.astimezone(UTC) - timedelta(minutes=5))
        .not_valid_after(now.astimezone(UTC) + timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName([_general_name(n) for n in names]), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .add_extension(_key_usage(), True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), False)
    )
    certificate = builder.sign(key, hashes.SHA256())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM).decode(), private.decode()


def _new_key(kind: CertificateKey) -> ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey:
    if kind is CertificateKey.RSA:
        return rsa.generate_private_key(65537, _RSA_BITS)
    return ec.generate_private_key(ec.SECP256R1())


def _key_usage() -> x509.KeyUsage:
    """digitalSignature alone: in TLS 1.3, and with ECDHE, the key does nothing else."""
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _is_host(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return len(name) <= 253 and _HOST.fullmatch(name) is not None
    return True


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
