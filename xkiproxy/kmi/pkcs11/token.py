"""A session with a PKCS#11 token: where operations become calls of the module.

This runs in a lane process only, single-threaded: the module is initialized without locks. Names
are those of PKCS#11 v2.40. What a module's error means is decided here: whether it belongs to the
operation, or to the lane.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pkcs11
from pkcs11 import (
    Attribute,
    KeyType,
    Mechanism,
    MechanismFlag,
    ObjectClass,
    exceptions,
)
from pkcs11.attributes import AttributeMapper

from xkiproxy.crypto import envelope
from xkiproxy.crypto.algorithms import (
    ALGORITHMS,
    BLOCK_SIZE,
    GCM_MODES,
    IV_SIZES,
    KEY_SIZES,
    TAG_SIZE,
    Algorithm,
    KeySpec,
    Padding,
    Usage,
)
from xkiproxy.crypto.operations import Fault, OperationError, invalid_ciphertext
from xkiproxy.kmi.pkcs11 import wire
from xkiproxy.kmi.pkcs11.cryptoki import (
    CKM_AES_CBC,
    CKM_AES_ECB,
    CKM_AES_GCM,
    Cryptoki,
    ModuleError,
)

KEY_CACHE_SECONDS = 10.0
"""How long a lane trusts what it found of a key: another host may have rotated it."""

_RANDOM_POOL = 64 * 12
_ULONG = struct.Struct("L")
_GCM_IV = IV_SIZES[Algorithm.AES_GCM]
_NO_IV = bytes(_GCM_IV)
_CRYPT_ONLY = MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT
_BLOCK_MECHANISMS = {Algorithm.AES_CBC: CKM_AES_CBC, Algorithm.AES_ECB: CKM_AES_ECB}


class BrokenError(Exception):
    """The device or the session cannot go on: the lane must be replaced."""


class LoginError(Exception):
    """The PIN was refused: it must not be tried again."""


class TokenError(Exception):
    """The token cannot be used, or a key not be managed; the text says why and what to do."""


_LOGIN_ERRORS = (
    exceptions.PinIncorrect,
    exceptions.PinInvalid,
    exceptions.PinLenRange,
    exceptions.PinExpired,
    exceptions.PinLocked,
    exceptions.UserPinNotInitialized,
)

# What C_Encrypt and C_Decrypt return, by what it means.
_DEVICE_CODES = frozenset(
    {
        0x002,  # CKR_HOST_MEMORY
        0x030,  # CKR_DEVICE_ERROR
        0x031,  # CKR_DEVICE_MEMORY
        0x032,  # CKR_DEVICE_REMOVED
        0x0B0,  # CKR_SESSION_CLOSED
        0x0B1,  # CKR_SESSION_COUNT
        0x0B3,  # CKR_SESSION_HANDLE_INVALID
        0x0E0,  # CKR_TOKEN_NOT_PRESENT
        0x0E1,  # CKR_TOKEN_NOT_RECOGNIZED
        0x090,  # CKR_OPERATION_ACTIVE
        0x091,  # CKR_OPERATION_NOT_INITIALIZED
        0x101,  # CKR_USER_NOT_LOGGED_IN
        0x190,  # CKR_CRYPTOKI_NOT_INITIALIZED
    }
)
_AMBIGUOUS_CODES = frozenset({0x005, 0x006})  # CKR_GENERAL_ERROR, CKR_FUNCTION_FAILED
_HANDLE_CODES = frozenset({0x060, 0x082})  # CKR_KEY_HANDLE_INVALID, CKR_OBJECT_HANDLE_INVALID
_DATA_CODES = frozenset({0x020, 0x021})  # CKR_DATA_INVALID, CKR_DATA_LEN_RANGE
_CIPHERTEXT_CODES = frozenset(
    {
        *_AMBIGUOUS_CODES,
        *_DATA_CODES,
        0x007,  # CKR_ARGUMENTS_BAD, of one that is too short
        0x040,  # CKR_ENCRYPTED_DATA_INVALID
        0x041,  # CKR_ENCRYPTED_DATA_LEN_RANGE
        0x042,  # CKR_AEAD_DECRYPT_FAILED, of PKCS#11 v3.0
        0x0C0,  # CKR_SIGNATURE_INVALID
    }
)
"""What modules say of a ciphertext that does not open; of no other code is that believed."""
_UNSUPPORTED_CODES = frozenset(
    {
        0x054,  # CKR_FUNCTION_NOT_SUPPORTED
        0x062,  # CKR_KEY_SIZE_RANGE
        0x063,  # CKR_KEY_TYPE_INCONSISTENT
        0x070,  # CKR_MECHANISM_INVALID
        0x071,  # CKR_MECHANISM_PARAM_INVALID
    }
)
_CKR_KEY_FUNCTION_NOT_PERMITTED = 0x068


@dataclass(frozen=True, slots=True)
class Sm4Numbers:
    """The vendor's numbers for SM4: key type, key generation and GCM mechanisms."""

    key_type: int
    key_gen: int
    gcm: int


