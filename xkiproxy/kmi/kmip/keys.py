"""Keys at a KMIP server: which objects are the versions of an external key.

An external key is the symmetric key object whose Name is the key's ID: version 1. Each further
version is an object of its own, named `ID#2`, `ID#3` and so on; no key ID has a `#`. So versions do
not depend on Re-key and its links, which many servers lack.

Any of these may have been destroyed, so names alone do not show which is the last: Locate has no
"begins with". What is made here has the key's ID as Application Specific Information too, its mark,
and is found by that. Names are asked for of a key whose version 1 is not marked: it was made
elsewhere.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from xkiproxy.crypto.algorithms import KEY_SIZES, KeySpec, Usage
from xkiproxy.kmi.base import KeyInfo
from xkiproxy.kmi.kmip import messages
from xkiproxy.kmi.kmip.connection import Connection
from xkiproxy.kmi.kmip.messages import Answer, KmipError, Reason, Tag
from xkiproxy.kmi.kmip.ttlv import Structure, TtlvError, Value

_log = logging.getLogger(__name__)

_NAME = re.compile(r"([A-Za-z0-9._-]{1,128})(?:#([1-9][0-9]{0,8}))?")
_AHEAD, _FAR_AHEAD = 8, 64
"""So many versions on end may be gone of a key that is not marked: those after them are not seen.
Commands look farther, at every key: they say that one is destroyed, or which version is the last.
"""

_LOCATES = 32
"""In a message: a search takes servers longer than an encryption, and the message has its time."""

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
_NOT_THERE = {Reason.ITEM_NOT_FOUND, Reason.OBJECT_NOT_FOUND, Reason.OBJECT_DESTROYED}

OF_SERVER = {
    Reason.AUTHENTICATION_NOT_SUCCESSFUL,
    Reason.INTERNAL_SERVER_ERROR,
    Reason.SERVER_LIMIT_EXCEEDED,
    Reason.PROTECTION_STORAGE_UNAVAILABLE,
}
"""Reasons that say something of the server alone, whatever it was asked."""


@dataclass(frozen=True, slots=True)
class KeyObject:
    """One object: a version of a key. `problem` says why it cannot be used, or is empty."""

    uid: str
    names: tuple[str, ...]
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
    newest: int
    """The version that encrypts; of a key that cannot, the last one."""

    @property
    def info(self) -> KeyInfo:
        """As the command line shows it: without versions that are not activated yet."""
        newest = self.versions[self.newest]
        shown = [
            version
            for version, item in self.versions.items()
            if version == self.newest or item.state != State.PRE_ACTIVE
        ]
        return KeyInfo(
            self.key_id,
            newest.spec,
            tuple(sorted(shown)),
            self.versions[min(self.versions)].created,
            newest.usage,
            newest.problem,
        )


Found = Mapping[str, Key | KmipError]
"""Keys by their IDs, or why one cannot be used; what is not in it is not there."""


def version_name(key_id: str, version: int) -> str:
    """The Name of a version's object."""
    return key_id if version == 1 else f"{key_id}#{version}"


