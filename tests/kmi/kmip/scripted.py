"""A KMIP 1.4 server of the tests' own, for what PyKMIP's would never do: it fails as it is told."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pykmip import issue

from xkiproxy.config.models import KmipSettings
from xkiproxy.kmi.kmip import messages, ttlv
from xkiproxy.kmi.kmip.messages import Op, Reason, Tag
from xkiproxy.kmi.kmip.ttlv import Structure

Refusal = tuple[int, str]
Item = tuple[int, Structure]
"""An operation and its payload."""


@dataclass
class Object:
    """A key at the server; `more` are encoded attributes."""

    names: tuple[str, ...]
    state: int = 2
    mask: int = 12
    mark: str = ""
    more: bytes = b""


def attribute(name: str, value: bytes) -> bytes:
    return ttlv.structure(Tag.ATTRIBUTE, ttlv.text(Tag.ATTRIBUTE_NAME, name), value)


def named(name: str) -> bytes:
    value = ttlv.text(Tag.NAME_VALUE, name) + ttlv.enumeration(Tag.NAME_TYPE, 1)
    return attribute("Name", ttlv.structure(Tag.ATTRIBUTE_VALUE, value))


@dataclass
class Scripted:
    """`refuse` says of an item, `refuse_all` of a message, why it fails, or None."""

    folder: Path
    objects: dict[str, Object] = field(default_factory=lambda: {"1": Object(("key",))})
    refuse: Callable[[int, Structure], Refusal | None] = lambda _operation, _payload: None
    refuse_all: Callable[[list[Item]], Refusal | None] = lambda _items: None
    takes_marks: bool = True
    seconds: float = 0.0
    """How long each message takes."""
    asked: list[list[int]] = field(default_factory=list)
    """The operations of each message."""
    shuffle: Callable[[list[bytes]], list[bytes]] = lambda items: items
    echoes: bool = True
    """Whether it says which items its answers belong to."""
    port: int = 0
    open: int = 0
    """How many connections there are."""

    def settings(self, **changes: Any) -> KmipSettings:
        tls = {
            "ca": self.folder / "ca.crt",
            "certificate": self.folder / "client.crt",
            "private_key": self.folder / "client.key",
        }
        fields: dict[str, Any] = {
            "name": "kmip", "type": "kmip", "address": f"localhost:{self.port}", "tls": tls,
            "lanes": 1, "random": "generator", **changes,
        }  # fmt: skip
        return KmipSettings(**fields)

    def count(self, operation: int) -> int:
        """In how many messages an operation was asked for."""
        return sum(operation in message for message in self.asked)

    # ---- messages --------------------------------------------------------------------------

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while True:
                head = await reader.readexactly(ttlv.HEADER_SIZE)
                body = await reader.readexactly(ttlv.message_size(head) - ttlv.HEADER_SIZE)
                answer = self._answer(ttlv.decode(head + body))
                await asyncio.sleep(self.seconds)
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.open -= 1
            writer.close()

    def _answer(self, message: Structure) -> bytes:
        found = [item for item in message.all(Tag.BATCH_ITEM) if isinstance(item, Structure)]
        items = [(i.number(Tag.OPERATION), i.structure(Tag.REQUEST_PAYLOAD)) for i in found]
        self.asked.append([operation for operation, _ in items])
        refusal = self.refuse_all(items)
        if refusal is not None:
            return _message([ttlv.structure(Tag.BATCH_ITEM, _refused(refusal))])
        answers = []
        for (operation, payload), item in zip(items, found, strict=True):
            made = self.refuse(operation, payload)
            outcome = self._do(operation, payload) if made is None else made
            number = ttlv.octets(Tag.UNIQUE_BATCH_ITEM_ID, item.octets(Tag.UNIQUE_BATCH_ITEM_ID))
            result = (
                _refused(outcome)
                if isinstance(outcome, tuple)
                else ttlv.enumeration(Tag.RESULT_STATUS, 0)
                + ttlv.structure(Tag.RESPONSE_PAYLOAD, outcome)
            )
            head = ttlv.enumeration(Tag.OPERATION, operation) + (number if self.echoes else b"")
            answers.append(ttlv.structure(Tag.BATCH_ITEM, head, result))
        return _message(self.shuffle(answers))

    def _do(self, operation: int, payload: Structure) -> bytes | Refusal:
        if operation == Op.DISCOVER_VERSIONS:
            return _version()
        if operation == Op.QUERY:
            return b"".join(ttlv.enumeration(Tag.OPERATION, known) for known in Op)
        if operation == Op.LOCATE:
            return self._locate(payload)
        return self._do_with(operation, payload)

    def _do_with(self, operation: int, payload: Structure) -> bytes | Refusal:
        uid = payload.text(Tag.UNIQUE_IDENTIFIER)
        if uid not in self.objects:
            return Reason.ITEM_NOT_FOUND, "There is no such object."
        if operation == Op.GET_ATTRIBUTES:
            return self._attributes(self.objects[uid])
        if operation in (Op.ENCRYPT, Op.DECRYPT):
            return self._crypt(operation, uid, payload)
        return Reason.OPERATION_NOT_SUPPORTED, "It is not supported."

    def _locate(self, payload: Structure) -> bytes | Refusal:
        wanted = messages.attributes(messages.Answer(payload))
        marks = wanted.get(Tag.APPLICATION_SPECIFIC_INFORMATION, [])
        if marks and not self.takes_marks:
            return Reason.INVALID_FIELD, "There is no such attribute."
        mark = [m.text(Tag.APPLICATION_DATA) for m in marks if isinstance(m, Structure)]
        name = [
            n.text(Tag.NAME_VALUE) for n in wanted.get(Tag.NAME, []) if isinstance(n, Structure)
        ]
        uids = [
            uid
            for uid, item in self.objects.items()
            if all(n in item.names for n in name) and all(m == item.mark for m in mark)
        ]
        return b"".join(ttlv.text(Tag.UNIQUE_IDENTIFIER, uid) for uid in uids)

    def _attributes(self, item: Object) -> bytes:
        value = Tag.ATTRIBUTE_VALUE
        return b"".join(
            (
                *map(named, item.names),
                attribute("Cryptographic Algorithm", ttlv.enumeration(value, messages.AES)),
                attribute("Cryptographic Length", ttlv.integer(value, 256)),
                attribute("Cryptographic Usage Mask", ttlv.integer(value, item.mask)),
                attribute("State", ttlv.enumeration(value, item.state)),
                item.more,
            )
        )

    def _crypt(self, operation: int, uid: str, payload: Structure) -> bytes | Refusal:
        """GCM under a key that is the object's identifier."""
        gcm = AESGCM(uid.encode().ljust(32, b"."))
        needed = messages.ENCRYPT_BIT if operation == Op.ENCRYPT else messages.DECRYPT_BIT
        if not self.objects[uid].mask & needed:
            return Reason.PERMISSION_DENIED, "Its usage mask does not allow it."
        data, aad = payload.octets(Tag.DATA), payload.find(Tag.ADDITIONAL_DATA) or b""
        iv = payload.find(Tag.IV_COUNTER_NONCE)
        assert isinstance(aad, bytes)
        made = b""
        if iv is None:
            parameters = payload.structure(Tag.CRYPTOGRAPHIC_PARAMETERS)
            if parameters.find(Tag.RANDOM_IV) is not True:
                return Reason.INVALID_FIELD, "An IV is missing."
            iv = bytes(range(parameters.number(Tag.IV_LENGTH) // 8))
            made = ttlv.octets(Tag.IV_COUNTER_NONCE, iv)
        assert isinstance(iv, bytes)
        if operation == Op.ENCRYPT:
            closed = gcm.encrypt(iv, data, aad)
            tag = ttlv.octets(Tag.AUTHENTICATION_TAG, closed[-16:])
            return ttlv.octets(Tag.DATA, closed[:-16]) + made + tag
        try:
            opened = gcm.decrypt(iv, data + payload.octets(Tag.AUTHENTICATION_TAG), aad)
        except InvalidTag:
            return Reason.CRYPTOGRAPHIC_FAILURE, "The tag is wrong."
        return ttlv.octets(Tag.DATA, opened)


def _version() -> bytes:
    number = (
        ttlv.integer(Tag.PROTOCOL_VERSION_MAJOR, 1),
        ttlv.integer(Tag.PROTOCOL_VERSION_MINOR, 4),
    )
    return ttlv.structure(Tag.PROTOCOL_VERSION, *number)


def _message(items: list[bytes]) -> bytes:
    count = ttlv.integer(Tag.BATCH_COUNT, len(items))
    header = ttlv.structure(Tag.RESPONSE_HEADER, _version(), count)
    return ttlv.structure(Tag.RESPONSE_MESSAGE, header, *items)


def _refused(refusal: Refusal) -> bytes:
    return b"".join(
        (
            ttlv.enumeration(Tag.RESULT_STATUS, 1),
            ttlv.enumeration(Tag.RESULT_REASON, refusal[0]),
            ttlv.text(Tag.RESULT_MESSAGE, refusal[1]),
        )
    )


@asynccontextmanager
async def scripted(folder: Path, **script: Any) -> AsyncIterator[Scripted]:
    """A server, listening."""
    folder.mkdir(exist_ok=True)
    authority = issue(folder, "ca")
    issue(folder, "server", authority)
    issue(folder, "client", authority, client=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    made = Scripted(folder, **script)
    listener = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=context, limit=1 << 24)
    made.port = listener.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        listener.close()
