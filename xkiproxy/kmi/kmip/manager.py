"""The administrator's side of a KMIP server."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from xkiproxy.config.models import KmipSettings
from xkiproxy.crypto.algorithms import KEY_SIZES, KeySpec
from xkiproxy.kmi.base import BreakReason, KeyInfo, KeyManagerError, LaneError, check_key_id
from xkiproxy.kmi.kmip import messages
from xkiproxy.kmi.kmip.connection import connect
from xkiproxy.kmi.kmip.keys import Key, State, find_key, list_keys, version_name
from xkiproxy.kmi.kmip.messages import KmipError, Tag

_T = TypeVar("_T")


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
        self._run(self._add_version(key_id, 1, spec))
        return self._existing(key_id)

    def get(self, key_id: str) -> KeyInfo | None:
        """See `KeyManager.get`."""
        key = self._run(find_key(self._connection, key_id))
        return None if key is None else key.info

    def list(self) -> list[KeyInfo]:
        """See `KeyManager.list`."""
        return [key.info for key in self._run(list_keys(self._connection))]

    def rotate(self, key_id: str) -> KeyInfo:
        """See `KeyManager.rotate`."""
        key = self._find(key_id)
        info = key.info
        if info.problem or info.spec is None:
            raise KeyManagerError(
                f"KMI {self._name}: key {key_id} cannot be rotated: {info.problem}"
            )
        self._run(self._add_version(key_id, key.newest + 1, info.spec))
        return self._existing(key_id)

    def destroy(self, key_id: str) -> None:
        """See `KeyManager.destroy`: the newest version first, so that the rest is still a key."""
        key = self._find(key_id)
        for version in sorted(key.versions, reverse=True):
            self._run(self._destroy(key, version))

    def close(self) -> None:
        """End the connection."""
        self._run(self._end())
        self._runner.close()

    async def _end(self) -> None:
        self._connection.end("closed", BreakReason.EXIT)

    async def _add_version(self, key_id: str, version: int, spec: KeySpec) -> None:
        """Make an object and activate it; one that cannot be activated is destroyed again."""
        bits = 8 * KEY_SIZES[spec]
        request = messages.create(self._connection.version, version_name(key_id, version), bits)
        uid = (await self._connection.ask_one(request)).payload.text(Tag.UNIQUE_IDENTIFIER)
        try:
            await self._connection.ask_one(messages.activate(uid))
        except KmipError:
            await self._connection.ask_one(messages.destroy(uid))
            raise

    async def _destroy(self, key: Key, version: int) -> None:
        item = key.versions[version]
        if item.state == State.ACTIVE:  # which cannot be destroyed (KMIP 1.4, section 3.22)
            await self._connection.ask_one(messages.revoke(item.uid))
        await self._connection.ask_one(messages.destroy(item.uid))

    def _find(self, key_id: str) -> Key:
        key = self._run(find_key(self._connection, key_id))
        if key is None:
            raise KeyManagerError(f"KMI {self._name}: key {key_id} is not there")
        return key

    def _existing(self, key_id: str) -> KeyInfo:
        return self._find(key_id).info

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            return self._runner.run(work)
        except LaneError as error:
            raise KeyManagerError(f"KMI {self._name}: {error.message}") from None
        except KmipError as error:
            raise KeyManagerError(f"KMI {self._name}: {error}") from None
