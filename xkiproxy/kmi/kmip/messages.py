"""KMIP messages: requests as bytes, answers as objects. Pure; KMIP 1.4 and 2.1, chapters 6 to 9.

The two generations differ in how attributes travel: 1.x names them by texts within `Attribute`
structures, 2.x by their tags within one `Attributes` structure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

from xkiproxy.kmi.kmip import ttlv
from xkiproxy.kmi.kmip.ttlv import Structure, TtlvError, Value

Version = tuple[int, int]
"""Major and minor number of the protocol."""

VERSIONS: tuple[Version, ...] = ((2, 1), (2, 0), (1, 4))
"""What is spoken here, the best first: 1.4 is the first with AAD and tags."""


class Tag(IntEnum):
    """The tags in use (KMIP 2.1, section 11.55)."""

    APPLICATION_DATA = 0x420002
    APPLICATION_NAMESPACE = 0x420003
    APPLICATION_SPECIFIC_INFORMATION = 0x420004
    ATTRIBUTE = 0x420008
    ATTRIBUTE_NAME = 0x42000A
    ATTRIBUTE_VALUE = 0x42000B
    BATCH_COUNT = 0x42000D
    BATCH_ERROR_CONTINUATION_OPTION = 0x42000E
    BATCH_ITEM = 0x42000F
    BLOCK_CIPHER_MODE = 0x420011
    CRYPTOGRAPHIC_ALGORITHM = 0x420028
    CRYPTOGRAPHIC_LENGTH = 0x42002A
    CRYPTOGRAPHIC_PARAMETERS = 0x42002B
    CRYPTOGRAPHIC_USAGE_MASK = 0x42002C
    INITIAL_DATE = 0x420039
    IV_COUNTER_NONCE = 0x42003D
    NAME = 0x420053
    NAME_TYPE = 0x420054
    NAME_VALUE = 0x420055
    OBJECT_TYPE = 0x420057
    OPERATION = 0x42005C
    PADDING_METHOD = 0x42005F
    PROTOCOL_VERSION = 0x420069
    PROTOCOL_VERSION_MAJOR = 0x42006A
    PROTOCOL_VERSION_MINOR = 0x42006B
    QUERY_FUNCTION = 0x420074
    REQUEST_HEADER = 0x420077
    REQUEST_MESSAGE = 0x420078
    REQUEST_PAYLOAD = 0x420079
    RESPONSE_HEADER = 0x42007A
    RESPONSE_MESSAGE = 0x42007B
    RESPONSE_PAYLOAD = 0x42007C
    RESULT_MESSAGE = 0x42007D
    RESULT_REASON = 0x42007E
    RESULT_STATUS = 0x42007F
    REVOCATION_REASON = 0x420081
    REVOCATION_REASON_CODE = 0x420082
    STATE = 0x42008D
    TEMPLATE_ATTRIBUTE = 0x420091
    UNIQUE_BATCH_ITEM_ID = 0x420093
    UNIQUE_IDENTIFIER = 0x420094
    DATA = 0x4200C2
    DATA_LENGTH = 0x4200C4
    RANDOM_IV = 0x4200C5
    IV_LENGTH = 0x4200CD
    TAG_LENGTH = 0x4200CE
    ADDITIONAL_DATA = 0x4200FE
    AUTHENTICATION_TAG = 0x4200FF
    SENSITIVE = 0x420120
    EXTRACTABLE = 0x420122
    ATTRIBUTES = 0x420125


class Op(IntEnum):
    """The operations in use."""

    CREATE = 0x01
    LOCATE = 0x08
    GET_ATTRIBUTES = 0x0B
    ACTIVATE = 0x12
    REVOKE = 0x13
    DESTROY = 0x14
    QUERY = 0x18
    DISCOVER_VERSIONS = 0x1E
    ENCRYPT = 0x1F
    DECRYPT = 0x20
    RNG_RETRIEVE = 0x25


class Reason(IntEnum):
    """Why an operation failed, as far as it matters here (KMIP 2.1, Result Reason Enumeration)."""

    ITEM_NOT_FOUND = 0x01
    AUTHENTICATION_NOT_SUCCESSFUL = 0x03
    INVALID_MESSAGE = 0x04
    OPERATION_NOT_SUPPORTED = 0x05
    INVALID_FIELD = 0x07
    FEATURE_NOT_SUPPORTED = 0x08
    CRYPTOGRAPHIC_FAILURE = 0x0A
    PERMISSION_DENIED = 0x0C
    OBJECT_ARCHIVED = 0x0D
    BAD_CRYPTOGRAPHIC_PARAMETERS = 0x24
    INTERNAL_SERVER_ERROR = 0x2A
    OBJECT_DESTROYED = 0x36
    OBJECT_NOT_FOUND = 0x37
    NOT_AUTHORISED = 0x39
    SERVER_LIMIT_EXCEEDED = 0x3A
    UNSUPPORTED_CRYPTOGRAPHIC_PARAMETERS = 0x3E
    WRONG_KEY_LIFECYCLE_STATE = 0x43
    PROTECTION_STORAGE_UNAVAILABLE = 0x44
    GENERAL_FAILURE = 0x100


class Mode(IntEnum):
    """Block cipher modes."""

    CBC = 0x01
    ECB = 0x02
    GCM = 0x09


AES = 0x03
SYMMETRIC_KEY = 0x02
ENCRYPT_BIT, DECRYPT_BIT = 0x04, 0x08
NO_PADDING, PKCS5_PADDING = 0x01, 0x03

_NAMESPACE = "xkiproxy"
_ID_SIZE = 8
_CONTINUE = 0x01
_SUCCESS = 0x00
_TEXT_NAME = 0x01
_QUERY_OPERATIONS = 0x01
_CESSATION_OF_OPERATION = 0x06

Request = tuple[Op, bytes]
"""An operation and its encoded payload."""

_NAMES = {
    "Application Specific Information": Tag.APPLICATION_SPECIFIC_INFORMATION,
    "Cryptographic Algorithm": Tag.CRYPTOGRAPHIC_ALGORITHM,
    "Cryptographic Length": Tag.CRYPTOGRAPHIC_LENGTH,
    "Cryptographic Usage Mask": Tag.CRYPTOGRAPHIC_USAGE_MASK,
    "Extractable": Tag.EXTRACTABLE,
    "Initial Date": Tag.INITIAL_DATE,
    "Name": Tag.NAME,
    "Object Type": Tag.OBJECT_TYPE,
    "Sensitive": Tag.SENSITIVE,
    "State": Tag.STATE,
}
_TEXTS = {tag: name for name, tag in _NAMES.items()}

EXTRAS = (Tag.APPLICATION_SPECIFIC_INFORMATION, Tag.SENSITIVE, Tag.EXTRACTABLE)
"""Attributes of what is made here that a server need not have."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request: `payload`, or with `failed` a `reason` and the server's `message`."""

    payload: Structure
    failed: bool = False
    reason: int = 0
    message: str = ""


