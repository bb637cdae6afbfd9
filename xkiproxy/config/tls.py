"""TLS certificates and keys as the configuration names them; contexts of our own connections."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field

from xkiproxy.config.models import ClientTlsSettings, TlsSettings
from xkiproxy.config.secrets import SecretError


class TlsError(Exception):
    """The certificate, key or CA cannot be used; the text names the file and what to do."""


class Pem(BaseModel):
    """A PEM file as it was read; messages name its path."""

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    path: Path
    data: bytes = Field(repr=False)


class TlsFiles(BaseModel):
    """The files of `[server.tls]`."""

    model_config = ConfigDict(frozen=True)

    certificate: Pem
    private_key: Pem
    client_ca: Pem | None


def read_tls(settings: TlsSettings) -> TlsFiles:
    """Read the files of the listener; raises TlsError or SecretError."""
    return TlsFiles(
        certificate=read_pem(settings.certificate),
        private_key=read_pem(settings.private_key.path()),
        client_ca=None if settings.client_ca is None else read_pem(settings.client_ca),
    )


def read_pem(path: Path) -> Pem:
    """Read a file in PEM; raises TlsError."""
    try:
        return Pem(path=path, data=path.read_bytes())
    except OSError as error:
        raise TlsError(f"{path}: {error.strerror}") from None


@contextmanager
def as_file(pem: Pem) -> Iterator[str]:
    """A file in memory that holds it: OpenSSL is given files, and must not read another by now."""
    with os.fdopen(os.memfd_create("xkiproxy-pem", os.MFD_CLOEXEC), "wb") as file:
        file.write(pem.data)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def client_context(settings: ClientTlsSettings) -> ssl.SSLContext:
    """The context of a connection to a server; raises TlsError or SecretError."""
    try:
        context = ssl.create_default_context(cafile=settings.ca)
    except (OSError, ssl.SSLError) as error:
        raise TlsError(f"{settings.ca}: {tls_reason(error) or 'cannot be read'}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.certificate is not None and settings.private_key is not None:
        certificate = read_pem(settings.certificate)
        use_certificate(context, certificate, read_pem(settings.private_key.path()))
    return context


def parse_certificate(pem: Pem) -> x509.Certificate:
    """The first certificate of a PEM file: the owner's own. Raises TlsError."""
    try:
        return x509.load_pem_x509_certificate(pem.data)
    except ValueError:
        raise TlsError(f"{pem.path}: there is no certificate in PEM in it") from None


def untimely(certificate: x509.Certificate, now: datetime) -> str:
    """Why a certificate is not valid at a time; empty if it is."""
    if now > certificate.not_valid_after_utc:
        return f"expired on {_date(certificate.not_valid_after_utc)}: renew it"
    if now < certificate.not_valid_before_utc:
        begins = _date(certificate.not_valid_before_utc)
        return f"is not valid before {begins}: is the clock right?"
    return ""


def _date(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


def use_certificate(context: ssl.SSLContext, certificate: Pem, key: Pem) -> None:
    """Let a context present a certificate; raises TlsError or SecretError."""
    parse_certificate(certificate)
    try:
        with as_file(certificate) as certificate_file, as_file(key) as key_file:
            # A key with a passphrase must fail here, not ask for it on the terminal.
            context.load_cert_chain(certificate_file, key_file, password=_no_passphrase)
    except ssl.SSLError as error:
        if "MISMATCH" in (error.reason or ""):
            raise TlsError(f"{key.path}: is not the key of {certificate.path}") from None
        what = error.reason or f"is no private key in PEM (or {certificate.path} is damaged)"
        raise TlsError(f"{key.path}: {what}") from None
    except OSError as error:
        raise TlsError(f"{key.path}: {error.strerror}") from None


def tls_reason(error: BaseException) -> str:
    """What is wrong, in OpenSSL's words or the system's; empty if neither has any."""
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or "")


def _no_passphrase() -> str:
    raise SecretError("the private key is protected by a passphrase; store it without one")
