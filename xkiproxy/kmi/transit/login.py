"""How the proxy gets its token, keeps it, and gets another.

(The HTTP API of OpenBao and Vault: auth/token, auth/approle, auth/cert, auth/kubernetes.)

A token is renewed when two thirds of its time are over. One that cannot be renewed, or whose
renewal gives it less than half of its time (its end is near), is replaced by another login; a token
that the configuration names is read again when it is over or refused, since an agent may have
written a new one. A login that was refused is not tried again until its secret has changed or five
minutes are over: servers lock out whom they refuse often.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from xkiproxy.config.models import TransitSettings
from xkiproxy.config.secrets import SecretError
from xkiproxy.kmi.base import BreakReason, LaneError
from xkiproxy.kmi.transit.http import Answer, Http

_log = logging.getLogger(__name__)

_RENEW_AT = 2 / 3
_ENOUGH = 1 / 2
_REFUSED_SECONDS = 300.0
_REFUSED_TOKEN_SECONDS = 10.0
_ALIVE_SECONDS = 10.0
_FORBIDDEN_SECONDS = 60.0
_RENEWAL_SECONDS = 5.0
_NO_TOKEN_SECONDS = 0.1
_FIRST_PAUSE_SECONDS = 1.0
_LAST_PAUSE_SECONDS = 30.0
_REVOKE_SECONDS = 2.0
_LOOKUP = "auth/token/lookup-self"
_MAX_WORDS = 300
_FOREVER = float("inf")
_SECRET_FIELDS = frozenset({"role_id", "secret_id", "jwt"})


@dataclass(slots=True)
class Token:
    """A token; times on the clock of `time.monotonic`, `lease` in seconds (0: without end)."""

    text: str = field(repr=False)
    lease: float
    renewable: bool
    ours: bool
    """Whether a login made it, so that it is ours to revoke."""
    began: float = field(default_factory=time.monotonic)

    @property
    def renew_at(self) -> float:
        """When to do something for it; nothing can be done for one that is not ours to renew."""
        if not self.lease or not (self.renewable or self.ours):
            return _FOREVER
        return self.began + self.lease * _RENEW_AT

    @property
    def is_over(self) -> bool:
        """Whether its time is over."""
        return bool(self.lease) and time.monotonic() >= self.began + self.lease


class Login:
    """The token of one KMI: logs in, renews, logs in again."""

    def __init__(self, settings: TransitSettings, http: Http) -> None:
        self._settings = settings
        self._http = http
        self._lock = asyncio.Lock()
        self._token: Token | None = None
        self._refused: tuple[object, float, LaneError] | None = None
        self._secrets: frozenset[str] = frozenset()
        self._alive_until = 0.0
        self._revocations: set[asyncio.Task[None]] = set()

    async def token(self) -> str:
        """A token that can be used; raises LaneError."""
        token = self._token
        if token is None or token.is_over:
            async with self._lock:
                token = self._token
                if token is None or token.is_over:
                    token = self._token = await self._obtain()
        return token.text

    async def is_refused(self, text: str, answer: Answer) -> bool:
        """Whether an answer with status 403 was for the token, so that another is worth a try.

        A 403 also says that a policy does not allow the path. Newer servers tell them apart;
        otherwise the token is asked to look itself up. One that may not do that is replaced, and
        `forbidden` hears of it if that was no use.
        """
        async with self._lock:
            token = self._token
            if token is None or token.text != text:
                return True
            if "invalid token" not in answer.errors and "bad token" not in answer.errors:
                if time.monotonic() < self._alive_until:
                    return False
                looked_up = await self._http.send("GET", _LOOKUP, token=text)
                if looked_up.status != 403:  # a server that is busy has not refused it
                    self._alive_until = time.monotonic() + _ALIVE_SECONDS
                    return False
                self._give_back(token)
            _log.warning("%s refuses our token: logging in again", self._http.address)
            self._token = None
            return True

    def forbidden(self, text: str) -> None:
        """A token that has just been got was refused too: it is a policy that does not allow it."""
        if self._token is not None and self._token.text == text:
            self._alive_until = time.monotonic() + _FORBIDDEN_SECONDS

    async def keep(self) -> None:
        """Renew the token whenever it is time, until cancelled."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            token = self._token
            wait = _NO_TOKEN_SECONDS  # its time may be short: it is to be seen soon after the login
            if token is not None:
                wait = max(0.0, min(token.renew_at - time.monotonic(), _LAST_PAUSE_SECONDS))
            if token is None or wait > 0.0:
                await asyncio.sleep(wait)
                continue
            try:
                async with asyncio.timeout(_RENEWAL_SECONDS):
                    await self._replace(token)
                pause = _FIRST_PAUSE_SECONDS
            except (LaneError, TimeoutError) as error:
                # It can be used until its time is over; after that a login says what is wrong.
                why = error.message if isinstance(error, LaneError) else "no answer"
                _log.warning("KMI %s: no new token: %s", self._settings.name, why)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LAST_PAUSE_SECONDS)

    async def _replace(self, token: Token) -> None:
        """Renew a token, or log in.

        Without the lock as long as the renewal takes: if it takes too long others must log in.
        """
        renewed = await self._renewed(token)
        async with self._lock:
            if self._token is not token:  # others could not wait, and have logged in
                self._give_back(token)
                return
            self._token = renewed or await self._obtain()
            if renewed is None:
                self._give_back(token)

    async def revoke(self) -> None:
        """Give back a token that a login made; what goes wrong then does not matter."""
        token, self._token = self._token, None
        if token is not None:
            self._give_back(token)
        await asyncio.gather(*self._revocations)

    def _give_back(self, token: Token) -> None:
        """Revoke a token that is not used any more, if a login made it, while others go on."""
        if token.ours:
            task = asyncio.create_task(self._revoke(token))
            self._revocations.add(task)
            task.add_done_callback(self._revocations.discard)

    async def _revoke(self, token: Token) -> None:
        with suppress(LaneError, TimeoutError):
            async with asyncio.timeout(_REVOKE_SECONDS):
                await self._http.send("POST", "auth/token/revoke-self", token=token.text)

    def words(self, answer: Answer) -> str:
        """An answer's errors on one line, without any secret of ours."""
        return self.clean(answer.errors) or f"HTTP {answer.status}"

    async def _renewed(self, token: Token) -> Token | None:
        """The token with new time; None if it needs another login."""
        if token.renewable:
            answer = await self._http.send("POST", "auth/token/renew-self", {}, token=token.text)
            if answer.status == 200:
                renewed = _given(answer, token.text, ours=token.ours)
                if renewed is not None and (
                    not renewed.lease or renewed.lease >= token.lease * _ENOUGH or not token.ours
                ):
                    return renewed
            elif answer.status == 429:
                raise self._http.broken("is asked too often: the token is not renewed yet")
        return None

    async def _obtain(self) -> Token:
        try:
            path, body, text = self._request()
        except SecretError as error:
            raise LaneError(f"no login: {error}", BreakReason.LOGIN) from None
        tried = (path, tuple(sorted(body.items())), text)
        if self._refused is not None:
            what, until, refusal = self._refused
            if what == tried and time.monotonic() < until:
                raise LaneError(refusal.message, refusal.reason)
        self._secrets = frozenset(body[name] for name in body.keys() & _SECRET_FIELDS)
        if text is not None:
            self._secrets |= {text}
            made = await self._look_up(text)
        else:
            made = await self._log_in(path, body)
        if isinstance(made, LaneError):
            seconds = _REFUSED_SECONDS if text is None else _REFUSED_TOKEN_SECONDS
            self._refused = (tried, time.monotonic() + seconds, made)
            raise made
        self._refused = None
        self._secrets |= {made.text}
        self._alive_until = 0.0
        return made

    def _request(self) -> tuple[str, Mapping[str, str], str | None]:
        """Path and body of a login, or a token that is there already."""
        auth = self._settings.auth
        if auth.token is not None:
            return _LOOKUP, {}, auth.token.read()
        if auth.approle is not None:
            body = {"role_id": auth.approle.role_id, "secret_id": auth.approle.secret_id.read()}
            return f"auth/{auth.approle.mount}/login", body, None
        if auth.kubernetes is not None:
            body = {"role": auth.kubernetes.role, "jwt": _read(auth.kubernetes.jwt)}
            return f"auth/{auth.kubernetes.mount}/login", body, None
        assert auth.cert is not None  # noqa: S101 - the configuration has exactly one
        role = {"name": auth.cert.role} if auth.cert.role else {}
        return f"auth/{auth.cert.mount}/login", role, None

    async def _look_up(self, text: str) -> Token | LaneError:
        answer = await self._http.send("GET", _LOOKUP, token=text)
        if answer.status == 200:
            lease = answer.data.get("ttl")
            renewable = answer.data.get("renewable") is True
            if isinstance(lease, int) and lease >= 0:
                if not lease and answer.data.get("expire_time") is not None:
                    lease = 1  # its last second: only without an end is 0 what it says
                if lease and not renewable:
                    _log.warning(
                        "KMI %s: its token ends in %d s and cannot be renewed",
                        self._settings.name,
                        lease,
                    )
                return Token(text, lease, renewable, ours=False)
        return self._refusal(answer, f"the token of {self._settings.auth.token}")

    async def _log_in(self, path: str, body: Mapping[str, str]) -> Token | LaneError:
        answer = await self._http.log_in(path, body)
        if answer.status == 200:
            text = answer.auth.get("client_token")
            made = _given(answer, text, ours=True) if isinstance(text, str) and text else None
            if made is not None:
                return made
        return self._refusal(answer, f"the login at {path}")

    def _refusal(self, answer: Answer, what: str) -> LaneError:
        """Raises LaneError where the same may well be accepted in a moment."""
        if answer.status in {412, 429} or answer.status >= 500:
            raise self._http.broken(f"{what} was not answered: {self.words(answer)}")
        if not answer.is_mounted:
            return self._http.broken(f"{what}: nothing is mounted there", BreakReason.LOGIN)
        return self._http.broken(f"refuses {what}: {self.words(answer)}", BreakReason.LOGIN)

    def clean(self, text: str) -> str:
        """A text of the server on one line, without any secret of ours."""
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return _without(line, self._secrets)[:_MAX_WORDS]


def _given(answer: Answer, text: str, *, ours: bool) -> Token | None:
    """The token that a login or a renewal gave; None if the answer does not say for how long."""
    lease = answer.auth.get("lease_duration")
    if not isinstance(lease, int) or lease < 0:
        return None
    return Token(text, lease, answer.auth.get("renewable") is True, ours)


def _read(path: Path) -> str:
    """The token of a service account: the platform answers for the file's access rights."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise SecretError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SecretError(f"{path}: is no JWT") from None


def _without(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        if secret:
            text = text.replace(secret, "(withheld)")
    return text
