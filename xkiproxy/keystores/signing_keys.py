"""Signing keys derived from the credentials of a key store, once a day for each credential."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence

from xkiproxy.keystores.credentials import Credential

Mac = Callable[[bytes], bytes]
"""See `xkiproxy.protocols.base`."""

_MAX_SCOPES = 256
_DIGEST_KEY = secrets.token_bytes(32)


class CachedSigningKeys:
    """Derives signing keys and remembers them; all credentials of a key store work at once.

    An unknown access key is served from a secret made at start that nobody knows. For a scope that
    is met for the first time the keys of all credentials, and nobody's, are derived together: what
    was remembered for one access key and not for another would tell a client, by the time that it
    takes, which of them is known.
    """

    def __init__(self, credentials: Sequence[Credential]) -> None:
        self._secrets = {c.access_key_id: c.access_key_secret for c in credentials}
        self.created = {c.access_key_id: c.created for c in credentials}
        """When each was made, as its file says (RFC 3339)."""
        self.oldest = min(filter(None, (c.created_at for c in credentials)), default=None)
        """When the oldest credential was made, in seconds since the epoch, if that is known."""
        self._nobodys_secret = secrets.token_urlsafe(32)
        self._scopes: dict[str, dict[str | None, Mac]] = {}

    @property
    def identities(self) -> dict[str, bytes]:
        """The access keys that are known, each with a digest that tells of a change of its secret.

        The digest is keyed anew in every process: it says nothing of the secret.
        """
        return {
            name: hashlib.blake2b(secret.encode(), key=_DIGEST_KEY).digest()
            for name, secret in self._secrets.items()
        }

    def get(self, access_key_id: str, scope: str, derive: Callable[[str], Mac]) -> tuple[bool, Mac]:
        """See `xkiproxy.protocols.base.SigningKeys`."""
        keys = self._scopes.get(scope)
        if keys is None:
            keys = self._derive_all(derive)
            # A scope is whatever a client writes, so what is remembered must not grow with it.
            if len(self._scopes) >= _MAX_SCOPES:
                self._scopes.clear()
            self._scopes[scope] = keys
        key = keys.get(access_key_id)
        return (False, keys[None]) if key is None else (True, key)

    def _derive_all(self, derive: Callable[[str], Mac]) -> dict[str | None, Mac]:
        """The signing key of each access key, and under None nobody's."""
        keys: dict[str | None, Mac] = {None: derive(self._nobodys_secret)}
        for access_key_id, secret in self._secrets.items():
            keys[access_key_id] = derive(secret)
        return keys
