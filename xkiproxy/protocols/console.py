"""What the console of every cloud wants to know of a key store, and in which words.

Pure but for the random bits of a new credential.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from typing import Protocol as Interface


@dataclass(frozen=True, slots=True)
class Registration:
    """The values with which a cloud finds and trusts a key store.

    `path` is the external proxy path; `fingerprint` is `sha256-` and 64 hex digits, or empty where
    the cloud does not pin the certificate.
    """

    path: str
    access_key_id: str
    secret: str = field(repr=False)
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class TokenRegistration:
    """The values with which a cloud that sends tokens finds a key; nothing of it is secret.

    `prefix` is that of the key store's paths.
    """

    audience: str
    prefix: str
    key_id: str
    service_accounts: Sequence[str]


class TokenConsole(Interface):
    """The console of a cloud that proves itself by tokens."""

    def shown(self, values: TokenRegistration) -> Mapping[str, str]:
        """The values under the names that the cloud has for them."""
        ...

    def commands(self, values: TokenRegistration) -> Sequence[tuple[str, Sequence[str]]]:
        """What to do there: what for, and the lines of a shell."""
        ...


class Console(Interface):
    """A cloud's console: the form of its credentials, its file and its words."""

    pins_certificate: bool
    """Whether the cloud trusts one certificate by its fingerprint, or those of public CAs."""

    def new_credential(self) -> tuple[str, str]:
        """A new access key ID and its secret, from the system's generator."""
        ...

    def mistrusted(self, credential: tuple[str, str]) -> str:
        """Why the cloud would not take an access key ID and its secret; empty if it would."""
        ...

    def upload(self, values: Registration) -> Mapping[str, Any]:
        """The JSON file that the console takes."""
        ...

    def shown(self, values: Registration) -> Mapping[str, str]:
        """The values under the names that the console's fields have, for people."""
        ...
