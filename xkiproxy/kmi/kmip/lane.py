"""A lane to a KMIP server: a connection, on which a batch is one message.

Under GCM the tag travels apart from the ciphertext (KMIP 1.4, sections 4.29 and 4.30).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from os import urandom

from xkiproxy.config.models import KmipSettings
from xkiproxy.crypto.algorithms import (
    ALGORITHMS,
    BLOCK_SIZE,
    IV_SIZES,
    TAG_SIZE,
    Algorithm,
    Padding,
)
from xkiproxy.crypto.envelope import authenticated_data
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
from xkiproxy.kmi.kmip.keys import Key, KeyObject, find_key
from xkiproxy.kmi.kmip.messages import Answer, Cipher, KmipError, Mode, Reason, Request, Tag
from xkiproxy.kmi.kmip.ttlv import TtlvError

_log = logging.getLogger(__name__)

_SAID_SECONDS = 60.0

_MODES = {
    Algorithm.AES_GCM: Mode.GCM,
    Algorithm.AES_CBC: Mode.CBC,
    Algorithm.AES_ECB: Mode.ECB,
}

_FAULTS = {
    Reason.ITEM_NOT_FOUND: (Fault.KEY_NOT_FOUND, "There is no such key."),
    Reason.OBJECT_DESTROYED: (Fault.KEY_NOT_FOUND, "There is no such key."),
    Reason.PERMISSION_DENIED: (Fault.KEY_UNUSABLE, "The key manager does not permit it."),
    Reason.OBJECT_ARCHIVED: (Fault.KEY_UNUSABLE, "The key is archived at the key manager."),
    Reason.WRONG_KEY_LIFECYCLE_STATE: (Fault.KEY_UNUSABLE, "The key is not active."),
    Reason.OPERATION_NOT_SUPPORTED: (Fault.UNSUPPORTED, "The key manager cannot do it."),
    Reason.FEATURE_NOT_SUPPORTED: (Fault.UNSUPPORTED, "The key manager cannot do it."),
    Reason.BAD_CRYPTOGRAPHIC_PARAMETERS: (Fault.UNSUPPORTED, "The key manager cannot do it."),
    Reason.INVALID_FIELD: (Fault.UNSUPPORTED, "The key manager takes no such parameters."),
}

_OF_CIPHERTEXT = {Reason.CRYPTOGRAPHIC_FAILURE, Reason.INVALID_FIELD, Reason.GENERAL_FAILURE, 0}
"""What a server may say of a ciphertext that it cannot open; some of it may mean anything."""


class _Step:
    """An operation on its way: its request, and what is needed to understand the answer."""

    __slots__ = ("algorithm", "cipher", "iv", "operation", "request", "uid", "version")

    def __init__(self, operation: Operation, request: Request) -> None:
        self.operation = operation
        self.request = request
        self.uid = ""
        self.algorithm = Algorithm.AES_GCM
        self.cipher = Cipher(Mode.GCM)
        self.iv = b""
        self.version = 0


class KmipLane:
    """See `xkiproxy.kmi.base.Lane`."""

    def __init__(self, connection: Connection, settings: KmipSettings) -> None:
        self._connection = connection
        self._makes_iv = settings.iv == "generator"
        self._draws = settings.random == "generator"
        self._name = settings.name
        self._keys: dict[str, Key] = {}
        self._epoch = 0
        self._said = ("", 0.0)

    async def execute(self, batch: Sequence[Operation], epoch: int, settle: Settle) -> None:
        """See `Lane.execute`."""
        if epoch != self._epoch:
            self._keys.clear()
            self._epoch = epoch
        steps: list[tuple[int, _Step]] = []
        for index, operation in enumerate(batch):
            try:
                outcome = await self._prepare(operation)
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
        """See `Lane.probe`: the server answers. That keys can be used their own traffic shows."""
        try:
            await self._connection.ask_one(messages.query_operations())
        except KmipError as error:
            raise self._connection.end(str(error), BreakReason.DEVICE) from None

    async def wait_broken(self) -> LaneError:
        """See `Lane.wait_broken`."""
        return await asyncio.shield(self._connection.broken)

    async def close(self) -> None:
        """End the connection."""
        self._connection.end("closed", BreakReason.EXIT)

    # ---- requests --------------------------------------------------------------------------

    async def _prepare(self, operation: Operation) -> _Step | Result:
        """The request of an operation, or its result if the server need not be asked."""
        if isinstance(operation, Random):
            if self._draws:
                return RandomBytes(urandom(operation.length))
            return _Step(operation, messages.rng_retrieve(operation.length))
        key = await self._key(operation.key_id)
        if isinstance(operation, Describe):
            return _description(key)
        if isinstance(operation, Encrypt):
            return self._encryption(operation, key)
        if operation.version is not None and operation.version not in key.versions:
            # Another process may just have rotated the key.
            self._keys.pop(key.key_id, None)
            key = await self._key(operation.key_id)
        return _decryption(operation, key)

    async def _key(self, key_id: str) -> Key:
        key = self._keys.get(key_id)
        if key is None:
            try:
                key = await find_key(self._connection, key_id)
            except KmipError as error:
                self._say(f"key {key_id}: {error}")
                why = "The key cannot be looked up at the key manager."
                raise OperationError(Fault.KEY_UNUSABLE, why) from None
            if key is None:
                raise OperationError(Fault.KEY_NOT_FOUND, "There is no such key.")
            self._keys[key_id] = key
        return key

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
        step.uid, step.algorithm, step.cipher = item.uid, algorithm, cipher
        step.iv, step.version = iv, version
        return step

    # ---- answers ---------------------------------------------------------------------------

    async def _run(self, steps: Sequence[tuple[int, _Step]], settle: Settle) -> None:
        try:
            answers = await self._connection.ask([step.request for _, step in steps])
        except KmipError as error:
            self._say(str(error))
            for index, _ in steps:
                settle(index, OperationError(Fault.INTERNAL, "The key manager refuses the batch."))
            return
        doubtful: list[tuple[int, _Step]] = []
        for (index, step), answer in zip(steps, answers, strict=True):
            try:
                if not answer.failed:
                    settle(index, _result(step, answer))
                elif _is_for_padding(step, answer):
                    settle(index, await self._without_padding(step))
                elif isinstance(step.operation, Decrypt) and answer.reason in _OF_CIPHERTEXT:
                    doubtful.append((index, step))
                else:
                    settle(index, self._failure(step, answer))
            except TtlvError as error:
                self._say(f"its answer makes no sense: {error}")
                text = "The key manager's answer makes no sense."
                settle(index, OperationError(Fault.INTERNAL, text))
        if doubtful:
            await self._settle_doubtful(doubtful, settle)

    async def _settle_doubtful(self, steps: Sequence[tuple[int, _Step]], settle: Settle) -> None:
        """A decryption failed, and the server's words could mean that the server is at fault.

        So each key shows whether it works, by opening what it closes: then it was the ciphertext.
        """
        works: dict[str, bool] = {}
        for _, step in steps:
            if step.uid not in works:
                works[step.uid] = await self._opens_what_it_closes(step.uid)
        for index, step in steps:
            if works[step.uid]:
                settle(index, invalid_ciphertext())
            else:
                text = "The key manager cannot decrypt, and does not say why."
                settle(index, OperationError(Fault.INTERNAL, text))

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
            return OperationError(
                Fault.UNSUPPORTED, f"Without padding the key manager says: {error}"
            )

    async def _opens_what_it_closes(self, uid: str) -> bool:
        cipher, text, iv = Cipher(Mode.GCM), urandom(BLOCK_SIZE), urandom(12)
        iv = iv if self._makes_iv else b""
        try:
            closed = await self._connection.ask_one(messages.encrypt(uid, cipher, text, iv, b""))
            iv = iv or closed.payload.octets(Tag.IV_COUNTER_NONCE)
            tag = closed.payload.octets(Tag.AUTHENTICATION_TAG)
            request = messages.decrypt(uid, cipher, messages.output(closed), iv, b"", tag)
            return messages.output(await self._connection.ask_one(request)) == text
        except (KmipError, TtlvError):
            return False

    def _failure(self, step: _Step, answer: Answer) -> OperationError:
        name = type(step.operation).__name__.lower()
        self._say(f"{name}: {answer.message or f'reason 0x{answer.reason:x}'}")
        if not isinstance(step.operation, Random):
            # What is remembered of the key may be old.
            self._keys.pop(step.operation.key_id, None)
        known = _FAULTS.get(answer.reason)  # type: ignore[call-overload]
        if known is not None:
            return OperationError(*known)
        return OperationError(Fault.INTERNAL, f"The key manager failed to {name}.")

    def _say(self, message: str) -> None:
        """Log the server's words for administrators, the same once a minute; clients get ours."""
        now = time.monotonic()
        if (message, True) != (self._said[0], now < self._said[1]):
            self._said = message, now + _SAID_SECONDS
            _log.warning("KMI %s: %s", self._name, message)


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
    step.uid, step.algorithm, step.cipher, step.version = item.uid, algorithm, cipher, version
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
    if not iv and IV_SIZES[step.algorithm]:
        iv = answer.payload.octets(Tag.IV_COUNTER_NONCE)
    if len(iv) != IV_SIZES[step.algorithm]:
        raise TtlvError("its IV has another size")
    if step.algorithm is Algorithm.AES_GCM:
        tag = answer.payload.octets(Tag.AUTHENTICATION_TAG)
        assert isinstance(operation, Encrypt)  # noqa: S101 - nothing else is left
        if len(tag) != TAG_SIZE or len(data) != len(operation.plaintext):
            raise TtlvError("the ciphertext or its tag has another size")
        data += tag
    return Encrypted(data, iv, step.version, step.algorithm, padding)