def parse_name(name: str) -> tuple[str, int] | None:
    """The key ID and version that a Name says, None if it is no such name."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] == "1":
        return None
    return match[1], int(match[2] or 1)


async def find_keys(
    connection: Connection, key_ids: Sequence[str], *, thorough: bool = False
) -> Found:
    """Look keys up together: a message for all that is to be located, one for all attributes.

    `thorough`: as commands do.

    Raises:
        LaneError: the connection is of no use any more.
    """
    located = await _locate(connection, key_ids, thorough)
    uids = {uid for found in located.values() if not isinstance(found, KmipError) for uid in found}
    objects = await read_objects(connection, sorted(uids))
    keys: dict[str, Key | KmipError] = {}
    for key_id, found in located.items():
        try:
            key = found if isinstance(found, KmipError) else _key(key_id, _readable(objects, found))
        except KmipError as error:
            key = error
        if key is not None:
            keys[key_id] = key
    return keys


async def find_key(connection: Connection, key_id: str, *, thorough: bool = False) -> Key | None:
    """One key, None if it is not there; raises LaneError, or KmipError if it cannot be used."""
    found = (await find_keys(connection, [key_id], thorough=thorough)).get(key_id)
    if isinstance(found, KmipError):
        raise found
    return found


async def list_keys(connection: Connection) -> Found:
    """Every key whose name could be a key ID; raises LaneError or KmipError."""
    answer = await connection.ask_one(messages.locate(connection.version))
    objects = await read_objects(connection, messages.located(answer))
    groups: dict[str, list[KeyObject]] = {}
    for item in objects.values():
        if isinstance(item, KmipError):
            _log.warning("an object is left out: %s", item)
            continue
        for key_id in {parsed[0] for name in item.names if (parsed := parse_name(name))}:
            groups.setdefault(key_id, []).append(item)
    keys: dict[str, Key | KmipError] = {}
    for key_id in sorted(groups):
        try:
            key = _key(key_id, groups[key_id])
        except KmipError as error:
            keys[key_id] = error
        else:
            if key is not None:
                keys[key_id] = key
    return keys


async def _locate(
    connection: Connection, key_ids: Sequence[str], thorough: bool
) -> dict[str, set[str] | KmipError]:
    """The objects that may be versions of these keys, by their marks and by their names."""
    version = connection.version
    requests = [messages.locate(version, key_id=key_id) for key_id in key_ids]
    requests += [messages.locate(version, key_id) for key_id in key_ids]
    answers = await connection.ask(requests, _LOCATES)
    located: dict[str, set[str] | KmipError] = {}
    unmarked = []
    for key_id, mark, name in zip(
        key_ids, answers[: len(key_ids)], answers[len(key_ids) :], strict=True
    ):
        try:
            marked, first = _marked(mark), _located(name)
        except KmipError as error:
            located[key_id] = error
            continue
        located[key_id] = marked | first
        if thorough or not first or not first <= marked:
            # It was made elsewhere, or its version 1, which would show it, is gone.
            unmarked.append(key_id)
    start, ahead = 2, _FAR_AHEAD if thorough else _AHEAD
    while unmarked:
        unmarked = await _locate_names(connection, unmarked, range(start, start + ahead), located)
        start += ahead
    return located


async def _locate_names(
    connection: Connection,
    key_ids: Sequence[str],
    versions: Iterable[int],
    located: dict[str, set[str] | KmipError],
) -> list[str]:
    """Add the objects with the names of these versions; the keys that have any."""
    asked = [(key_id, version_name(key_id, number)) for key_id in key_ids for number in versions]
    requests = [messages.locate(connection.version, name) for _, name in asked]
    answers = await connection.ask(requests, _LOCATES)
    more: dict[str, None] = {}
    for (key_id, _), answer in zip(asked, answers, strict=True):
        known = located[key_id]
        try:
            uids = _located(answer)
        except KmipError as error:
            located[key_id] = error
            continue
        if uids and not isinstance(known, KmipError):
            known |= uids
            more[key_id] = None
    return [key_id for key_id in more if not isinstance(located[key_id], KmipError)]


def _marked(answer: Answer) -> set[str]:
    """What has a key's mark: nothing, if the server does not know of marks."""
    if answer.failed and answer.reason not in OF_SERVER:
        return set()
    return _located(answer)


def _located(answer: Answer) -> set[str]:
    if answer.failed and answer.reason not in _NOT_THERE:
        raise KmipError(f"it cannot be located: {messages.words_of(answer)}", answer.reason)
    return set(messages.located(answer))


def _readable(objects: Mapping[str, KeyObject | KmipError], uids: Iterable[str]) -> list[KeyObject]:
    """These objects, but for those that are gone; raises KmipError if one cannot be read."""
    found = []
    for uid in sorted(uids):
        item = objects.get(uid)
        if isinstance(item, KmipError):
            raise item
        if item is not None:
            found.append(item)
    return found


def _key(key_id: str, objects: Iterable[KeyObject]) -> Key | None:
    """The key that these are versions of; raises KmipError if two have the same name."""
    versions: dict[int, KeyObject] = {}
    for item in objects:
        for name in item.names:
            parsed = parse_name(name)
            if parsed is None or parsed[0] != key_id:
                continue
            if parsed[1] in versions:
                raise KmipError(f"two keys have the name {name}: a key's name must be its own")
            versions[parsed[1]] = item
    if not versions:
        return None
    able = [version for version, item in versions.items() if item.can_encrypt]
    return Key(key_id, versions, max(able or versions))


async def read_objects(
    connection: Connection, uids: Sequence[str]
) -> dict[str, KeyObject | KmipError]:
    """What the objects are, or why one cannot be read; those that are destroyed are left out."""
    answers = await connection.ask([messages.get_attributes(uid) for uid in uids])
    objects: dict[str, KeyObject | KmipError] = {}
    for uid, answer in zip(uids, answers, strict=True):
        if answer.failed:
            if answer.reason not in _NOT_THERE:
                words = f"the attributes of {uid!r} cannot be read: {messages.words_of(answer)}"
                objects[uid] = KmipError(words, answer.reason)
            continue
        try:
            item = _key_object(uid, messages.attributes(answer))
        except (TtlvError, OverflowError) as error:
            objects[uid] = KmipError(f"the attributes of {uid!r} make no sense: {error}")
            continue
        if item.state not in _GONE:
            objects[uid] = item
    return objects


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
    return KeyObject(uid, _names(found), spec, usage, state, float(created) or None, problem)


def _number(found: dict[int, list[Value]], tag: Tag) -> int:
    values = found.get(tag, [])
    return values[0] if values and isinstance(values[0], int) else 0


def _names(found: dict[int, list[Value]]) -> tuple[str, ...]:
    """All of them: an object may have names that others gave it."""
    values = [value for value in found.get(Tag.NAME, []) if isinstance(value, Structure)]
    names = [value.find(Tag.NAME_VALUE) for value in values]
    return tuple(dict.fromkeys(name for name in names if isinstance(name, str)))
