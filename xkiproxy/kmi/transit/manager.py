"""The administrator's side of Transit: keys are made, listed, rotated and destroyed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from xkiproxy.config.models import TransitSettings
from xkiproxy.crypto.algorithms import KeySpec
from xkiproxy.kmi.base import KeyInfo, KeyManagerError, LaneError, check_key_id
from xkiproxy.kmi.transit.client import SPECS, TransitClient, is_name, parse_key
from xkiproxy.kmi.transit.http import Answer

_TYPES = {spec: name for name, spec in SPECS.items()}
_T = TypeVar("_T")


class TransitKeyManager:
    """See `xkiproxy.kmi.base.KeyManager`."""

    def __init__(self, settings: TransitSettings) -> None:
        """Log in, with an event loop of its own.

        Raises:
            KeyManagerError: the server, the login or the mount does not work.
            SecretError: a secret cannot be had.
        """
        self._settings = settings
        self._runner = asyncio.Runner()
        try:
            self._client = TransitClient(settings, settings.address[0])
            self._run(self._client.acquire())
        except BaseException:
            self._runner.close()
            raise

    def create(self, key_id: str, spec: KeySpec) -> KeyInfo:
        """See `KeyManager.create`; AES_256 and AES_128."""
        check_key_id(key_id)
        if not is_name(key_id):
            raise self._error(f"key ID {key_id!r}: Transit wants a letter, digit or _ at both ends")
        if spec not in _TYPES:
            raise self._error(f"Transit has no keys of {spec}; it has {', '.join(_TYPES)}")
        if self.get(key_id) is not None:
            raise self._error(f"key {key_id} is there already")
        made = self._ask(
            "POST",
            f"keys/{key_id}",
            {"type": _TYPES[spec], "exportable": False, "allow_plaintext_backup": False},
        )
        if "already existed" in str(made.fields.get("warnings") or ""):
            raise self._error(f"key {key_id} is there already")
        return self._existing(key_id)

    def get(self, key_id: str) -> KeyInfo | None:
        """See `KeyManager.get`."""
        if not is_name(key_id):
            return None
        return self._run(self._get(key_id))

    def list(self) -> list[KeyInfo]:
        """See `KeyManager.list`; every key of the mount."""
        return [*self._run(self._list())]

    def rotate(self, key_id: str) -> KeyInfo:
        """See `KeyManager.rotate`."""
        self._existing(key_id)
        self._ask("POST", f"keys/{key_id}/rotate")
        return self._existing(key_id)

    def destroy(self, key_id: str) -> None:
        """See `KeyManager.destroy`: it is allowed first, since Transit forbids it by default."""
        self._existing(key_id)
        self._ask("POST", f"keys/{key_id}/config", {"deletion_allowed": True})
        self._ask("DELETE", f"keys/{key_id}")

    def close(self) -> None:
        """Give the token back, if a login made it, and close the connections."""
        try:
            self._run(self._client.release(revoke=True))
        finally:
            self._runner.close()

    def _existing(self, key_id: str) -> KeyInfo:
        key = self.get(key_id)
        if key is None:
            raise self._error(f"key {key_id} is not there")
        return key

    async def _get(self, key_id: str) -> KeyInfo | None:
        answer = await self._client.call("GET", f"keys/{key_id}")
        if answer.status == 404 and answer.is_mounted:
            return None
        return parse_key(key_id, self._checked(answer, f"keys/{key_id}").data).info

    async def _list(self) -> Sequence[KeyInfo]:
        answer = await self._client.call("GET", "keys?list=true")
        if answer.status == 404 and answer.is_mounted:
            return []
        names = self._checked(answer, "keys").data.get("keys")
        if not isinstance(names, list):
            raise self._client.problem(answer, "keys")
        found = await asyncio.gather(
            *(self._get(str(name)) for name in names if is_name(str(name)))
        )
        return [key for key in found if key is not None]

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        return self._checked(self._run(self._client.call(method, path, body)), path)

    def _checked(self, answer: Answer, path: str) -> Answer:
        if answer.status in {200, 204}:
            return answer
        raise self._error(self._client.problem(answer, path).message)

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        async def bounded() -> _T:
            async with asyncio.timeout(self._settings.start_timeout_seconds):
                return await work

        try:
            return self._runner.run(bounded())
        except LaneError as error:
            raise self._error(error.message) from None
        except TimeoutError:
            seconds = self._settings.start_timeout_seconds
            raise self._error(f"{self._client.address}: no answer for {seconds:g} s") from None

    def _error(self, message: str) -> KeyManagerError:
        return KeyManagerError(f"KMI {self._settings.name}: {message}")
