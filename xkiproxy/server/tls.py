"""TLS as the clouds ask for it, with client certificates refused inside the handshake.

Python's ssl module knows neither a choice of TLS 1.3 suites (before 3.15) nor a check of the
client's names on a server. Both are made where a handshake ends, before its last flight is sent:
`ssl.SSLContext.sslobject_class` is the documented place for it. A client that fails there never
has a connection, and no byte of HTTP is read from it.
"""

from __future__ import annotations

import ssl
from typing import Any

from xkiproxy.config.models import TlsSettings
from xkiproxy.config.tls import TlsError, TlsFiles, as_file, tls_reason, use_certificate

SUITES_1_2 = ("ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-RSA-AES256-GCM-SHA384")
SUITES_1_3 = ("TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")


def server_context(settings: TlsSettings, files: TlsFiles) -> ssl.SSLContext:
    """The context of the listener; raises TlsError or SecretError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(":".join(SUITES_1_2))
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    use_certificate(context, files.certificate, files.private_key)
    if files.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            with as_file(files.client_ca) as file:
                context.load_verify_locations(cafile=file)
        except (OSError, ssl.SSLError) as error:
            raise TlsError(
                f"{files.client_ca.path}: {tls_reason(error) or 'cannot be read'}"
            ) from None
    context.sslobject_class = _checked_object(frozenset(settings.client_names))
    return context


def _checked_object(names: frozenset[str]) -> type[ssl.SSLObject]:
    class CheckedObject(ssl.SSLObject):
        """Ends the handshake with an error where the suite or the client's name is not allowed."""

        def do_handshake(self) -> None:
            super().do_handshake()
            suite = self.cipher()
            if suite is None or suite[0] not in {*SUITES_1_2, *SUITES_1_3}:
                raise ssl.SSLError(f"the suite {suite and suite[0]} is not allowed")
            if names and names.isdisjoint(_subject_names(self.getpeercert() or {})):
                raise ssl.SSLError("the client certificate has none of the allowed names")

    return CheckedObject


def _subject_names(certificate: dict[str, Any]) -> set[str]:
    """The DNS names of a certificate, or its common name where it has none (RFC 6125 6.4.4)."""
    names = {value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"}
    if names:
        return names
    subject = certificate.get("subject", ())
    return {value for part in subject for kind, value in part if kind == "commonName"}
