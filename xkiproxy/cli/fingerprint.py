"""`xkiproxy fingerprint`: the digests by which a cloud recognizes a server's certificate."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer
from Cryptodome.Util.asn1 import DerSequence
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from xkiproxy.cli.common import (
    DEFAULT_CONFIG,
    CommandError,
    ConfigOption,
    JsonOption,
    out,
    print_fields,
    print_json,
)
from xkiproxy.config import Config, load_config


def fingerprint(
    certificates: Annotated[
        list[Path] | None,
        typer.Argument(
            help="PEM files; default: the certificate of the configuration.",
            metavar="[CERTIFICATE]...",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Print the fingerprints of certificates and of their public keys.

    With --json: an object for a single certificate, an array for several.

    Example: xkiproxy fingerprint tls/server.crt
    """
    files = certificates or [configured_certificate(load_config(config))]
    found = [(file, item) for file in files for item in load_certificates(file)]
    if as_json:
        values = [fingerprints(certificate) for _, certificate in found]
        print_json(values[0] if len(values) == 1 else values)
        return
    for position, (file, certificate) in enumerate(found):
        if position:
            out.print()
        subject = certificate.subject.rfc4514_string() or "(no subject)"
        out.print(f"{file}: {subject}", markup=False)
        print_fields(fingerprints(certificate))


def configured_certificate(config: Config) -> Path:
    """The server's certificate file; raises CommandError if the server has none."""
    if config.server.tls is None:
        raise CommandError("the configuration has no [server.tls]: there is no certificate")
    return config.server.tls.certificate


def load_certificates(file: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, the server's own first; raises CommandError."""
    try:
        return x509.load_pem_x509_certificates(file.read_bytes())
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}") from None
    except ValueError:
        raise CommandError(f"{file}: has no valid certificate in PEM form") from None


def fingerprints(certificate: x509.Certificate) -> dict[str, str]:
    """Four digests: of the certificate's DER, and of its SubjectPublicKeyInfo's (RFC 5280)."""
    whole = certificate.public_bytes(Encoding.DER)
    key = subject_public_key_info(certificate)
    return {
        "certificate_sha256": _sha256(whole),
        "certificate_sm3": _sm3(whole),
        "public_key_sha256": _sha256(key),
        "public_key_sm3": _sm3(key),
    }


def subject_public_key_info(certificate: x509.Certificate) -> bytes:
    """The DER of the SubjectPublicKeyInfo as it stands in the certificate.

    It is cut out rather than written anew: keys that `cryptography` cannot load (SM2) have a
    fingerprint too, and whoever pins it hashes these very bytes.
    """
    fields: Any = DerSequence().decode(certificate.tbs_certificate_bytes)
    # TBSCertificate: [0] version (absent in X.509 v1), serialNumber, signature, issuer, validity,
    # subject, subjectPublicKeyInfo. The serial number is the only INTEGER.
    first = 0 if isinstance(fields[0], int) else 1
    return bytes(fields[first + 5])


def _sha256(data: bytes) -> str:
    return "sha256-" + hashlib.sha256(data).hexdigest()


def _sm3(data: bytes) -> str:
    digest = hashes.Hash(hashes.SM3())
    digest.update(data)
    return "sm3-" + digest.finalize().hex()
