"""TLS certificates and keys as the configuration names them; contexts of our own connections."""

from __future__ import annotations

import ssl
from pathlib import Path

from cryptography import x509

from xkiproxy.config.models import ClientTlsSettings
from xkiproxy.config.secrets import SecretError, SecretSource


class TlsError(Exception):
    """The certificate, key or CA cannot be used; the text names the file and what to do."""


def client_context(settings: ClientTlsSettings) -> ssl.SSLContext:
    """The context of a connection to a server; raises TlsError or SecretError."""
    try:
        context = ssl.create_default_context(cafile=settings.ca)
    except (OSError, ssl.SSLError) as error:
        raise TlsError(f"{settings.ca}: {tls_reason(error)}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.certificate is not None and settings.private_key is not None:
        use_certificate(context, settings.certificate, settings.private_key)
    return context


def load_certificate(path: Path) -> x509.Certificate:
    """The first certificate of a PEM file: the owner's own. Raises TlsError."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise TlsError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise TlsError(f"{path}: there is no certificate in PEM in it") from None


def use_certificate(context: ssl.SSLContext, certificate: Path, source: SecretSource) -> None:
    """Let a context present a certificate; raises TlsError or SecretError."""
    load_certificate(certificate)
    key = source.path()
    try:
        # A key with a passphrase must fail here, not ask for it on the terminal.
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except ssl.SSLError as error:
        if "MISMATCH" in (error.reason or ""):
            raise TlsError(f"{key}: is not the key of {certificate}") from None
        what = error.reason or f"is no private key in PEM (or {certificate} is damaged)"
        raise TlsError(f"{key}: {what}") from None
    except OSError as error:
        raise TlsError(f"{key}: {error.strerror}") from None


def tls_reason(error: OSError) -> str:
    """What is wrong, in OpenSSL's words or the system's."""
    return getattr(error, "reason", None) or error.strerror or "cannot be read"


def _no_passphrase() -> str:
    raise SecretError("the private key is protected by a passphrase; store it without one")