class KmipError(Exception):
    """A request failed, or an answer makes no sense; the text says why.

    `reason` is the server's, 0 where it gives none.
    """

    def __init__(self, text: str, reason: int = 0) -> None:
        super().__init__(text)
        self.reason = reason


# ---- messages --------------------------------------------------------------------------------


def encode_message(version: Version, requests: Sequence[Request], first: int = 0) -> bytes:
    """A request message; each operation is done whatever comes of the others.

    `first` numbers its items: no two of a connection have the same ID, so that an answer to another
    message is never taken for one to this.
    """
    items = [
        ttlv.structure(
            Tag.BATCH_ITEM,
            ttlv.enumeration(Tag.OPERATION, operation),
            ttlv.octets(Tag.UNIQUE_BATCH_ITEM_ID, _item_id(number)),
            payload,
        )
        for number, (operation, payload) in enumerate(requests, first)
    ]
    header = ttlv.structure(
        Tag.REQUEST_HEADER,
        _protocol_version(version),
        ttlv.enumeration(Tag.BATCH_ERROR_CONTINUATION_OPTION, _CONTINUE),
        ttlv.integer(Tag.BATCH_COUNT, len(items)),
    )
    return ttlv.structure(Tag.REQUEST_MESSAGE, header, *items)


def decode_message(data: bytes, requests: Sequence[Request], first: int = 0) -> list[Answer]:
    """The answers to the requests of a message, in their order.

    Raises:
        KmipError: the message is refused as a whole, or is not the answer to so many.
        TtlvError: it is malformed, or answers something else.
    """
    message, count = ttlv.decode(data), len(requests)
    if message.tag != Tag.RESPONSE_MESSAGE:
        raise KmipError("the server's answer is no response message")
    message.structure(Tag.RESPONSE_HEADER)
    items = [item for item in message.all(Tag.BATCH_ITEM) if isinstance(item, Structure)]
    if len(items) == 1 < count:
        refusal = _answer(items[0])
        if refusal.failed:
            words = f"the server refuses the message: {words_of(refusal)}"
            raise KmipError(words, refusal.reason)
    found: dict[int, Answer] = {}
    for item in items:
        index = _index(item, first, count)
        operation = item.find(Tag.OPERATION)
        if operation is not None and operation != requests[index][0]:
            raise TtlvError("it answers another operation than was asked for")
        found[index] = _answer(item)
    if len(items) != count or len(found) != count:
        raise KmipError(f"the server answers {len(items)} of {count} operations")
    return [found[index] for index in range(count)]