def _description(key: Key) -> KeyDescription:
    info = key.info
    if info.problem or info.spec is None:
        raise OperationError(Fault.KEY_UNUSABLE, f"The key cannot be used: {info.problem}.")
    return KeyDescription(info.key_id, info.spec, info.usage, info.version, info.created)


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
    """A ciphertext that names no version can only belong to a key that has one."""
    if len(key.versions) != 1:
        raise OperationError(
            Fault.UNSUPPORTED,
            "The key was rotated, and a raw ciphertext cannot say which version made it.",
        )


def _unusable(item: KeyObject) -> OperationError:
    why = item.problem or "its usage mask does not allow it"
    return OperationError(Fault.KEY_UNUSABLE, f"The key cannot be used: {why}.")


class KmipLauncher:
    """Starts the lanes of a KMI, spread over its addresses."""

    def __init__(self, settings: KmipSettings) -> None:
        self._settings = settings
        self._endpoints = Endpoints(len(settings.address))

    async def launch(self, index: int) -> KmipLane:
        """See `xkiproxy.kmi.base.Launcher`."""
        endpoint = self._endpoints.next(index)
        try:
            connection = await connect(self._settings, endpoint)
        except LaneError:
            self._endpoints.failed(endpoint)
            raise
        self._endpoints.started(endpoint)
        return KmipLane(connection, self._settings)