@dataclass(frozen=True, slots=True)
class _Key:
    """What the token has under one label."""

    versions: dict[int, int]
    newest: int
    spec: KeySpec
    usage: Usage
    found: float


@dataclass(frozen=True, slots=True)
class FoundKey:
    """A key for the administrator; `problem` says why it cannot be used, or is empty."""

    key_id: str
    spec: str
    versions: tuple[int, ...]
    usage: int
    problem: str


class Token:
    """A logged-in session and what is known of its keys."""

    def __init__(
        self,
        module: str,
        pin: str,
        *,
        label: str | None,
        serial: str | None,
        iv_by_hsm: bool = False,
        sm4: Sm4Numbers | None = None,
        rw: bool = False,
    ) -> None:
        """Load the module, find the token, log in, make the probe key.

        Raises:
            LoginError: the PIN was refused.
            TokenError: anything else.
        """
        self._iv_by_hsm = iv_by_hsm
        self._sm4 = sm4
        self._keys: dict[str, _Key] = {}
        self._pool = b""
        try:
            token = _find_token(module, label, serial)
            self._session = token.open(
                user_pin=pin,
                rw=rw or not _has_read_only_sessions(token),
                attribute_mapper=_attribute_mapper(),
            )
            self._cryptoki = Cryptoki(module, self._session.handle)
            self._probe_key = self._session.generate_key(
                KeyType.AES,
                256,
                store=False,
                template={Attribute.SENSITIVE: True},
                capabilities=_CRYPT_ONLY,
            ).handle
        except _LOGIN_ERRORS as error:
            raise LoginError(f"the token refused the PIN ({_name(error)})") from None
        except exceptions.PKCS11Error as error:
            raise TokenError(f"the token cannot be opened ({_name(error)})") from None
        self.probe()

    # ---- operations ------------------------------------------------------------------------

    def forget_keys(self) -> None:
        """Look every key up again when it is next used."""
        self._keys.clear()

    def probe(self) -> None:
        """Encrypt and decrypt with the probe key; raises BrokenError."""
        cryptoki, key = self._cryptoki, self._probe_key
        try:
            data, iv = cryptoki.encrypt(key, CKM_AES_GCM, bytes(_GCM_IV), b"probe", b"")
            again = cryptoki.decrypt(key, CKM_AES_GCM, iv, data, b"")
        except ModuleError as error:
            raise BrokenError(f"the probe key failed ({error})") from None
        if again != b"probe":
            raise BrokenError("the token does not decrypt what it encrypted")

    def execute(self, fields: Sequence[Any]) -> tuple[Any, ...]:
        """The outcome of one operation, as `wire` has it; raises BrokenError."""
        try:
            return self._execute(fields)
        except OperationError as error:
            return wire.failure(error)
        except exceptions.PKCS11Error as error:
            # Not from C_Encrypt or C_Decrypt: a search or the generator failed.
            raise BrokenError(_name(error)) from None

    def _execute(self, fields: Sequence[Any]) -> tuple[Any, ...]:
        kind = fields[0]
        try:
            if kind == wire.ENCRYPT:
                return self._with_key(self._encrypt, fields)
            if kind == wire.DECRYPT:
                return self._with_key(self._decrypt, fields)
        except ModuleError as error:
            if kind == wire.DECRYPT:
                return self._decrypt_again(error, fields)
            raise self._judge(error, kind) from None
        if kind == wire.RANDOM:
            return (wire.RANDOM, self._random(fields[1]))
        return self._describe(fields[1])

    def _with_key(self, run: Any, fields: Sequence[Any]) -> tuple[Any, ...]:
        """Run with the key's handle; once more if the token does not know the handle any more."""
        try:
            return run(self._key(fields[1]), *fields[2:])  # type: ignore[no-any-return]
        except ModuleError as error:
            if error.code not in _HANDLE_CODES:
                raise
            del self._keys[fields[1]]
            return run(self._key(fields[1]), *fields[2:])  # type: ignore[no-any-return]

    def _decrypt_again(self, first: ModuleError, fields: Sequence[Any]) -> tuple[Any, ...]:
        """What comes of a decrypt that has failed; raises BrokenError for the lane.

        Some modules answer a wrong tag with CKR_GENERAL_ERROR or CKR_FUNCTION_FAILED, which also
        say that a device is broken; and a device may fail for a moment. "The ciphertext is wrong"
        is final for whoever asked: it is said only when the probe key works and the same comes out
        twice.
        """
        self._check_device(first)
        self.probe()
        try:
            return self._with_key(self._decrypt, fields)
        except ModuleError as second:
            if second.code != first.code:
                raise BrokenError(f"a decrypt failed with {first}, then with {second}") from None
            raise self._judge(second, wire.DECRYPT) from None

    def _check_device(self, error: ModuleError) -> None:
        if error.code in _DEVICE_CODES:
            raise BrokenError(str(error)) from None

    def _judge(self, error: ModuleError, kind: int) -> OperationError:
        """What an error of the module means for the operation; raises BrokenError for the lane."""
        code = error.code
        self._check_device(error)
        if code in _UNSUPPORTED_CODES:
            return OperationError(Fault.UNSUPPORTED, "The token cannot do this with this key.")
        if code == _CKR_KEY_FUNCTION_NOT_PERMITTED:
            return OperationError(Fault.USAGE_FORBIDDEN, "The token does not let the key do this.")
        if kind == wire.DECRYPT and code in _CIPHERTEXT_CODES:
            return invalid_ciphertext()
        if code in _DATA_CODES:
            return OperationError(
                Fault.INVALID_PARAMETER, "the token refuses its length", "plaintext"
            )
        if code in _AMBIGUOUS_CODES:
            raise BrokenError(str(error)) from None
        self.probe()
        return OperationError(Fault.INTERNAL, f"The token refused ({error}).")

    def _encrypt(
        self,
        key: _Key,
        algorithm: str | None,
        padding: str | None,
        iv: bytes | None,
        aad: bytes,
        plaintext: bytes,
        raw: bool,
    ) -> tuple[Any, ...]:
        chosen = _choose(key, algorithm)
        if Usage.ENCRYPT not in key.usage:
            raise OperationError(Fault.USAGE_FORBIDDEN, "The token does not let it encrypt.")
        if raw:
            _check_single_version(key)
        version = key.newest
        handle = key.versions[version]
        if chosen in GCM_MODES:
            bound = aad if raw else envelope.authenticated_data(aad, version)
            ciphertext, used = self._encrypt_gcm(handle, chosen, plaintext, iv, bound)
            return (wire.ENCRYPT, ciphertext, used, version, chosen, None)
        if iv is None:
            iv = self._random(IV_SIZES[chosen]) if IV_SIZES[chosen] else b""
        if padding is None:
            padding = Padding.PKCS7
        data = _pad(plaintext) if padding == Padding.PKCS7 else plaintext
        ciphertext = b""
        if data:
            mechanism = _BLOCK_MECHANISMS[chosen]
            ciphertext, _ = self._cryptoki.encrypt(handle, mechanism, iv, data, None)
        return (wire.ENCRYPT, ciphertext, iv, version, chosen, padding)

    def _encrypt_gcm(
        self, handle: int, algorithm: Algorithm, plaintext: bytes, iv: bytes | None, aad: bytes
    ) -> tuple[bytes, bytes]:
        """(ciphertext and tag, IV)."""
        mechanism = self._gcm_mechanism(algorithm)
        size = len(plaintext) + TAG_SIZE
        if iv is None and self._iv_by_hsm:
            ciphertext, made = self._cryptoki.encrypt(handle, mechanism, _NO_IV, plaintext, aad)
            if made == _NO_IV:
                # It took the zeros that it was given: the same IV every time would give away the
                # key.
                raise BrokenError('the module makes no IV of its own; set iv = "generator"')
            ciphertext = ciphertext[:size]  # some append the IV
        else:
            given = self._gcm_iv() if iv is None else iv
            ciphertext, made = self._cryptoki.encrypt(handle, mechanism, given, plaintext, aad)
        if len(ciphertext) != size:
            # With more or less in it than ciphertext and tag it would never decrypt.
            raise BrokenError(f"a ciphertext of {len(ciphertext)} bytes for {len(plaintext)}")
        return ciphertext, made

    def _decrypt(
        self,
        key: _Key,
        algorithm: str | None,
        padding: str | None,
        iv: bytes,
        aad: bytes,
        ciphertext: bytes,
        raw: bool,
        version: int | None,
    ) -> tuple[Any, ...]:
        chosen = _choose(key, algorithm)
        if Usage.DECRYPT not in key.usage:
            raise OperationError(Fault.USAGE_FORBIDDEN, "The token does not let it decrypt.")
        if version is None or raw:
            _check_single_version(key)
            version = key.newest
        handle = key.versions.get(version)
        if handle is None:
            raise invalid_ciphertext()
        if chosen in GCM_MODES:
            bound = aad if raw else envelope.authenticated_data(aad, version)
            mechanism = self._gcm_mechanism(chosen)
            plaintext = self._cryptoki.decrypt(handle, mechanism, iv, ciphertext, bound)
            return (wire.DECRYPT, plaintext, version, chosen, None)
        if padding is None:
            padding = Padding.PKCS7
        data = b""
        if ciphertext:
            mechanism = _BLOCK_MECHANISMS[chosen]
            data = self._cryptoki.decrypt(handle, mechanism, iv, ciphertext, None)
        if padding == Padding.PKCS7:
            data = _unpad(data)
        return (wire.DECRYPT, data, version, chosen, padding)

    def _describe(self, key_id: str) -> tuple[Any, ...]:
        key = self._key(key_id)
        return (wire.DESCRIBE, key_id, key.spec, key.usage.value, key.newest)

    def _random(self, length: int) -> bytes:
        drawn: bytes = self._session.generate_random(length * 8)
        return drawn

    def _gcm_iv(self) -> bytes:
        """12 bytes of the token's generator, drawn for many operations at once."""
        if len(self._pool) < _GCM_IV:
            self._pool = self._random(_RANDOM_POOL)
        iv, self._pool = self._pool[:_GCM_IV], self._pool[_GCM_IV:]
        return iv

    def _gcm_mechanism(self, algorithm: Algorithm) -> int:
        if algorithm is Algorithm.AES_GCM:
            return CKM_AES_GCM
        assert self._sm4 is not None  # noqa: S101 - else no key has this spec
        return self._sm4.gcm

    # ---- keys ------------------------------------------------------------------------------

    def _key(self, key_id: str) -> _Key:
        key = self._keys.get(key_id)
        if key is None or time.monotonic() - key.found > KEY_CACHE_SECONDS:
            key = self._look_up(key_id)
            self._keys[key_id] = key
        return key

    def _look_up(self, key_id: str) -> _Key:
        objects = self._objects(key_id)
        if not objects:
            self._keys.pop(key_id, None)
            raise OperationError(Fault.KEY_NOT_FOUND, "There is no such key.")
        found = self._examine(key_id, objects)
        if found.problem:
            raise OperationError(Fault.KEY_UNUSABLE, "The token's key cannot be used.")
        versions = {number: o.handle for number, o in _versions(objects).items()}
        return _Key(
            versions, max(versions), KeySpec(found.spec), Usage(found.usage), time.monotonic()
        )

    def _objects(self, key_id: str | None = None) -> list[Any]:
        template: dict[Any, Any] = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.TOKEN: True}
        if key_id is not None:
            template[Attribute.LABEL] = key_id
        return list(self._session.get_objects(template))

    def _examine(self, key_id: str, objects: Sequence[Any]) -> FoundKey:
        """What the objects under one label are, taken together."""
        specs = {self._spec(o) for o in objects}
        usage = Usage.BOTH
        for o in objects:
            can_encrypt = Usage.ENCRYPT if _flag(o, Attribute.ENCRYPT) else Usage(0)
            can_decrypt = Usage.DECRYPT if _flag(o, Attribute.DECRYPT) else Usage(0)
            usage &= can_encrypt | can_decrypt
        versions = _versions(objects)
        spec = specs.pop() if len(specs) == 1 else None
        problem = ""
        if spec is None:
            problem = "wrong type: it is not one AES-128, AES-192, AES-256 or SM4 key"
        elif any(_flag(o, Attribute.EXTRACTABLE) for o in objects):
            problem = "extractable: it can leave the token (CKA_EXTRACTABLE)"
        elif not all(_flag(o, Attribute.SENSITIVE) for o in objects):
            problem = "not sensitive: its value can be read (CKA_SENSITIVE)"
        elif not usage:
            problem = "no ENCRYPT and no DECRYPT: the token lets it do neither"
        elif len(versions) != len(objects):
            problem = "several keys under one label need a CKA_ID of 4 bytes each, all different"
        numbers = tuple(sorted(versions)) or (1,)
        return FoundKey(key_id, spec or "", numbers, usage.value, problem)

    def _spec(self, o: Any) -> KeySpec | None:
        kind = _attribute(o, Attribute.KEY_TYPE)
        if kind == KeyType.AES:
            sizes = {KEY_SIZES[s]: s for s in KeySpec if s is not KeySpec.SM4}
            return sizes.get(_attribute(o, Attribute.VALUE_LEN) or 0)
        if self._sm4 is not None and kind is not None and int(kind) == self._sm4.key_type:
            return KeySpec.SM4
        return None

    # ---- management ------------------------------------------------------------------------

    def manage(self, command: str, arguments: Sequence[Any]) -> Any:
        """Run a command of the administrator; raises TokenError."""
        commands: dict[str, Callable[..., Any]] = {
            "list": self._list,
            "create": self._create,
            "rotate": self._rotate,
            "destroy": self._destroy,
        }
        try:
            return commands[command](*arguments)
        except exceptions.PKCS11Error as error:
            raise TokenError(f"the token refused ({_name(error)})") from None

    def _list(self, key_id: str | None = None) -> list[tuple[Any, ...]]:
        by_label: dict[str, list[Any]] = {}
        for o in self._objects(key_id):
            by_label.setdefault(str(_attribute(o, Attribute.LABEL) or ""), []).append(o)
        found = [self._examine(label, objects) for label, objects in sorted(by_label.items())]
        return [(k.key_id, k.spec, k.versions, k.usage, k.problem) for k in found if k.key_id]

    def _create(self, key_id: str, spec: str) -> None:
        if self._objects(key_id):
            raise TokenError(f"key {key_id}: the token has a key of this label already")
        self._generate(key_id, KeySpec(spec), 1)

    def _rotate(self, key_id: str) -> None:
        objects = self._objects(key_id)
        if not objects:
            raise TokenError(f"key {key_id}: the token has no such key")
        found = self._examine(key_id, objects)
        if found.problem:
            raise TokenError(f"key {key_id}: {found.problem}")
        self._generate(key_id, KeySpec(found.spec), max(found.versions) + 1)

    def _destroy(self, key_id: str) -> None:
        for o in self._objects(key_id):
            o.destroy()

    def _generate(self, key_id: str, spec: KeySpec, version: int) -> None:
        kind: Any = KeyType.AES
        arguments: dict[str, Any] = {}
        if spec is KeySpec.SM4:
            if self._sm4 is None:
                raise TokenError("SM4 keys need the vendor's numbers: [kmi.sm4] in xkiproxy.toml")
            kind = _vendor_key_type(self._sm4.key_type)
            arguments = {"mechanism": _vendor_mechanism(self._sm4.key_gen)}
        template = {
            Attribute.SENSITIVE: True,
            Attribute.EXTRACTABLE: False,
            Attribute.WRAP: False,
            Attribute.UNWRAP: False,
            Attribute.SIGN: False,
            Attribute.VERIFY: False,
            Attribute.DERIVE: False,
        }
        self._session.generate_key(
            kind,
            KEY_SIZES[spec] * 8,
            id=version.to_bytes(4, "big"),
            label=key_id,
            store=True,
            template=template,
            capabilities=_CRYPT_ONLY,
            **arguments,
        )


