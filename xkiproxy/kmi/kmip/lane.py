"""A lane to a KMIP server: a connection, on which a batch is one message.

Under GCM the tag travels apart from the ciphertext (KMIP 1.4, sections 4.29 and 4.30).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from os import urandom
from typing import NamedTuple

from xkiproxy.config.models import KmipSettings
from xkiproxy.crypto.algorithms import (
    ALGORITHMS,
    BLOCK_SIZE,
    IV_SIZES,
    TAG_SIZE,
    Algorithm,
    Padding,
)
from xkiproxy.crypto.envelope import authenticated_data, version_unknown
from xkiproxy.crypto.operations import (
    CiphertextFormat,
    Decrypt,
    Decrypted,
    Describe,
    Encrypt,
    Encrypted,
    Fault,
    KeyDescription,
    Operation,
    OperationError,
    Random,
    RandomBytes,
    Result,
    invalid_ciphertext,
)
from xkiproxy.kmi.base import BreakReason, LaneError, Settle
from xkiproxy.kmi.endpoints import Endpoints
from xkiproxy.kmi.kmip import messages
from xkiproxy.kmi.kmip.connection import Connection, connect
from xkiproxy.kmi.kmip.keys import OF_SERVER, Key, KeyObject, find_key, find_keys
from xkiproxy.kmi.kmip.messages import Answer, Cipher, KmipError, Mode, Reason, Request, Tag
from xkiproxy.kmi.kmip.ttlv import TtlvError

_log = logging.getLogger(__name__)

_SAID_SECONDS = 60.0
_FRESH_SECONDS = 10.0
"""So long is believed what is known of a key: another may revoke, rotate or destroy it."""

_MODES = {
    Algorithm.AES_GCM: Mode.GCM,
    Algorithm.AES_CBC: Mode.CBC,
    Algorithm.AES_ECB: Mode.ECB,
}

_NOT_FOUND = (Fault.KEY_NOT_FOUND, "There is no such key.")
_NOT_PERMITTED = (Fault.KEY_UNUSABLE, "The key manager does not permit it.")
_CANNOT = (Fault.UNSUPPORTED, "The key manager cannot do it.")
_NOT_NOW = (Fault.UNAVAILABLE, "The key manager cannot do it now.")

_FAULTS = {
    Reason.ITEM_NOT_FOUND: _NOT_FOUND,
    Reason.OBJECT_NOT_FOUND: _NOT_FOUND,
    Reason.OBJECT_DESTROYED: _NOT_FOUND,
    Reason.PERMISSION_DENIED: _NOT_PERMITTED,
    Reason.NOT_AUTHORISED: _NOT_PERMITTED,
    Reason.OBJECT_ARCHIVED: (Fault.KEY_UNUSABLE, "The key is archived at the key manager."),
    Reason.WRONG_KEY_LIFECYCLE_STATE: (Fault.KEY_UNUSABLE, "The key is not active."),
    Reason.OPERATION_NOT_SUPPORTED: _CANNOT,
    Reason.FEATURE_NOT_SUPPORTED: _CANNOT,
    Reason.BAD_CRYPTOGRAPHIC_PARAMETERS: _CANNOT,
    Reason.UNSUPPORTED_CRYPTOGRAPHIC_PARAMETERS: _CANNOT,
    Reason.INVALID_FIELD: (Fault.UNSUPPORTED, "The key manager takes no such parameters."),
    Reason.AUTHENTICATION_NOT_SUCCESSFUL: _NOT_NOW,
    Reason.INTERNAL_SERVER_ERROR: _NOT_NOW,
    Reason.PROTECTION_STORAGE_UNAVAILABLE: _NOT_NOW,
    Reason.SERVER_LIMIT_EXCEEDED: (Fault.THROTTLED, "The key manager is asked too often."),
}

_OF_CIPHERTEXT = {Reason.CRYPTOGRAPHIC_FAILURE, Reason.INVALID_FIELD, Reason.GENERAL_FAILURE, 0}
"""What a server may say of a ciphertext that it cannot open; some of it may mean anything."""

_OF_ANYTHING = {Reason.CRYPTOGRAPHIC_FAILURE, Reason.GENERAL_FAILURE, 0}
"""What a server may say of an encryption for its own sake, or for that of the parameters."""


class _Known(NamedTuple):
    """What was found out of a key, in which epoch, and until when that is believed."""

    epoch: int
    until: float
    key: Key


class _Step:
    """An operation on its way: its request, and what is needed to understand the answer."""

    __slots__ = ("algorithm", "cipher", "iv", "key", "operation", "request", "uid", "version")

    def __init__(self, operation: Operation, request: Request) -> None:
        self.operation = operation
        self.request = request
        self.key: Key | None = None
        self.uid = ""
        self.algorithm = Algorithm.AES_GCM
        self.cipher = Cipher(Mode.GCM)
        self.iv = b""
        self.version = 0


class KmipLane:
    """See `xkiproxy.kmi.base.Lane`."""

    def __init__(
        self, connection: Connection, settings: KmipSettings, keys: dict[str, _Known]
    ) -> None:
        """`keys`: what is known of keys, shared by the lanes to an address."""
        self._connection = connection
        self._makes_iv = settings.iv == "generator"
        self._draws = settings.random == "generator"
        self._name = settings.name
        self._probe_key = settings.probe_key
        self._keys = keys
        self._said = ("", 0.0)

    async def execute(self, batch: Sequence[Operation], epoch: int, settle: Settle) -> None:
        """See `Lane.execute`."""
        keys = await self._look_up(batch, epoch)
        steps: list[tuple[int, _Step]] = []
        for index, operation in enumerate(batch):
            try:
                outcome = self._prepare(operation, keys)
            except OperationError as error:
                settle(index, error)
                continue
            if isinstance(outcome, _Step):
                steps.append((index, outcome))
            else:
                settle(index, outcome)
        if steps:
            await self._run(steps, settle)

    async def probe(self) -> None:
        """See `Lane.probe`: the probe key opens what it closes, or at least the server answers."""
        try:
            if self._probe_key is None:
                await self._connection.ask_one(messages.query_operations())
            else:
                key = await find_key(self._connection, self._probe_key)
                if key is None:
                    raise KmipError("it is not there")
                await self._open_what_it_closes(key.versions[key.newest].uid)
        except (KmipError, TtlvError) as error:
            if isinstance(error, KmipError) and error.reason == Reason.SERVER_LIMIT_EXCEEDED:
                return  # it serves, and more than it likes
            of_key = f"probe_key {self._probe_key}: " if self._probe_key else ""
            raise self._connection.end(f"{of_key}{error}", BreakReason.DEVICE) from None

    async def wait_broken(self) -> LaneError:
        """See `Lane.wait_broken`."""
        return await asyncio.shield(self._connection.broken)

    async def close(self) -> None:
        """End the connection."""
        self._connection.end("closed", BreakReason.EXIT)

    # ---- requests --------------------------------------------------------------------------

    async def _look_up(
        self, batch: Sequence[Operation], epoch: int
    ) -> dict[str, Key | OperationError]:
        """The keys of a batch: what is not known, or not any more, is asked for together.

        So is a key of which a ciphertext names a version that is not known: another may just have
        rotated it.
        """
        now = time.monotonic()
        found: dict[str, Key | OperationError] = {}
        wanted: dict[str, None] = {}
        for operation in batch:
            if isinstance(operation, Random):
                continue
            known = self._keys.get(operation.key_id)
            if (
                known is None
                or known.epoch < epoch
                or known.until < now
                or (
                    isinstance(operation, Decrypt)
                    and operation.version is not None
                    and operation.version not in known.key.versions
                )
            ):
                wanted[operation.key_id] = None
            else:
                found[operation.key_id] = known.key
        if wanted:
            found |= await self._find(list(wanted), epoch)
        return found

    async def _find(self, key_ids: Sequence[str], epoch: int) -> dict[str, Key | OperationError]:
        result = await find_keys(self._connection, key_ids)
        until = time.monotonic() + _FRESH_SECONDS
        found: dict[str, Key | OperationError] = {}
        for key_id in key_ids:
            key = result.get(key_id)
            if isinstance(key, Key):
                self._keys[key_id] = _Known(epoch, until, key)
                found[key_id] = key
                continue
            self._keys.pop(key_id, None)
            if key is None:
                found[key_id] = OperationError(*_NOT_FOUND)
                continue
            self._say(f"key {key_id}: {key}")
            if key.reason in OF_SERVER or key.reason == Reason.GENERAL_FAILURE:
                found[key_id] = _error(key.reason, *_NOT_NOW)
            else:
                why = "The key cannot be looked up at the key manager."
                found[key_id] = OperationError(Fault.KEY_UNUSABLE, why)
        return found

    def _prepare(
        self, operation: Operation, keys: dict[str, Key | OperationError]
    ) -> _Step | Result:
        """The request of an operation, or its result if the server need not be asked."""
        if isinstance(operation, Random):
            if self._draws:
                return RandomBytes(urandom(operation.length))
            return _Step(operation, messages.rng_retrieve(operation.length))
        key = keys[operation.key_id]
        if isinstance(key, OperationError):
            raise OperationError(key.fault, key.message)
        if isinstance(operation, Describe):
            return _description(key)
        if isinstance(operation, Encrypt):
            return self._encryption(operation, key)
        return _decryption(operation, key)

    def _encryption(self, operation: Encrypt, key: Key) -> _Step:
        version = key.newest
        item = key.versions[version]
        if not item.can_encrypt:
            # It may have been activated meanwhile.
            self._keys.pop(key.key_id, None)
            raise _unusable(item)
        algorithm = _algorithm(operation, item)
        aad = b""
        if operation.format is not CiphertextFormat.ENVELOPE:
            _check_single_version(key)
            aad = operation.aad
        elif algorithm is Algorithm.AES_GCM:
            aad = authenticated_data(operation.aad, version)
        cipher = Cipher(_MODES[algorithm], _padding(algorithm, operation.padding))
        iv = operation.iv or b""
        if not iv and (self._makes_iv or algorithm is not Algorithm.AES_GCM):
            iv = urandom(IV_SIZES[algorithm])
        step = _Step(operation, messages.encrypt(item.uid, cipher, operation.plaintext, iv, aad))
        step.key, step.uid, step.algorithm, step.cipher = key, item.uid, algorithm, cipher
        step.iv, step.version = iv, version
        return step

    # ---- answers ---------------------------------------------------------------------------

    async def _run(self, steps: Sequence[tuple[int, _Step]], settle: Settle) -> None:
        answers = await self._connection.ask([step.request for _, step in steps])
        doubtful: list[tuple[int, _Step, int]] = []
        for (index, step), answer in zip(steps, answers, strict=True):
            if answer.failed and _is_for_padding(step, answer):
                settle(index, await self._without_padding(step))
            elif answer.failed and _is_doubtful(step, answer):
                doubtful.append((index, step, answer.reason))
            else:
                settle(index, self._outcome(step, answer))
        if doubtful:
            await self._settle_doubtful(doubtful, settle)

    def _outcome(self, step: _Step, answer: Answer) -> Result | OperationError:
        if answer.failed:
            return self._failure(step, answer)
        try:
            return _result(step, answer)
        except TtlvError as error:
            self._say(f"its answer makes no sense: {error}")
            return OperationError(Fault.INTERNAL, "The key manager's answer makes no sense.")

    async def _settle_doubtful(
        self, steps: Sequence[tuple[int, _Step, int]], settle: Settle
    ) -> None:
        """Something failed, and the server's words could mean that the server is at fault.

        So a key shows whether the server works, by opening what it closes, and what failed is tried
        once more: what was only for a moment is over then. Only what fails again with the same
        words, at a server that works, is the fault of the operation.
        """
        works: dict[str, bool | None] = {}
        for _, step, _ in steps:
            if step.uid not in works:
                works[step.uid] = await self._works(step)
        again = await self._connection.ask([step.request for _, step, _ in steps])
        for (index, step, reason), answer in zip(steps, again, strict=True):
            if not answer.failed or not _is_doubtful(step, answer):
                settle(index, self._outcome(step, answer))
                continue
            well = works[step.uid]
            if well is None:
                well = answer.reason == Reason.CRYPTOGRAPHIC_FAILURE
            if well and answer.reason == reason and isinstance(step.operation, Decrypt):
                settle(index, invalid_ciphertext())
                continue
            failure = self._failure(step, answer)
            is_for_now = not well or answer.reason != reason
            settle(index, OperationError(*_NOT_NOW) if is_for_now else failure)

    async def _works(self, step: _Step) -> bool | None:
        """Whether a key opens what it closes, if there is one that may do both.

        Best the key itself; one that only decrypts, or is deactivated, is stood for by its newest
        version, or by the probe key.
        """
        uid = ""
        if step.key is not None:
            items = step.key.versions
            for item in (items[step.version], items[step.key.newest]):
                if not uid and item.can_encrypt and item.can_decrypt:
                    uid = item.uid
        try:
            if not uid and self._probe_key is not None:
                key = await find_key(self._connection, self._probe_key)
                uid = key.versions[key.newest].uid if key is not None else ""
            if not uid:
                return None
            await self._open_what_it_closes(uid)
        except (KmipError, TtlvError) as error:
            self._say(f"it does not open what it closes: {error}")
            return False
        return True

    async def _without_padding(self, step: _Step) -> Result | OperationError:
        """For a server that always pads: the padding's block is cut off, or made and added.

        What decrypts to a whole block of padding after the last block is the encryption of nothing
        with that block as IV (NIST SP 800-38A; RFC 5652, section 6.3).
        """
        operation, cipher = step.operation, Cipher(step.cipher.mode, messages.PKCS5_PADDING)
        try:
            if isinstance(operation, Encrypt):
                request = messages.encrypt(step.uid, cipher, operation.plaintext, step.iv, b"")
                data = messages.output(await self._connection.ask_one(request))[:-BLOCK_SIZE]
                return Encrypted(data, step.iv, step.version, step.algorithm, Padding.NONE)
            assert isinstance(operation, Decrypt)  # noqa: S101 - nothing else has a padding
            iv = (operation.iv + operation.ciphertext)[-BLOCK_SIZE:] if operation.iv else b""
            request = messages.encrypt(step.uid, cipher, b"", iv, b"")
            data = operation.ciphertext + messages.output(await self._connection.ask_one(request))
            request = messages.decrypt(step.uid, cipher, data, operation.iv, b"", b"")
            data = messages.output(await self._connection.ask_one(request))
            return Decrypted(data, step.version, step.algorithm, Padding.NONE)
        except (KmipError, TtlvError) as error:
            self._say(f"without padding: {error}")
            reason = error.reason if isinstance(error, KmipError) else 0
            return _error(reason, Fault.UNSUPPORTED, "The key manager cannot do it unpadded.")

    async def _open_what_it_closes(self, uid: str) -> None:
        """Raises KmipError or TtlvError if this key does not."""
        cipher, text = Cipher(Mode.GCM), urandom(BLOCK_SIZE)
        iv = urandom(IV_SIZES[Algorithm.AES_GCM]) if self._makes_iv else b""
        closed = await self._connection.ask_one(messages.encrypt(uid, cipher, text, iv, b""))
        iv = iv or _made_iv(closed)
        tag = closed.payload.octets(Tag.AUTHENTICATION_TAG)
        request = messages.decrypt(uid, cipher, messages.output(closed), iv, b"", tag)
        if messages.output(await self._connection.ask_one(request)) != text:
            raise TtlvError("what it opens is not what it has closed")

    def _failure(self, step: _Step, answer: Answer) -> OperationError:
        name = type(step.operation).__name__.lower()
        self._say(f"{name}: {messages.words_of(answer)}")
        if isinstance(step.operation, Random):
            # It depends on nothing that a client sends.
            return _error(answer.reason, *_NOT_NOW)
        # What is remembered of the key may be old.
        self._keys.pop(step.operation.key_id, None)
        return _error(answer.reason, Fault.INTERNAL, f"The key manager failed to {name}.")

    def _say(self, message: str) -> None:
        """Log the server's words for administrators, the same once a minute; clients get ours."""
        now = time.monotonic()
        if (message, True) != (self._said[0], now < self._said[1]):
            self._said = message, now + _SAID_SECONDS
            _log.warning("KMI %s: %s", self._name, message)


