"""Requests to OpenBao or Vault, and what an answer says (their HTTP API, "API" and "Status codes").

Both speak the same API. An answer that says something about one request is returned whatever its
status is; one that says that the server cannot serve at all is a LaneError: sealed, not reachable,
another's certificate. Texts of errors are for administrators; they hold nothing of a request.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
from yarl import URL

from xkiproxy import __version__
from xkiproxy.config.models import TransitSettings
from xkiproxy.config.secrets import SecretError
from xkiproxy.config.tls import TlsError, client_context, read_pem, tls_reason, use_certificate
from xkiproxy.kmi.base import BreakReason, KeyManagerError, LaneError

_KEEP_ALIVE_SECONDS = 60.0
_MAX_ATTEMPTS = 2
_NO_ROUTE = "no handler for route"
_WRONG_PATH = "unsupported path"

_HEALTHY = frozenset({200, 429, 473})
"""Active, standby, performance standby: a standby hands requests on to the active node."""

_HEALTH = {
    472: "is a disaster recovery secondary: it does not serve",
    501: "is not initialized",
    503: "is sealed: unseal it",
}
"""What `sys/health` says by its status."""

_STATUSES = {
    502: "the load balancer in front of it cannot reach it",
    503: "is sealed or does not serve",
    504: "the load balancer in front of it got no answer",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: its status and its JSON object, which is empty where there is none."""

    status: int
    fields: Mapping[str, Any] = field(repr=False)

    @property
    def data(self) -> Mapping[str, Any]:
        """What was asked for."""
        return self._table("data")

    @property
    def auth(self) -> Mapping[str, Any]:
        """What a login or a renewal gave."""
        return self._table("auth")

    @property
    def errors(self) -> str:
        """What went wrong, in the server's words."""
        errors = self.fields.get("errors")
        return "; ".join(map(str, errors)) if isinstance(errors, list) else ""

    @property
    def is_mounted(self) -> bool:
        """Whether there is an engine at the path that could have answered."""
        words = self.errors
        return self.status != 404 or not (_NO_ROUTE in words or _WRONG_PATH in words)

    def _table(self, name: str) -> Mapping[str, Any]:
        value = self.fields.get(name)
        return value if isinstance(value, dict) else {}


def _context(settings: TransitSettings) -> ssl.SSLContext | None:
    """The TLS context of a KMI, None for plain HTTP; raises KeyManagerError or SecretError."""
    if settings.plaintext:
        return None
    try:
        return client_context(settings.tls)
    except TlsError as error:
        raise KeyManagerError(f"KMI {settings.name}: tls: {error}") from None


