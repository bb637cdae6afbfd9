"""Signing keys derived from the credentials of a key store, once a day for each credential."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable

from xkiproxy.keystores.credentials import Credential

Mac = Callable[[bytes], bytes]
"""See `xkiproxy.protocols.base`."""

_MAX_CACHED = 1024
_DIGEST_KEY = secrets.token_bytes(32)


class CachedSigningKeys:
    """Derives signing keys and remembers them; all credentials of a key store work at once.

    An unknown access key is served from a secret made at start that nobody knows, through the same
    steps and the same cache: neither the time nor the state of the cache tells it from a known one.
    """

    def __init__(self, credentials: Iterable[Credential]) -> None:
        self._secrets = {c.access_key_id: c.access_key_secret for c in credentials}
        self._nobodys_secret = secrets.token_urlsafe(32)
        self._cache: dict[tuple[str | None, str], Mac] = {}

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
        known = access_key_id in self._secrets
        owner = access_key_id if known else None
        key = self._cache.get((owner, scope))
        if key is None:
            key = derive(self._secrets[access_key_id] if known else self._nobodys_secret)
            # A scope is whatever a client writes, so the cache must not grow with it.
            if len(self._cache) >= _MAX_CACHED:
                self._cache.clear()
            self._cache[owner, scope] = key
        return known, key