def _error(reason: int, fault: Fault, words: str) -> OperationError:
    """What a reason means, or what is to be said if it has no meaning here."""
    known = _FAULTS.get(reason)  # type: ignore[call-overload]
    return OperationError(*(known or (fault, words)))


def _is_doubtful(step: _Step, answer: Answer) -> bool:
    """Whether a failure may be the server's or the operation's."""
    if isinstance(step.operation, Decrypt):
        return answer.reason in _OF_CIPHERTEXT
    return isinstance(step.operation, Encrypt) and answer.reason in _OF_ANYTHING


def _is_for_padding(step: _Step, answer: Answer) -> bool:
    return step.cipher.padding == messages.NO_PADDING and answer.reason in (
        Reason.INVALID_FIELD,
        Reason.FEATURE_NOT_SUPPORTED,
        Reason.BAD_CRYPTOGRAPHIC_PARAMETERS,
    )


def _decryption(operation: Decrypt, key: Key) -> _Step:
    if operation.version is None or operation.format is not CiphertextFormat.ENVELOPE:
        _check_single_version(key)
    version = operation.version or key.newest
    item = key.versions.get(version)
    if item is None:
        raise invalid_ciphertext()
    if not item.can_decrypt:
        raise _unusable(item)
    algorithm = _algorithm(operation, item)
    data, tag, aad = operation.ciphertext, b"", b""
    if algorithm is Algorithm.AES_GCM:
        data, tag, aad = data[:-TAG_SIZE], data[-TAG_SIZE:], operation.aad
        if operation.format is CiphertextFormat.ENVELOPE:
            aad = authenticated_data(aad, version)
    cipher = Cipher(_MODES[algorithm], _padding(algorithm, operation.padding))
    step = _Step(operation, messages.decrypt(item.uid, cipher, data, operation.iv, aad, tag))
    step.key, step.uid, step.algorithm, step.cipher = key, item.uid, algorithm, cipher
    step.version = version
    return step