def _index(item: Structure, first: int, count: int) -> int:
    """Which request an item answers. The server must say it (KMIP 1.4, section 6.4).

    Without, two ciphertexts of a size could change places. Only what stands alone needs none:
    the refusal of a message before its items were looked at has none.
    """
    name = item.find(Tag.UNIQUE_BATCH_ITEM_ID)
    if name is None and count == 1:
        return 0
    if type(name) is not bytes:
        raise KmipError("the server does not say which operations its answers belong to")
    index = int.from_bytes(name) - first
    if len(name) != _ID_SIZE or not 0 <= index < count:
        raise TtlvError("it answers what was not asked")
    return index


def _answer(item: Structure) -> Answer:
    if item.number(Tag.RESULT_STATUS) == _SUCCESS:
        payload = item.find(Tag.RESPONSE_PAYLOAD)
        return Answer(payload if isinstance(payload, Structure) else Structure(0, []))
    reason, message = item.find(Tag.RESULT_REASON), item.find(Tag.RESULT_MESSAGE)
    return Answer(
        Structure(0, []),
        True,
        reason if isinstance(reason, int) else 0,
        _on_one_line(message[:200]) if isinstance(message, str) else "",
    )


def _on_one_line(text: str) -> str:
    """The server's words go to logs and to people's terminals, its control characters do not."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def words_of(answer: Answer) -> str:
    """Why an operation failed, in the server's words; for administrators."""
    return answer.message or f"reason 0x{answer.reason:x}"


def _item_id(number: int) -> bytes:
    return number.to_bytes(_ID_SIZE)


def _protocol_version(version: Version) -> bytes:
    return ttlv.structure(
        Tag.PROTOCOL_VERSION,
        ttlv.integer(Tag.PROTOCOL_VERSION_MAJOR, version[0]),
        ttlv.integer(Tag.PROTOCOL_VERSION_MINOR, version[1]),
    )


# ---- what the server is ----------------------------------------------------------------------


def discover_versions() -> Request:
    """Which of our versions the server speaks."""
    payload = ttlv.structure(Tag.REQUEST_PAYLOAD, *map(_protocol_version, VERSIONS))
    return Op.DISCOVER_VERSIONS, payload


def discovered(answer: Answer) -> list[Version]:
    """The versions that the server names."""
    return [
        (found.number(Tag.PROTOCOL_VERSION_MAJOR), found.number(Tag.PROTOCOL_VERSION_MINOR))
        for found in answer.payload.all(Tag.PROTOCOL_VERSION)
        if isinstance(found, Structure)
    ]


def query_operations() -> Request:
    """Which operations the server has."""
    function = ttlv.enumeration(Tag.QUERY_FUNCTION, _QUERY_OPERATIONS)
    return Op.QUERY, ttlv.structure(Tag.REQUEST_PAYLOAD, function)


def queried(answer: Answer) -> set[Value]:
    """The numbers of the server's operations."""
    return {value for value in answer.payload.all(Tag.OPERATION) if isinstance(value, int)}


# ---- keys ------------------------------------------------------------------------------------


