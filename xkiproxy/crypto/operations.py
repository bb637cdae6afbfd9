"""Operations, their results and their failures: the language between protocols and KMIs.

A protocol decodes a request into one of these, a KMI executes it, and the protocol encodes the
result. They are immutable and slotted: they cross a queue, a batch and a process boundary. Secrets
are kept out of their `repr`, so that a traceback or a log cannot show them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from typing import TYPE_CHECKING

from xkiproxy.crypto.algorithms import (
    BLOCK_SIZE,
    GCM_MODES,
    IV_SIZES,
    TAG_SIZE,
    Algorithm,
    KeySpec,
    Padding,
    Usage,
)
from xkiproxy.crypto.record import record

if TYPE_CHECKING:  # it loads three libraries, which a lane process has no use for
    from xkiproxy.crypto.wrapping import Wrapping


class CiphertextFormat(Enum):
    """How a ciphertext names the key version that made it."""

    ENVELOPE = "envelope"
    """Versioned: the metadata of `xkiproxy.crypto.envelope` is bound into the AAD."""
    RAW = "raw"
    """Bare `ciphertext || tag` and the AAD as it is, as other proxies write it."""


@record
class Encrypt:
    """Encrypt under the newest version of a key.

    `algorithm` None means the key's default. `iv` None means: make one at random. `aad` is the
    caller's own additional authenticated data, before any metadata is bound to it.
    """

    key_id: str
    plaintext: bytes = field(repr=False)
    algorithm: Algorithm | None = None
    padding: Padding | None = None
    iv: bytes | None = None
    aad: bytes = field(default=b"", repr=False)
    format: CiphertextFormat = CiphertextFormat.ENVELOPE
    integrity: bool = False
    """Whether the key store makes an integrity value and then proves that all of it decrypts."""


@record
class Encrypted:
    """The answer to `Encrypt`: under GCM `ciphertext` ends with its 16-byte tag.

    `integrity` is empty, or `envelope.integrity_value` of what is returned.
    """

    ciphertext: bytes = field(repr=False)
    iv: bytes
    version: int
    algorithm: Algorithm
    padding: Padding | None
    integrity: bytes = b""


@record
class Decrypt:
    """Decrypt with one version of a key.

    `version` is what the envelope names; None (raw format) means the only version there is.
    Under GCM `ciphertext` ends with its 16-byte tag. `iv` is empty under ECB.
    """

    key_id: str
    ciphertext: bytes = field(repr=False)
    iv: bytes
    version: int | None
    algorithm: Algorithm | None = None
    padding: Padding | None = None
    aad: bytes = field(default=b"", repr=False)
    format: CiphertextFormat = CiphertextFormat.ENVELOPE


@record
class Decrypted:
    """The answer to `Decrypt`."""

    plaintext: bytes = field(repr=False)
    version: int
    algorithm: Algorithm
    padding: Padding | None


class OutputForm(StrEnum):
    """In what form random bytes are given out."""

    PLAIN = "PLAIN"
    PUBLIC_KEY_WRAPPED = "PUBLIC_KEY_WRAPPED"
    NONE = "NONE"
    """They are drawn and thrown away."""


@record
class Random:
    """Draw `length` bytes from the KMI's random generator.

    The KMI draws; `output` and `wrapping` (set with PUBLIC_KEY_WRAPPED) are the key store's part.
    """

    length: int
    output: OutputForm = OutputForm.PLAIN
    wrapping: Wrapping | None = None


@record
class RandomBytes:
    """The answer to `Random`: the bytes, what wraps them, or nothing."""

    data: bytes = field(repr=False)


class KeyState(StrEnum):
    """The state of an external key at the proxy; only ENABLED keys are used."""

    ENABLED = "ENABLED"
    DISABLED = "DISABLED"
    PENDING_DELETION = "PENDING_DELETION"


@dataclass(frozen=True, slots=True)
class Describe:
    """Ask what a key is."""

    key_id: str


@dataclass(frozen=True, slots=True)
class KeyDescription:
    """The answer to `Describe`: `version` is the newest, `created` in seconds since the epoch.

    A KMI says what it knows (of `created` it may know nothing); the key store narrows `usage`, and
    sets `state` and what is missing from the catalog.
    """

    key_id: str
    spec: KeySpec
    usage: Usage
    version: int
    created: float | None
    state: KeyState = KeyState.ENABLED


Operation = Encrypt | Decrypt | Random | Describe
"""What a KMI executes."""

Result = Encrypted | Decrypted | RandomBytes | KeyDescription


class Availability(StrEnum):
    """How well a key store can serve."""

    ACTIVE = "ACTIVE"
    DEGRADED = "DEGRADED"
    """It serves, with less behind it than it should have."""
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Health:
    """Ask how a key store is; its answer is in memory, no KMI is asked."""


@dataclass(frozen=True, slots=True)
class KmiHealth:
    """How one KMI is: its name and type as configured."""

    name: str
    type: str
    availability: Availability


@dataclass(frozen=True, slots=True)
class HealthReport:
    """The answer to `Health`, from deep checks no older than a minute."""

    availability: Availability
    message: str
    kmis: tuple[KmiHealth, ...]


class Fault(Enum):
    """Why an operation failed; each protocol has its own words for these."""

    INVALID_PARAMETER = auto()
    INVALID_CIPHERTEXT = auto()
    UNSUPPORTED = auto()
    """The key cannot do this, whatever the parameters."""
    KEY_NOT_FOUND = auto()
    KEY_DISABLED = auto()
    KEY_PENDING_DELETION = auto()
    KEY_UNUSABLE = auto()
    """Any other state in which the key cannot be used."""
    KEY_FORBIDDEN = auto()
    """The KMI is there, and does not let the proxy use this key."""
    USAGE_FORBIDDEN = auto()
    ACCESS_DENIED = auto()
    THROTTLED = auto()
    """Over a quota, or the queue is full."""
    UNAVAILABLE = auto()
    """The KMI is away, or the proxy must not serve."""
    DEADLINE_EXCEEDED = auto()
    INTERNAL = auto()


class OperationError(Exception):
    """An operation that failed.

    `message` is sent to the client: it never holds key material, plaintext or a secret.
    `parameter` names the field of the operation at fault, with `INVALID_PARAMETER`. `details` are
    for the audit log and not for the client: which `policy` or `quota` refused it, what is `full`,
    and with a quota `retry_after`, the seconds after which it would not.
    """

    def __init__(
        self,
        fault: Fault,
        message: str,
        parameter: str = "",
        details: Mapping[str, str | int] | None = None,
    ) -> None:
        super().__init__(fault, message, parameter)
        self.details = details or {}
        self.fault = fault
        self.message = message
        self.parameter = parameter


# The hot path asks for these: a member by its class's name costs 65 ns.
_DEFAULT, _NO_PADDING = Algorithm.AES_GCM, Padding.NONE


def check_parameters(operation: Encrypt | Decrypt) -> None:
    """Refuse parameters that contradict each other or the algorithm.

    Where no algorithm is named the rules of GCM hold, since the default of every key spec is GCM.

    Raises:
        OperationError: `INVALID_PARAMETER` naming the field, or `INVALID_CIPHERTEXT`.
    """
    algorithm = operation.algorithm or _DEFAULT
    authenticated = algorithm in GCM_MODES
    iv_size = IV_SIZES[algorithm]
    if operation.iv is not None and len(operation.iv) != iv_size:
        wanted = f"{iv_size} bytes" if iv_size else "absent"
        raise _invalid("iv", f"{algorithm} needs an IV of {wanted}, not {len(operation.iv)} bytes")
    if authenticated and operation.padding is not None:
        raise _invalid("padding", f"{algorithm} uses no padding")
    if operation.aad and not authenticated:
        raise _invalid("aad", f"{algorithm} authenticates no additional data")
    if isinstance(operation, Encrypt):
        if operation.padding is _NO_PADDING and len(operation.plaintext) % BLOCK_SIZE:
            raise _invalid("plaintext", f"without padding it is whole {BLOCK_SIZE}-byte blocks")
    else:
        _check_ciphertext(operation, authenticated)


def _check_ciphertext(operation: Decrypt, authenticated: bool) -> None:
    size = len(operation.ciphertext)
    if authenticated:
        if size < TAG_SIZE:
            raise invalid_ciphertext()
    elif size % BLOCK_SIZE or (size == 0 and operation.padding is not _NO_PADDING):
        raise invalid_ciphertext()


def _invalid(parameter: str, message: str) -> OperationError:
    return OperationError(Fault.INVALID_PARAMETER, message, parameter)


def no_such_key() -> OperationError:
    """The failure for a key that is not there, and for one that the key store may not use."""
    return OperationError(Fault.KEY_NOT_FOUND, "There is no such key.")


def invalid_ciphertext() -> OperationError:
    """The one failure for whatever is wrong with a ciphertext, so that none tells it apart."""
    return OperationError(
        Fault.INVALID_CIPHERTEXT, "The ciphertext, its IV, its AAD or its tag is wrong."
    )