def _result(step: _Step, answer: Answer) -> Result:
    """What a successful answer says; raises TtlvError if it lacks something."""
    operation = step.operation
    data = messages.output(answer)
    if isinstance(operation, Random):
        if len(data) != operation.length:
            raise TtlvError("it has another number of random bytes")
        return RandomBytes(data)
    padding = None
    if step.cipher.padding:
        padding = Padding.PKCS7 if step.cipher.padding == messages.PKCS5_PADDING else Padding.NONE
    if isinstance(operation, Decrypt):
        if padding is None and len(data) != len(operation.ciphertext) - TAG_SIZE:
            raise TtlvError("the plaintext has another size than its ciphertext")
        return Decrypted(data, step.version, step.algorithm, padding)
    iv = step.iv
    if not iv and step.algorithm is Algorithm.AES_GCM:
        iv = _made_iv(answer)
    if len(iv) != IV_SIZES[step.algorithm]:
        raise TtlvError("its IV has another size")
    if step.algorithm is Algorithm.AES_GCM:
        tag = answer.payload.octets(Tag.AUTHENTICATION_TAG)
        assert isinstance(operation, Encrypt)  # noqa: S101 - nothing else is left
        if len(tag) != TAG_SIZE or len(data) != len(operation.plaintext):
            raise TtlvError("the ciphertext or its tag has another size")
        data += tag
    return Encrypted(data, iv, step.version, step.algorithm, padding)