def locate(version: Version, name: str | None = None, key_id: str | None = None) -> Request:
    """The symmetric keys with a name, or those that are marked as versions of a key, or all."""
    wanted = [_attribute(version, Tag.OBJECT_TYPE, _enumerated(SYMMETRIC_KEY))]
    if name is not None:
        wanted.append(_attribute(version, Tag.NAME, _named(name)))
    if key_id is not None:
        wanted.append(_attribute(version, Tag.APPLICATION_SPECIFIC_INFORMATION, _mark(key_id)))
    if version >= (2, 0):
        wanted = [ttlv.structure(Tag.ATTRIBUTES, *wanted)]
    return Op.LOCATE, ttlv.structure(Tag.REQUEST_PAYLOAD, *wanted)


def located(answer: Answer) -> list[str]:
    """Unique identifiers."""
    return [uid for uid in answer.payload.all(Tag.UNIQUE_IDENTIFIER) if isinstance(uid, str)]


def get_attributes(uid: str) -> Request:
    """All attributes of an object."""
    return Op.GET_ATTRIBUTES, _about(uid)


def attributes(answer: Answer) -> dict[int, list[Value]]:
    """The values of the attributes in use, by their tags."""
    found: dict[int, list[Value]] = {}
    for item in answer.payload.all(Tag.ATTRIBUTE):
        if isinstance(item, Structure):
            tag = _NAMES.get(item.text(Tag.ATTRIBUTE_NAME))
            value = item.find(Tag.ATTRIBUTE_VALUE)
            if tag is not None and value is not None:
                found.setdefault(tag, []).append(value)
    for group in answer.payload.all(Tag.ATTRIBUTES):
        if isinstance(group, Structure):
            for number, value in group.items:
                found.setdefault(number, []).append(value)
    return found


def create(
    version: Version, name: str, bits: int, key_id: str, extras: Collection[Tag] = EXTRAS
) -> Request:
    """Make an AES key of so many bits for encryption and decryption.

    `extras`: marked as a version of `key_id`; Sensitive, so that it leaves the server wrapped at
    most; not Extractable, so that it does not leave it at all (attributes of KMIP 1.4).
    """
    wanted = [
        _attribute(version, Tag.CRYPTOGRAPHIC_ALGORITHM, _enumerated(AES)),
        _attribute(version, Tag.CRYPTOGRAPHIC_LENGTH, _numbered(bits)),
        _attribute(version, Tag.CRYPTOGRAPHIC_USAGE_MASK, _numbered(ENCRYPT_BIT | DECRYPT_BIT)),
        _attribute(version, Tag.NAME, _named(name)),
    ]
    more = {
        Tag.APPLICATION_SPECIFIC_INFORMATION: _mark(key_id),
        Tag.SENSITIVE: _truth(True),
        Tag.EXTRACTABLE: _truth(False),
    }
    wanted += [_attribute(version, tag, encode) for tag, encode in more.items() if tag in extras]
    group = Tag.ATTRIBUTES if version >= (2, 0) else Tag.TEMPLATE_ATTRIBUTE
    kind = ttlv.enumeration(Tag.OBJECT_TYPE, SYMMETRIC_KEY)
    return Op.CREATE, ttlv.structure(Tag.REQUEST_PAYLOAD, kind, ttlv.structure(group, *wanted))


def activate(uid: str) -> Request:
    """From Pre-Active to Active."""
    return Op.ACTIVATE, _about(uid)


def revoke(uid: str) -> Request:
    """To Deactivated: it is not needed any more."""
    code = ttlv.enumeration(Tag.REVOCATION_REASON_CODE, _CESSATION_OF_OPERATION)
    return Op.REVOKE, _about(uid, ttlv.structure(Tag.REVOCATION_REASON, code))


def destroy(uid: str) -> Request:
    """To Destroyed: its material is gone."""
    return Op.DESTROY, _about(uid)


def _about(uid: str, *more: bytes) -> bytes:
    return ttlv.structure(Tag.REQUEST_PAYLOAD, ttlv.text(Tag.UNIQUE_IDENTIFIER, uid), *more)


def _attribute(version: Version, tag: Tag, encode: Callable[[int], bytes]) -> bytes:
    if version >= (2, 0):
        return encode(tag)
    name = ttlv.text(Tag.ATTRIBUTE_NAME, _TEXTS[tag])
    return ttlv.structure(Tag.ATTRIBUTE, name, encode(Tag.ATTRIBUTE_VALUE))


