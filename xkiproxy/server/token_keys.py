"""The public keys of an issuer of tokens, fetched from its server and kept fresh.

They are fetched again once they are out of date (the answer's Cache-Control says when that is), and
at a token of a key that is not known, but then once a minute at most: whoever sends such tokens
must not have the proxy send requests. While the server cannot be reached the keys that are known go
on, for a week: that Google's server is away must not be an outage of ours, but a key that was
withdrawn must not be good for ever where somebody cuts the way to that server. They are in memory
only: a process that starts meanwhile has none.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Iterable

import aiohttp
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from xkiproxy import __version__
from xkiproxy.config.models import ClientTlsSettings
from xkiproxy.config.secrets import SecretError
from xkiproxy.config.tls import TlsError, client_context
from xkiproxy.protocols.ekm.tokens import KeySetError, parse_keys

_log = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 5.0
_MAX_BYTES = 256 << 10
_UNKNOWN_SECONDS = 60.0
_RETRY_SECONDS = 5.0
_LONGEST_RETRY_SECONDS = 300.0
_SHORTEST_AGE_SECONDS = 300.0
_LONGEST_AGE_SECONDS = 24 * 3600.0
_LONGEST_USE_SECONDS = 7 * 24 * 3600.0
_MAX_AGE = re.compile(r"(?:^|[\s,])max-age=\"?([0-9]{1,9})")

_FAILURES = (
    aiohttp.ClientError,
    KeySetError,
    OSError,
    SecretError,
    TimeoutError,
    TlsError,
    ValueError,
)


class FetchedKeys:
    """The keys as they were fetched last; see `xkiproxy.protocols.ekm.tokens.PublicKeys`."""

    def __init__(self, url: str, tls: ClientTlsSettings) -> None:
        """Fetch from `url` (https), whose server is verified by `tls`.

        Raises:
            TlsError, SecretError: the files of `tls` cannot be used.
        """
        client_context(tls)
        self.origin = url, tls
        self.error = "they have not been fetched yet"
        """Why the last fetch came to nothing; empty if it did not."""
        self._keys: dict[str, RSAPublicKey] = {}
        self._due = 0.0
        self._fetched = 0.0
        self._tried = -_UNKNOWN_SECONDS
        self._pause = _RETRY_SECONDS
        self._missed = False

    def get(self, kid: str, /) -> RSAPublicKey | None:
        """The key of this ID; one that is not there is looked for soon."""
        key = self._keys.get(kid)
        if key is None:
            self._missed = True
        return key

    def __len__(self) -> int:
        return len(self._keys)

    def is_due(self, now: float) -> bool:
        """Whether they are to be fetched; `now` on the clock of `time.monotonic`."""
        return now >= self._due or (self._missed and now >= self._tried + _UNKNOWN_SECONDS)

    async def refresh(self) -> None:
        """Fetch them if that is due; never raises for what the other side does."""
        now = time.monotonic()
        if not self.is_due(now):
            return
        self._tried, self._missed = now, False
        try:
            keys, age = await self._fetch()
        except _FAILURES as error:
            self._fail(_explain(self.origin[0], error))
        else:
            self._take(keys, age)

    async def _fetch(self) -> tuple[dict[str, RSAPublicKey], float]:
        """The keys, and for how many seconds they are fresh."""
        url, tls = self.origin
        # The files are read each time, in a thread: others renew them.
        context = await asyncio.to_thread(client_context, tls)
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
        headers = {"User-Agent": f"xkiproxy/{__version__}"}
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
            session.get(url, ssl=context, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise KeySetError(f"{url}: answers {response.status}")
            keys = parse_keys(await _body(response), url)
            return keys, _fresh_seconds(response.headers.get("Cache-Control", ""))

    def _take(self, keys: dict[str, RSAPublicKey], age: float) -> None:
        if self.error or keys.keys() != self._keys.keys():
            _log.info("%d keys for tokens were fetched from %s", len(keys), self.origin[0])
        # One that has stayed is kept as it is: what it has verified need not be verified again.
        known = self._keys
        self._keys = {
            kid: known[kid] if kid in known and _is_same(known[kid], key) else key
            for kid, key in keys.items()
        }
        self.error, self._pause = "", _RETRY_SECONDS
        self._fetched = time.monotonic()
        self._due = self._fetched + age

    def _fail(self, why: str) -> None:
        is_over = bool(self._keys) and time.monotonic() > self._fetched + _LONGEST_USE_SECONDS
        if is_over:
            self._keys = {}
        if is_over or self.error != why:
            what = "those that are known go on" if self._keys else "all tokens are refused"
            _log.error("keys for tokens cannot be fetched, %s: %s", what, why)
        self.error = why
        self._due = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_RETRY_SECONDS)


def _explain(url: str, error: Exception) -> str:
    """What went wrong; aiohttp's own texts show objects, other ones each time."""
    match error:
        case KeySetError() | SecretError() | TlsError():
            return str(error)
        case TimeoutError():
            return f"{url}: no answer within {_TIMEOUT_SECONDS:g} seconds"
        case aiohttp.ClientConnectorCertificateError():
            return f"{url}: {error.certificate_error}"
        case aiohttp.ClientConnectorError():
            return f"{url}: {error.os_error.strerror or error.os_error}"
        case _:
            return f"{url}: the connection broke ({type(error).__name__})"


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """The whole body; raises KeySetError if it is larger than such a document can be."""
    found = b""
    async for chunk in response.content.iter_any():
        found += chunk
        if len(found) > _MAX_BYTES:
            raise KeySetError(f"{response.url}: answers with more than {_MAX_BYTES} bytes")
    return found


def _fresh_seconds(cache_control: str) -> float:
    """For how long an answer is fresh (RFC 9111, max-age), within bounds of ours."""
    found = _MAX_AGE.search(cache_control.lower())
    age = float(found[1]) if found else 0.0
    return min(max(age, _SHORTEST_AGE_SECONDS), _LONGEST_AGE_SECONDS)


def _is_same(one: RSAPublicKey, other: RSAPublicKey) -> bool:
    return one.public_numbers() == other.public_numbers()


async def refresh_all(sources: Iterable[FetchedKeys]) -> None:
    """Fetch from all where that is due, side by side; key stores may share one."""
    now = time.monotonic()
    due = {source for source in sources if source.is_due(now)}
    await asyncio.gather(*(source.refresh() for source in due))
