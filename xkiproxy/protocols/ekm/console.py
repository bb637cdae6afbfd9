"""What Google Cloud wants to know of a key store: there is no console's form, but commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xkiproxy.protocols.console import TokenRegistration
from xkiproxy.protocols.ekm.protocol import EkmProtocol

_PLACE = "--keyring RING --location LOCATION"


class EkmConsole:
    """Cloud KMS with keys of the protection levels EXTERNAL and EXTERNAL_VPC."""

    def shown(self, values: TokenRegistration) -> Mapping[str, str]:
        """The key's URI, and its path for an EKM connection."""
        return {
            "Key URI": f"{values.audience}/{_key_path(values)}",
            "Key path": _key_path(values),
            "Audience of tokens": values.audience,
            "Service accounts": ", ".join(values.service_accounts),
        }

    def commands(self, values: TokenRegistration) -> Sequence[tuple[str, Sequence[str]]]:
        """gcloud's for a key over the internet, and for one over an EKM connection."""
        return (
            (
                "Over the internet:",
                (
                    _create("external"),
                    f"gcloud kms keys versions create --key KEY {_PLACE} --primary"
                    f" --external-key-uri {values.audience}/{_key_path(values)}",
                ),
            ),
            (
                "Or over a VPC, with an EKM connection:",
                (
                    f"{_create('external-vpc')}"
                    " --crypto-key-backend projects/PROJECT/locations/LOCATION/ekmConnections/NAME",
                    f"gcloud kms keys versions create --key KEY {_PLACE} --primary"
                    f" --ekm-connection-key-path {_key_path(values)}",
                ),
            ),
        )


def _create(level: str) -> str:
    return (
        f"gcloud kms keys create KEY {_PLACE} --purpose encryption --protection-level {level}"
        " --default-algorithm external-symmetric-encryption --skip-initial-version-creation"
    )


def _key_path(values: TokenRegistration) -> str:
    return f"{values.prefix}{EkmProtocol.base_path}/keys/{values.key_id}".removeprefix("/")