def _enumerated(value: int) -> Callable[[int], bytes]:
    return lambda tag: ttlv.enumeration(tag, value)


def _numbered(value: int) -> Callable[[int], bytes]:
    return lambda tag: ttlv.integer(tag, value)


def _truth(value: bool) -> Callable[[int], bytes]:
    return lambda tag: ttlv.boolean(tag, value)


def _named(name: str) -> Callable[[int], bytes]:
    kind = ttlv.enumeration(Tag.NAME_TYPE, _TEXT_NAME)
    return lambda tag: ttlv.structure(tag, ttlv.text(Tag.NAME_VALUE, name), kind)


def _mark(key_id: str) -> Callable[[int], bytes]:
    """What all versions of a key have in common (KMIP 1.4, section 3.36)."""
    parts = (
        ttlv.text(Tag.APPLICATION_NAMESPACE, _NAMESPACE),
        ttlv.text(Tag.APPLICATION_DATA, key_id),
    )
    return lambda tag: ttlv.structure(tag, *parts)


# ---- operations ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cipher:
    """How to encrypt or decrypt: `padding` where the mode has one."""

    mode: Mode
    padding: int = 0


def encrypt(uid: str, cipher: Cipher, data: bytes, iv: bytes, aad: bytes) -> Request:
    """Encrypt; under GCM the server makes an IV if none is given."""
    items = [_cipher(uid, cipher, makes_iv=not iv), ttlv.octets(Tag.DATA, data)]
    if iv:
        items.append(ttlv.octets(Tag.IV_COUNTER_NONCE, iv))
    if aad:
        items.append(ttlv.octets(Tag.ADDITIONAL_DATA, aad))
    return Op.ENCRYPT, ttlv.structure(Tag.REQUEST_PAYLOAD, *items)


def decrypt(uid: str, cipher: Cipher, data: bytes, iv: bytes, aad: bytes, tag: bytes) -> Request:
    """Decrypt; `tag` is empty where the mode has none."""
    items = [_cipher(uid, cipher), ttlv.octets(Tag.DATA, data)]
    if iv:
        items.append(ttlv.octets(Tag.IV_COUNTER_NONCE, iv))
    if aad:
        items.append(ttlv.octets(Tag.ADDITIONAL_DATA, aad))
    if tag:
        items.append(ttlv.octets(Tag.AUTHENTICATION_TAG, tag))
    return Op.DECRYPT, ttlv.structure(Tag.REQUEST_PAYLOAD, *items)


def _cipher(uid: str, cipher: Cipher, makes_iv: bool = False) -> bytes:
    """Under GCM the lengths of IV (in bits) and tag must be given (KMIP 1.4, section 3.6)."""
    items = [ttlv.enumeration(Tag.BLOCK_CIPHER_MODE, cipher.mode)]
    if cipher.padding:
        items.append(ttlv.enumeration(Tag.PADDING_METHOD, cipher.padding))
    items.append(ttlv.enumeration(Tag.CRYPTOGRAPHIC_ALGORITHM, AES))
    if cipher.mode is Mode.GCM:
        if makes_iv:
            items.append(ttlv.boolean(Tag.RANDOM_IV, True))
        items.append(_GCM_LENGTHS)
    parameters = ttlv.structure(Tag.CRYPTOGRAPHIC_PARAMETERS, *items)
    return ttlv.text(Tag.UNIQUE_IDENTIFIER, uid) + parameters


_GCM_LENGTHS = ttlv.integer(Tag.IV_LENGTH, 96) + ttlv.integer(Tag.TAG_LENGTH, 16)


def output(answer: Answer) -> bytes:
    """The plaintext or ciphertext; empty where the server leaves out what is empty."""
    value = answer.payload.find(Tag.DATA)
    if value is None:
        return b""
    if type(value) is not bytes:
        raise TtlvError("the data is no byte string")
    return value


def rng_retrieve(length: int) -> Request:
    """Random bytes."""
    size = ttlv.integer(Tag.DATA_LENGTH, length)
    return Op.RNG_RETRIEVE, ttlv.structure(Tag.REQUEST_PAYLOAD, size)
