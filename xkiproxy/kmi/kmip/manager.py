"""The administrator's side of a KMIP server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine
from typing import Any, TypeVar

from xkiproxy.config.models import KmipSettings
from xkiproxy.crypto.algorithms import KEY_SIZES, KeySpec
from xkiproxy.kmi.base import BreakReason, KeyInfo, KeyManagerError, LaneError, check_key_id
from xkiproxy.kmi.kmip import messages
from xkiproxy.kmi.kmip.connection import connect
from xkiproxy.kmi.kmip.keys import OF_SERVER, Key, State, find_key, list_keys, version_name
from xkiproxy.kmi.kmip.messages import KmipError, Reason, Tag
from xkiproxy.kmi.kmip.ttlv import TtlvError

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_ATTEMPTS = (
    messages.EXTRAS,
    (Tag.APPLICATION_SPECIFIC_INFORMATION, Tag.SENSITIVE),
    (Tag.SENSITIVE, Tag.EXTRACTABLE),
    (Tag.APPLICATION_SPECIFIC_INFORMATION,),
    (),
)
"""Attributes that a server need not have, as they are tried: it does not say which it refuses."""

_LACKING = {
    Tag.APPLICATION_SPECIFIC_INFORMATION: (
        "Application Specific Information: its versions are found by their names alone"
    ),
    Tag.SENSITIVE: "Sensitive: see that its policy does not let the key leave it unwrapped",
    Tag.EXTRACTABLE: "Extractable: see that its policy does not let the key leave it (Get)",
}
_OF_CLIENT = {Reason.PERMISSION_DENIED, Reason.NOT_AUTHORISED}


class KmipKeyManager:
    """See `xkiproxy.kmi.base.KeyManager`: a connection, in an event loop of its own."""

    def __init__(self, settings: KmipSettings) -> None:
        """Connect; raises KeyManagerError."""
        self._name = settings.name
        self._runner = asyncio.Runner()
        try:
            self._connection = self._run(connect(settings, 0))
        except BaseException:
            self._runner.close()
            raise

    def create(self, key_id: str, spec: KeySpec) -> KeyInfo:
        """See `KeyManager.create`."""
        check_key_id(key_id)
        if spec is KeySpec.SM4:
            raise KeyManagerError(f"KMI {self._name}: SM4 keys are not made over KMIP")
        if self._look_up(key_id) is not None:
            raise KeyManagerError(f"KMI {self._name}: key {key_id} is there already")
        return self._add_version(key_id, 1, spec)

    def get(self, key_id: str) -> KeyInfo | None:
        """See `KeyManager.get`."""
        key = self._look_up(key_id)
        return None if key is None else key.info

    def list(self) -> list[KeyInfo]:
        """See `KeyManager.list`."""
        return [
            KeyInfo(key_id, None, (1,), None, problem=str(key))
            if isinstance(key, KmipError)
            else key.info
            for key_id, key in self._run(list_keys(self._connection)).items()
        ]

    def rotate(self, key_id: str) -> KeyInfo:
        """See `KeyManager.rotate`."""
        key = self._find(key_id)
        info = key.info
        if info.problem or info.spec is None:
            raise KeyManagerError(
                f"KMI {self._name}: key {key_id} cannot be rotated: {info.problem}"
            )
        # What another has begun and not activated keeps its number.
        return self._add_version(key_id, max(key.versions) + 1, info.spec)

    def destroy(self, key_id: str) -> None:
        """See `KeyManager.destroy`: the newest version first, so that the rest is still a key."""
        key = self._find(key_id)
        for version in sorted(key.versions, reverse=True):
            self._run(self._destroy(key, version))
        left = self._look_up(key_id)
        if left is not None:
            names = ", ".join(version_name(key_id, version) for version in sorted(left.versions))
            raise KeyManagerError(f"KMI {self._name}: of key {key_id} are left: {names}")

    def close(self) -> None:
        """End the connection."""
        self._run(self._end())
        self._runner.close()

    async def _end(self) -> None:
        self._connection.end("closed", BreakReason.EXIT)

    def _add_version(self, key_id: str, version: int, spec: KeySpec) -> KeyInfo:
        """Make a version, and see that it is the one that encrypts."""
        self._run(self._make(key_id, version, spec))
        key = self._find(key_id)
        if key.newest != version:
            raise KeyManagerError(
                f"KMI {self._name}: {version_name(key_id, version)} was made, but version"
                f" {key.newest} is the newest that the key manager lets encrypt"
            )
        return key.info

    async def _make(self, key_id: str, version: int, spec: KeySpec) -> None:
        """Make an object and activate it; one that cannot be, or is not alone, is destroyed again.

        Two that rotate at the same time are both refused: a name that is used twice is no key.
        """
        name = version_name(key_id, version)
        uid = await self._create(key_id, name, 8 * KEY_SIZES[spec])
        try:
            for thorough in (True, False):  # as commands see it, and as lanes do
                key = await find_key(self._connection, key_id, thorough=thorough)
                if key is None or version not in key.versions or key.versions[version].uid != uid:
                    raise KmipError(f"{name} was made, but the server does not find it")
            await self._connection.ask_one(messages.activate(uid))
        except KmipError:
            await self._connection.ask_one(messages.destroy(uid))
            raise

    async def _create(self, key_id: str, name: str, bits: int) -> str:
        """The identifier of a new object, with as many of the extras as the server takes."""
        refusal: KmipError | None = None
        for extras in _ATTEMPTS:
            request = messages.create(self._connection.version, name, bits, key_id, extras)
            try:
                answer = await self._connection.ask_one(request)
            except KmipError as error:
                refusal = refusal or error
                if error.reason in OF_SERVER | _OF_CLIENT:
                    break
                continue
            self._warn(name, extras)
            return answer.payload.text(Tag.UNIQUE_IDENTIFIER)
        assert refusal is not None  # noqa: S101 - there are attempts
        raise refusal

    def _warn(self, name: str, extras: Collection[Tag]) -> None:
        """What a new key does not have, since the server takes no such attribute."""
        for tag, what in _LACKING.items():
            if tag not in extras:
                _log.warning("KMI %s: key %s: the server takes no %s", self._name, name, what)

    async def _destroy(self, key: Key, version: int) -> None:
        item = key.versions[version]
        if item.state == State.ACTIVE:  # which cannot be destroyed (KMIP 1.4, section 3.22)
            await self._connection.ask_one(messages.revoke(item.uid))
        await self._connection.ask_one(messages.destroy(item.uid))

    def _look_up(self, key_id: str) -> Key | None:
        return self._run(find_key(self._connection, key_id, thorough=True))

    def _find(self, key_id: str) -> Key:
        key = self._look_up(key_id)
        if key is None:
            raise KeyManagerError(f"KMI {self._name}: key {key_id} is not there")
        return key

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            return self._runner.run(work)
        except LaneError as error:
            raise KeyManagerError(f"KMI {self._name}: {error.message}") from None
        except (KmipError, TtlvError) as error:
            raise KeyManagerError(f"KMI {self._name}: {error}") from None