def _made_iv(answer: Answer) -> bytes:
    """The IV that the server has made; raises TtlvError if there is none, or it does not fit."""
    iv = answer.payload.octets(Tag.IV_COUNTER_NONCE)
    if len(iv) != IV_SIZES[Algorithm.AES_GCM]:
        raise TtlvError(f"it makes IVs of {len(iv)} bytes; set iv to generator")
    return iv


def _description(key: Key) -> KeyDescription:
    info = key.info
    if info.problem or info.spec is None:
        raise OperationError(Fault.KEY_UNUSABLE, f"The key cannot be used: {info.problem}.")
    return KeyDescription(info.key_id, info.spec, info.usage, key.newest, info.created)


def _algorithm(operation: Encrypt | Decrypt, item: KeyObject) -> Algorithm:
    algorithm = operation.algorithm or Algorithm.AES_GCM
    if item.spec is None or algorithm not in ALGORITHMS[item.spec]:
        raise OperationError(Fault.UNSUPPORTED, f"A key of spec {item.spec} does no {algorithm}.")
    return algorithm


def _padding(algorithm: Algorithm, padding: Padding | None) -> int:
    if algorithm is Algorithm.AES_GCM:
        return 0
    return messages.NO_PADDING if padding is Padding.NONE else messages.PKCS5_PADDING