def _find_token(module: str, label: str | None, serial: str | None) -> Any:
    try:
        library = pkcs11.lib(module)
    except (RuntimeError, OSError) as error:
        reason = str(error) or _name(error)
        raise TokenError(f"module {module} cannot be loaded ({reason})") from None
    wanted_serial = serial.encode() if serial is not None else None
    found = [
        token
        for token in library.get_tokens()
        if (label is None or token.label == label)
        and (wanted_serial is None or token.serial.strip() == wanted_serial)
    ]
    name = f"label {label!r}" if label is not None else f"serial {serial!r}"
    if not found:
        raise TokenError(f"module {module} has no token of {name}")
    if len(found) > 1:
        raise TokenError(f"module {module} has {len(found)} tokens of {name}; name its serial")
    return found[0]


def _has_read_only_sessions(token: Any) -> bool:
    """The client 5 of AWS CloudHSM has none.

    It is asked without a PIN, so that none is tried twice.
    """
    try:
        token.open().close()
    except exceptions.FunctionFailed:
        return False
    return True


def _attribute_mapper() -> AttributeMapper:
    """One that takes what is in other vendors' objects, and what is in nobody's enumeration."""
    mapper = AttributeMapper()
    mapper.register_handler(Attribute.KEY_TYPE, _ULONG.pack, lambda v: int(_ULONG.unpack(v)[0]))
    mapper.register_handler(
        Attribute.LABEL, lambda text: text.encode(), lambda v: v.decode(errors="backslashreplace")
    )
    return mapper


