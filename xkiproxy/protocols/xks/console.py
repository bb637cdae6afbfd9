"""What the console of AWS KMS wants to know of a key store."""

from __future__ import annotations

import base64
import re
import secrets
import string
from collections.abc import Mapping
from typing import Any

from xkiproxy.protocols.console import Registration

_ID_ALPHABET = string.ascii_uppercase + "234567"
_TAKEN_ID = re.compile(r"[A-Z2-7]{20,30}")
_TAKEN_SECRET = re.compile(r"[A-Za-z0-9/+=]{43,64}")
_ID_LENGTH = 21  # with "XKS" 24; AWS takes 20 to 30
_SECRET_BYTES = 32  # 44 characters; AWS takes 43 to 64 of A-Z a-z 0-9 + / =


class XksConsole:
    """The console of external key stores: it takes no fingerprint of a certificate."""

    pins_certificate = False

    def new_credential(self) -> tuple[str, str]:
        """An ID of "XKS" and 105 random bits, and a secret of 256 random bits in Base64."""
        identity = "XKS" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_LENGTH))
        return identity, base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode("ascii")

    def mistrusted(self, credential: tuple[str, str]) -> str:
        """See the API's XksProxyAuthenticationCredentialType."""
        if not _TAKEN_ID.fullmatch(credential[0]):
            return "AWS takes an access key ID of 20 to 30 of A-Z 2-7"
        if not _TAKEN_SECRET.fullmatch(credential[1]):
            return "AWS takes a secret of 43 to 64 of A-Z a-z 0-9 / + ="
        return ""

    def upload(self, values: Registration) -> Mapping[str, Any]:
        """The proxy configuration file, as the AWS documentation has it."""
        return {
            "XksProxyUriPath": values.path,
            "XksProxyAuthenticationCredential": {
                "AccessKeyId": values.access_key_id,
                "RawSecretAccessKey": values.secret,
            },
        }

    def shown(self, values: Registration) -> Mapping[str, str]:
        """The three values."""
        return {
            "Proxy URI path": values.path,
            "Access key ID": values.access_key_id,
            "Secret access key": values.secret,
        }
