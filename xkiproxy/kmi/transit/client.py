"""A Transit engine, for all lanes to an address: connections, token, what is known of keys."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xkiproxy.config.models import TransitSettings
from xkiproxy.crypto.algorithms import KeySpec, Usage
from xkiproxy.crypto.operations import Fault, OperationError
from xkiproxy.kmi.base import KeyInfo, LaneError
from xkiproxy.kmi.transit.http import Answer, Http
from xkiproxy.kmi.transit.login import Login

_log = logging.getLogger(__name__)

_FRESH_SECONDS = 10.0
_AGAIN_SECONDS = 0.05
_PROBE_SIZE = 16
_WORDS_SECONDS = 60.0

SPECS = {"aes128-gcm96": KeySpec.AES_128, "aes256-gcm96": KeySpec.AES_256}
"""The types of keys that the proxy uses."""

_VERSION = re.compile(r"v?(\d+)\.(\d+)[\w.+-]*", re.ASCII)
_BINDS_SINCE = (1, 13)  # of Vault; OpenBao began with 2.0
_NEEDED = "needed is Vault 1.13 or OpenBao: older ones do not authenticate associated data"

_NAME = re.compile(r"\w([\w.-]*\w)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class TransitKey:
    """A key as the engine describes it."""

    info: KeyInfo
    latest: int
    """The version that encrypts."""

    def check(self) -> None:
        """Raises OperationError (`KEY_UNUSABLE`) if the proxy cannot use it."""
        if self.info.problem:
            raise OperationError(Fault.KEY_UNUSABLE, f"The key cannot be used: {self.info.problem}")


def parse_key(key_id: str, data: Mapping[str, Any]) -> TransitKey:
    """What `GET keys/:name` says; a key that the proxy cannot use has a problem."""
    latest, raw = data.get("latest_version"), data.get("keys")
    times = {int(n): t for n, t in raw.items() if n.isdecimal()} if isinstance(raw, dict) else {}
    spec = SPECS.get(str(data.get("type")))
    problem = ""
    if spec is None:
        problem = f"its type is {data.get('type')}, not {' or '.join(SPECS)}"
    elif data.get("derived"):
        problem = "it derives another key for each context"
    elif data.get("soft_deleted"):
        problem = "it was deleted and can only be restored"
    elif not isinstance(latest, int) or latest < 1 or not times:
        problem = "the server does not say which versions it has"
    first = times[min(times)] if times else None
    created = float(first) if isinstance(first, int | float) else None
    versions = tuple(sorted(times))
    usage = Usage(0)
    if not problem:
        usage |= Usage.ENCRYPT if data.get("supports_encryption") else Usage(0)
        usage |= Usage.DECRYPT if data.get("supports_decryption") else Usage(0)
    info = KeyInfo(key_id, spec, versions, created, usage, problem)
    return TransitKey(info, latest if isinstance(latest, int) else 0)


def is_name(key_id: str) -> bool:
    """Whether a key of the engine can have this name (its paths have no others)."""
    return _NAME.fullmatch(key_id) is not None


class TransitClient:
    """See the module. Whoever uses it, between `acquire` and `release`, is counted."""

    def __init__(self, settings: TransitSettings, address: str) -> None:
        """Raises KeyManagerError or SecretError: files for TLS cannot be used."""
        self.settings = settings
        self.address = address
        self._http = Http(settings, address)
        self._login = Login(settings, self._http)
        self._mount = settings.mount
        self._users = 0
        self._coming_and_going = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None
        self._keys: dict[str, tuple[int, float, TransitKey]] = {}
        self._said: dict[str, float] = {}

    # ---- life ------------------------------------------------------------------------------

    async def acquire(self) -> None:
        """Be ready for another user; raises LaneError if the certificate cannot be read again."""
        async with self._coming_and_going:
            self._http.renew_certificate()
            self._users += 1
            if self._users == 1:
                self._http.open()
                self._keeper = asyncio.create_task(self._login.keep())

    async def release(self, *, revoke: bool) -> None:
        """A user is gone; with the last one the connections are closed.

        `revoke`: the token, if a login made it, is given back: nobody comes again.
        """
        leaving = asyncio.create_task(self._leave(revoke=revoke))
        try:
            await asyncio.shield(leaving)
        except asyncio.CancelledError:
            # Half released it would be open for good; nothing in there takes long.
            await leaving
            raise

    async def _leave(self, *, revoke: bool) -> None:
        async with self._coming_and_going:
            self._users -= 1
            if self._users:
                return
            keeper, self._keeper = self._keeper, None
            if keeper is not None:
                keeper.cancel()
                await asyncio.gather(keeper, return_exceptions=True)
            try:
                if revoke:
                    await self._login.revoke()
            finally:
                await self._http.close()

    async def check(self) -> None:
        """Show that the server serves, takes our token and has the engine; raises LaneError.

        With a `probe_key` it encrypts and decrypts, otherwise it draws random bytes: that needs the
        token, the mount and a right that the proxy needs anyway. Either way it must be certain that
        the engine authenticates associated data: older ones drop them without a word.
        """
        health = await self._http.check_health()
        if self.settings.probe_key is not None:
            await self._prove(self.settings.probe_key)
            return
        self._check_version(health.fields.get("version"))
        answer = await self.call("POST", "random", {"bytes": _PROBE_SIZE})
        # 429: it serves, and more than it likes.
        if answer.status != 429:
            drawn = isinstance(answer.data.get("random_bytes"), str)
            self._demand(answer, "random", drawn)

    def _check_version(self, version: object) -> None:
        numbers = _VERSION.match(version) if isinstance(version, str) else None
        if numbers is None:
            raise self._http.broken(
                "sys/health does not say its version: set probe_key, by which the proxy sees"
                " whether it authenticates associated data"
            )
        if (int(numbers[1]), int(numbers[2])) < _BINDS_SINCE:
            raise self._http.broken(f"is version {numbers[0]}; {_NEEDED}")

    async def _prove(self, key: str) -> None:
        """Encrypt and decrypt as lanes do; with other associated data it must not decrypt."""
        text, data, other = (b64encode(os.urandom(_PROBE_SIZE)).decode() for _ in range(3))
        path = f"keys/{key}"  # first: an encryption can make a key that is not there
        self._demand(await self.call("GET", path), path, True)
        path = f"encrypt/{key}"
        (made,) = await self._batch(path, [{"plaintext": text, "associated_data": data}])
        items = [
            {"ciphertext": made.get("ciphertext"), "associated_data": given}
            for given in (data, other)
        ]
        path = f"decrypt/{key}"
        opened, forged = await self._batch(path, items)
        if opened.get("plaintext") != text:
            words = self._login.clean(str(opened.get("error") or "it does not decrypt its own"))
            raise self._http.broken(f"{self._mount}/{path}: {words}")
        if not forged.get("error"):
            raise self._http.broken(f"decrypts under any associated data; {_NEEDED}")

    async def _batch(self, path: str, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        answer = await self.call("POST", path, {"batch_input": items})
        results = answer.data.get("batch_results")
        if not isinstance(results, list) or len(results) != len(items):
            raise self.problem(answer, path)
        return [result if isinstance(result, dict) else {} for result in results]

    def _demand(self, answer: Answer, path: str, holds: bool) -> None:
        """Raises LaneError, which says what to do, if an answer of the check is not good."""
        if answer.status != 200 or not holds:
            raise self.problem(answer, path)

    def problem(self, answer: Answer, path: str) -> LaneError:
        """What an answer says about the server or its configuration, for administrators."""
        mount = self._mount
        if not answer.is_mounted:
            return self._http.broken(f"there is no Transit engine at {mount}/ (setting: mount)")
        if answer.status == 403:
            return self._http.broken(
                f"the token may not use {mount}/{path}, or there is no engine at {mount}/:"
                " see its policies and the settings mount and namespace"
            )
        if answer.status in {200, 204}:
            return self._http.broken(f"what is at {mount}/ does not answer as Transit does")
        return self._http.broken(f"{mount}/{path}: {self._login.words(answer)}")

    # ---- requests --------------------------------------------------------------------------

    async def call(self, method: str, path: str, body: object = None) -> Answer:
        """Ask the engine, `path` below its mount; raises LaneError.

        A token that is refused is replaced once. (412: a replica that has not yet seen what the
        token's login wrote; it has in a moment.)
        """
        path = f"{self._mount}/{path}"
        text = await self._login.token()
        answer = await self._http.send(method, path, body, token=text)
        if answer.status == 412:
            await asyncio.sleep(_AGAIN_SECONDS)
            answer = await self._http.send(method, path, body, token=text)
        if answer.status == 403 and await self._login.is_refused(text, answer):
            text = await self._login.token()
            answer = await self._http.send(method, path, body, token=text)
            if answer.status == 403:
                self._login.forbidden(text)
        return answer

    def refusal(self, answer: Answer, path: str) -> OperationError:
        """What an answer that is no success means for an operation, by its status."""
        words = answer.errors
        if answer.status == 429:
            return OperationError(Fault.THROTTLED, "The key manager is asked too often.")
        if answer.status == 413:
            return OperationError(
                Fault.INVALID_PARAMETER, "is larger than the key manager takes", "plaintext"
            )
        if answer.is_mounted and (answer.status == 404 or "encryption key not found" in words):
            return OperationError(Fault.KEY_NOT_FOUND, "There is no such key.")
        self._say(self.problem(answer, path).message)
        if answer.status == 403:
            # Of one key: others may well be permitted there.
            fault = Fault.UNAVAILABLE if path == "random" else Fault.KEY_FORBIDDEN
            return OperationError(fault, "The key manager does not permit it.")
        return OperationError(Fault.UNAVAILABLE, "The key manager cannot do it now.")

    def item_refusal(self, words: str, kind: str) -> OperationError:
        """What an error of one item of a batch means, other than that its ciphertext is wrong."""
        self._say(f"{self._mount}/{kind}: {self._login.clean(words)}")
        return OperationError(Fault.UNAVAILABLE, "The key manager cannot do it now.")

    def _say(self, message: str) -> None:
        """Log for administrators, the same once a minute: a request may be made often."""
        now = time.monotonic()
        if self._said.get(message, 0.0) > now:
            return
        if len(self._said) > 100:
            self._said.clear()
        self._said[message] = now + _WORDS_SECONDS
        _log.error("KMI %s: %s", self.settings.name, message)

    # ---- keys ------------------------------------------------------------------------------

    async def key(self, key_id: str, epoch: int) -> TransitKey:
        """A key as it was a few seconds ago at most, and not before `epoch`.

        Raises:
            OperationError: `KEY_NOT_FOUND`, `KEY_UNUSABLE`, `KEY_FORBIDDEN`, `UNAVAILABLE`.
            LaneError: the server cannot be asked.
        """
        known = self._keys.get(key_id)
        if known is not None and known[0] >= epoch and known[1] > time.monotonic():
            key = known[2]
        else:
            key = await self.fetch(key_id, epoch)
        key.check()
        return key

    async def fetch(self, key_id: str, epoch: int) -> TransitKey:
        """A key as it is now; raises as `key` does, but for what the key itself is."""
        if not is_name(key_id):
            raise OperationError(Fault.KEY_NOT_FOUND, "There is no such key.")
        path = f"keys/{key_id}"
        answer = await self.call("GET", path)
        if answer.status != 200:
            self.forget(key_id)
            raise self.refusal(answer, path)
        key = parse_key(key_id, answer.data)
        self._keys[key_id] = (epoch, time.monotonic() + _FRESH_SECONDS, key)
        return key

    def forget(self, key_id: str) -> None:
        """Look a key up again when it is next used."""
        self._keys.pop(key_id, None)