def _vendor_mechanism(number: int) -> Mechanism:
    """A member of the enumeration that is not in it: python-pkcs11 wants one."""
    member = int.__new__(Mechanism, number)
    member._name_, member._value_ = "VENDOR_DEFINED", number
    return member


def _vendor_key_type(number: int) -> KeyType:
    member = int.__new__(KeyType, number)
    member._name_, member._value_ = "VENDOR_DEFINED", number
    return member


def _choose(key: _Key, algorithm: str | None) -> Algorithm:
    known = ALGORITHMS[key.spec]
    if algorithm is None:
        return known[0]
    for candidate in known:
        if candidate == algorithm:
            return candidate
    raise OperationError(
        Fault.UNSUPPORTED,
        f"A key of spec {key.spec} does {', '.join(known)}, not {algorithm}.",
    )


def _check_single_version(key: _Key) -> None:
    if len(key.versions) != 1:
        raise envelope.version_unknown()


def _versions(objects: Sequence[Any]) -> dict[int, Any]:
    """Objects by their version: CKA_ID as 4 bytes; another ID, alone under its label, is 1."""
    found = {}
    for o in objects:
        raw = _attribute(o, Attribute.ID) or b""
        number = int.from_bytes(raw, "big") if len(raw) == 4 else 0
        if number:
            found[number] = o
    if not found and len(objects) == 1:
        return {1: objects[0]}
    return found


def _attribute(o: Any, attribute: Attribute) -> Any:
    try:
        return o[attribute]
    except (exceptions.AttributeTypeInvalid, exceptions.AttributeSensitive, NotImplementedError):
        return None


def _flag(o: Any, attribute: Attribute) -> bool:
    return bool(_attribute(o, attribute))


def _pad(data: bytes) -> bytes:
    """PKCS #7 (RFC 5652 section 6.3)."""
    count = BLOCK_SIZE - len(data) % BLOCK_SIZE
    return data + bytes([count]) * count


def _unpad(data: bytes) -> bytes:
    count = data[-1] if data else 0
    if not 1 <= count <= BLOCK_SIZE or data[-count:] != bytes([count]) * count:
        raise invalid_ciphertext()
    return data[:-count]


def _name(error: BaseException) -> str:
    """What python-pkcs11 calls it; of a code that it does not know, what it says of that."""
    return str(error) if type(error) is exceptions.PKCS11Error else type(error).__name__
