"""What the console of Alibaba Cloud KMS wants to know of a key store."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping

from xkiproxy.protocols.console import Registration

_ID_ALPHABET = string.ascii_uppercase + "234567"
_ID_LENGTH = 21
_SECRET_BYTES = 32


class XkiConsole:
    """The console of external key instances."""

    pins_certificate = True

    def new_credential(self) -> tuple[str, str]:
        """An ID of "XKI" and 105 random bits, and a secret of 256 random bits (43 characters)."""
        identity = "XKI" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_LENGTH))
        return identity, secrets.token_urlsafe(_SECRET_BYTES)

    def mistrusted(self, credential: tuple[str, str]) -> str:
        """Nothing is known of what this cloud would not take."""
        del credential
        return ""

    def upload(self, values: Registration) -> Mapping[str, str]:
        """The file that holds all four values."""
        # Alibaba Cloud publishes no form of the file that its console takes: these names are a
        # decision of this project, after those of the console's fields.
        return {
            "ExternalProxyPath": values.path,
            "CertificateFingerprint": values.fingerprint,
            "AccessKeyId": values.access_key_id,
            "AccessKeySecret": values.secret,
        }

    def shown(self, values: Registration) -> Mapping[str, str]:
        """The four values."""
        return {
            "External Proxy Path": values.path,
            "Certificate Fingerprint": values.fingerprint,
            "AccessKey ID": values.access_key_id,
            "AccessKey Secret": values.secret,
        }
