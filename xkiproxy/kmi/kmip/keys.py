"""Keys at a KMIP server: which objects are the versions of an external key.

An external key is the symmetric key object whose Name is the key's ID: version 1. Each further
version is an object of its own, named `ID#2`, `ID#3` and so on; no key ID has a `#`. So versions do
not depend on Re-key and its links, which many servers lack.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from xkiproxy.crypto.algorithms import KEY_SIZES, KeySpec, Usage
from xkiproxy.kmi.base import KeyInfo
from xkiproxy.kmi.kmip import messages
from xkiproxy.kmi.kmip.connection import Connection
from xkiproxy.kmi.kmip.messages import Answer, KmipError, Reason, Tag
from xkiproxy.kmi.kmip.ttlv import Structure, Value

_NAME = re.compile(r"([A-Za-z0-9._-]{1,128})(?:#([1-9][0-9]{0,8}))?")
_AHEAD = 4
"""Versions that are looked for in one message."""

_SPECS = {size * 8: spec for spec, size in KEY_SIZES.items() if spec is not KeySpec.SM4}


class State(IntEnum):
    """The states of KMIP (1.4, section 3.22)."""

    PRE_ACTIVE = 1
    ACTIVE = 2
    DEACTIVATED = 3
    COMPROMISED = 4
    DESTROYED = 5
    DESTROYED_COMPROMISED = 6


_WORDS: dict[int, str] = {
    State.PRE_ACTIVE: "is not activated yet",
    State.DEACTIVATED: "is deactivated",
    State.COMPROMISED: "is marked as compromised",
}
_GONE = {State.DESTROYED, State.DESTROYED_COMPROMISED}


@dataclass(frozen=True, slots=True)
class KeyObject:
    """One object: a version of a key. `problem` says why it cannot be used, or is empty."""

    uid: str
    name: str
    spec: KeySpec | None
    usage: Usage
    state: int
    created: float | None
    problem: str

    @property
    def can_decrypt(self) -> bool:
        """Deactivated keys still open what they have closed."""
        known = not self.problem or self.state == State.DEACTIVATED
        return known and bool(self.usage & Usage.DECRYPT)

    @property
    def can_encrypt(self) -> bool:
        """Only active keys protect what is new."""
        return not self.problem and bool(self.usage & Usage.ENCRYPT)


@dataclass(frozen=True, slots=True)
class Key:
    """An external key: its objects by version."""

    key_id: str
    versions: dict[int, KeyObject]

    @property
    def newest(self) -> int:
        """The version that encrypts."""
        return max(self.versions)

    @property
    def info(self) -> KeyInfo:
        """As the command line shows it."""
        last = self.versions[self.newest]
        return KeyInfo(
            self.key_id,
            last.spec,
            tuple(sorted(self.versions)),
            self.versions[min(self.versions)].created,
            last.usage,
            last.problem or ("" if 1 in self.versions else "its version 1 is missing"),
        )


def version_name(key_id: str, version: int) -> str:
    """The Name of a version's object."""
    return key_id if version == 1 else f"{key_id}#{version}"


def parse_name(name: str) -> tuple[str, int] | None:
    """The key ID and version that a Name says, None if it is no such name."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] == "1":
        return None
    return match[1], int(match[2] or 1)


async def find_key(connection: Connection, key_id: str) -> Key | None:
    """Look a key up, None if it is not there.

    Raises:
        LaneError: the connection is of no use any more.
        KmipError: the server refuses, or a name is there twice.
    """
    uids: list[str] = []
    version, is_more = 1, True
    while is_more:
        names = [version_name(key_id, version + step) for step in range(_AHEAD)]
        answers = await connection.ask([messages.locate(connection.version, n) for n in names])
        found = [_located(answer, name) for answer, name in zip(answers, names, strict=True)]
        uids += [uid for group in found for uid in group]
        version, is_more = version + _AHEAD, all(found)
    keys = _group(await read_objects(connection, uids))
    return keys.get(key_id)


async def list_keys(connection: Connection) -> list[Key]:
    """Every key whose name could be a key ID; raises LaneError or KmipError."""
    answer = await connection.ask_one(messages.locate(connection.version))
    keys = _group(await read_objects(connection, messages.located(answer)))
    return [keys[key_id] for key_id in sorted(keys)]


def _group(objects: Sequence[KeyObject]) -> dict[str, Key]:
    """Objects by the keys that they are versions of; raises KmipError for a name used twice."""
    keys: dict[str, Key] = {}
    for item in objects:
        parsed = parse_name(item.name)
        if parsed is None:
            continue
        versions = keys.setdefault(parsed[0], Key(parsed[0], {})).versions
        if parsed[1] in versions:
            raise KmipError(f"two keys have the name {item.name}: a key's name must be its own")
        versions[parsed[1]] = item
    return keys


async def read_objects(connection: Connection, uids: Sequence[str]) -> list[KeyObject]:
    """What the objects are; those that have been destroyed are left out."""
    objects = []
    for start in range(0, len(uids), 64):
        part = uids[start : start + 64]
        answers = await connection.ask([messages.get_attributes(uid) for uid in part])
        for uid, answer in zip(part, answers, strict=True):
            if answer.failed and answer.reason in (Reason.ITEM_NOT_FOUND, Reason.OBJECT_DESTROYED):
                continue
            if answer.failed:
                raise KmipError(f"the attributes of {uid} cannot be read: {answer.message}")
            item = _key_object(uid, messages.attributes(answer))
            if item.state not in _GONE:
                objects.append(item)
    return objects


def _located(answer: Answer, name: str) -> list[str]:
    if answer.failed and answer.reason != Reason.ITEM_NOT_FOUND:
        raise KmipError(f"{name} cannot be looked up: {answer.message}")
    return messages.located(answer)


def _key_object(uid: str, found: dict[int, list[Value]]) -> KeyObject:
    state = _number(found, Tag.STATE)
    bits = _number(found, Tag.CRYPTOGRAPHIC_LENGTH)
    spec = _SPECS.get(bits) if _number(found, Tag.CRYPTOGRAPHIC_ALGORITHM) == messages.AES else None
    mask = _number(found, Tag.CRYPTOGRAPHIC_USAGE_MASK)
    usage = Usage(0)
    if mask & messages.ENCRYPT_BIT:
        usage |= Usage.ENCRYPT
    if mask & messages.DECRYPT_BIT:
        usage |= Usage.DECRYPT
    problem = ""
    if spec is None:
        problem = "it is no AES key of 128, 192 or 256 bits"
    elif state != State.ACTIVE:
        problem = f"it {_WORDS.get(state, 'is in no state that is known')}"
    elif not usage:
        problem = "its usage mask allows neither Encrypt nor Decrypt"
    created = _number(found, Tag.INITIAL_DATE)
    return KeyObject(uid, _name(found), spec, usage, state, float(created) or None, problem)


def _number(found: dict[int, list[Value]], tag: Tag) -> int:
    values = found.get(tag, [])
    return values[0] if values and isinstance(values[0], int) else 0


def _name(found: dict[int, list[Value]]) -> str:
    """The first name that could be a key's."""
    values = [value for value in found.get(Tag.NAME, []) if isinstance(value, Structure)]
    names = [value.find(Tag.NAME_VALUE) for value in values]
    texts = [name for name in names if isinstance(name, str)]
    return next((text for text in texts if parse_name(text)), texts[0] if texts else "")