def _check_single_version(key: Key) -> None:
    """See `version_unknown`; a version that is not activated has made no ciphertext."""
    if len(key.versions) != 1 and len(key.info.versions) != 1:
        raise version_unknown()


def _unusable(item: KeyObject) -> OperationError:
    why = item.problem or "its usage mask does not allow it"
    return OperationError(Fault.KEY_UNUSABLE, f"The key cannot be used: {why}.")


class KmipLauncher:
    """Starts the lanes of a KMI, spread over its addresses."""

    def __init__(self, settings: KmipSettings) -> None:
        self._settings = settings
        self._keys: list[dict[str, _Known]] = [{} for _ in settings.address]
        self._endpoints = Endpoints(len(settings.address))

    async def launch(self, index: int, *, home: bool = False) -> KmipLane:
        """See `xkiproxy.kmi.base.Launcher`; with a probe key, it begins with its check."""
        with self._endpoints.starting(index, home=home) as endpoint:
            return await self._launch_at(endpoint)

    def is_away(self, index: int) -> bool:
        """See `xkiproxy.kmi.base.Launcher`."""
        return self._endpoints.is_away(index)

    async def _launch_at(self, endpoint: int) -> KmipLane:
        connection = await connect(self._settings, endpoint)
        lane = KmipLane(connection, self._settings, self._keys[endpoint])
        if self._settings.probe_key is not None:
            try:
                await lane.probe()
            except LaneError as error:
                text = f"{self._settings.address[endpoint]}: {error.message}"
                raise LaneError(text, BreakReason.START) from None
            except BaseException:
                await lane.close()  # a start that is broken off leaves no connection behind
                raise
        return lane