class Http:
    """Keep-alive connections to one server, at most `connections` of them."""

    def __init__(self, settings: TransitSettings, address: str) -> None:
        """Raises KeyManagerError or SecretError: files for TLS cannot be used."""
        self.address = address
        self._context = _context(settings)
        self._tls = settings.tls
        self._server_name = settings.tls.server_name or None
        self._limit = settings.connections
        self._namespace = {"X-Vault-Namespace": settings.namespace} if settings.namespace else {}
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Be ready for requests; in a running event loop."""
        self._session = self._make_session()

    def _make_session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            ssl=self._context if self._context is not None else True,
            limit=self._limit,
            keepalive_timeout=_KEEP_ALIVE_SECONDS,
        )
        return aiohttp.ClientSession(
            connector=connector,
            # Whoever asks has a limit for all that it asks.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"X-Vault-Request": "true", "User-Agent": f"xkiproxy/{__version__}"},
            trust_env=False,
        )

    def renew_certificate(self) -> None:
        """Read the client certificate again, for connections from now on; raises LaneError."""
        tls = self._tls
        if self._context is None or tls.certificate is None or tls.private_key is None:
            return
        try:
            certificate, key = read_pem(tls.certificate), read_pem(tls.private_key.path())
            # First where it harms nothing: certificate and key may just be being replaced.
            for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), self._context):
                use_certificate(context, certificate, key)
        except (TlsError, SecretError) as error:
            raise LaneError(str(error), BreakReason.START) from None

    async def close(self) -> None:
        """End every connection."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def send(
        self, method: str, path: str, body: object = None, *, token: str | None = None
    ) -> Answer:
        """Send a request to a path below `/v1/`; all of them can be repeated.

        Raises:
            LaneError: the server cannot be reached, is not trusted, or cannot serve.
        """
        headers = dict(self._namespace)
        if token is not None:
            headers["X-Vault-Token"] = token
        return self._usable(await self._send(method, path, body, headers))

    def _usable(self, answer: Answer) -> Answer:
        why = _STATUSES.get(answer.status)
        if why is None and answer.status > 500:
            why = f"answers with HTTP {answer.status}"
        if why is not None or answer.status == 472:
            raise self.broken(why or _HEALTH[472])
        return answer

    async def log_in(self, path: str, body: object) -> Answer:
        """As `send`, on a connection of its own, which shows the certificate that is there now."""
        self.renew_certificate()
        async with self._make_session() as session:
            answer = await self._send("POST", path, body, dict(self._namespace), session)
        return self._usable(answer)

    async def check_health(self) -> Answer:
        """Ask whether the server serves, and what it is; needs no token; raises LaneError."""
        answer = await self._send("GET", "sys/health", None, {})
        if answer.status not in _HEALTHY:
            why = _HEALTH.get(answer.status, f"answers sys/health with HTTP {answer.status}")
            raise self.broken(why)
        return answer

    def broken(self, why: str, reason: BreakReason = BreakReason.DEVICE) -> LaneError:
        """The error that says what is wrong with this server."""
        return LaneError(f"{self.address}: {why}", reason)

    async def _send(
        self,
        method: str,
        path: str,
        body: object,
        headers: Mapping[str, str],
        session: aiohttp.ClientSession | None = None,
    ) -> Answer:
        session = session or self._session
        if session is None:
            raise LaneError("closed", BreakReason.EXIT)
        url = URL(f"{self.address}/v1/{path}", encoded=True)
        data = None if body is None else orjson.dumps(body)
        if data is not None:
            headers = {**headers, "Content-Type": "application/json"}
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            try:
                async with session.request(
                    method, url, data=data, headers=headers, allow_redirects=False,
                    server_hostname=self._server_name,
                ) as response:  # fmt: skip
                    return self._answer(response, await response.read())
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                # A server may close a connection that was idle just as it is used again.
                fresh = isinstance(error, aiohttp.ClientConnectorError)
                if fresh or attempt == _MAX_ATTEMPTS:
                    raise self._unreachable(error) from None
            except (aiohttp.ClientError, ValueError) as error:
                raise self._unreachable(error) from None
        raise AssertionError  # the last attempt returns or raises

    def _answer(self, response: aiohttp.ClientResponse, raw: bytes) -> Answer:
        if 300 <= response.status < 400:
            where = URL(response.headers.get("Location", "")).host or "another server"
            raise self.broken(
                f"sends us to {where}: name the active node, or a load balancer that finds it"
            )
        if not raw:
            return Answer(response.status, {})
        try:
            fields = orjson.loads(raw)
        except orjson.JSONDecodeError:
            fields = None
        if not isinstance(fields, dict):
            if response.status >= 400:
                return Answer(response.status, {})
            raise self.broken("does not answer as OpenBao or Vault does")
        return Answer(response.status, fields)

    def _unreachable(self, error: Exception) -> LaneError:
        reason = BreakReason.EXIT
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            cause = error.certificate_error
            why = getattr(cause, "verify_message", "") or str(cause)
            trusted = f"tls.ca ({self._tls.ca})" if self._tls.ca else "the system's CAs"
            return self.broken(f"its certificate is not trusted by {trusted}: {why}", reason)
        if isinstance(error, aiohttp.ClientConnectorSSLError):
            return self.broken(f"no TLS connection: {_reason(error.os_error)}", reason)
        if isinstance(error, aiohttp.ClientConnectorError):
            return self.broken(f"cannot be reached: {_reason(error.os_error)}", reason)
        return self.broken(f"the connection broke: {_reason(error)}", reason)


def _reason(error: BaseException) -> str:
    """One line that says what an error of the system or of TLS is."""
    return tls_reason(error) or type(error).__name__
