"""What every protocol offers the gateway, and what it is given.

A protocol turns (path, headers, bytes) into an `Action` and a `Result` into bytes. It names its
errors in its own words. All protocols share the shape of a path: `{prefix}{base_path}/{call}`, and
with a key `{prefix}{base_path}/keys/{key id}/{call}` or `{prefix}{base_path}/keys/{key id}:{call}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Literal, get_args
from typing import Protocol as Interface

from xkiproxy.crypto.caller import Caller
from xkiproxy.crypto.operations import (
    Health,
    HealthReport,
    Operation,
    OperationError,
    Result,
)
from xkiproxy.crypto.record import record

Action = Operation | Health
"""What a request asks for."""

Fields = Mapping[str, Any]
"""A JSON object."""


class Trouble(Enum):
    """Why a request is refused before it is an operation: each protocol has its words for it."""

    NOT_HTTP = auto()
    NOT_FOUND = auto()
    METHOD_NOT_ALLOWED = auto()
    TOO_LARGE = auto()
    BODY_TIMEOUT = auto()
    REPLAYED = auto()
    OVERLOADED = auto()
    """More requests wait than can be answered in time."""
    SOURCE_FORBIDDEN = auto()
    """The client's address is in none of the key store's networks."""


Reason = Literal[
    "missing", "malformed", "date", "stale", "scope", "unsigned_header", "unknown_access_key",
    "signature", "body_hash", "replay", "source_network", "policy", "unknown_token_key",
    "access_reason",
]  # fmt: skip
"""Why a request was not authenticated, or denied."""

REASONS: tuple[Reason, ...] = get_args(Reason)


class Refusal(Exception):
    """A request refused, in the protocol's words.

    `reason` is for metrics and the audit log, never for the client; it is empty where the request
    was authenticated and nobody denied it.
    """

    def __init__(
        self, status: int, code: str, message: str, reason: Reason | Literal[""] = ""
    ) -> None:
        super().__init__(status, code, message, reason)
        self.status = status
        self.code = code
        self.message = message
        self.reason = reason


def codes_by_status(answers: Iterable[tuple[int, str]]) -> dict[int, list[str]]:
    """The codes that come with each status, of pairs of both; in order."""
    found: dict[int, set[str]] = {}
    for status, code in answers:
        found.setdefault(status, set()).add(code)
    return {status: sorted(found[status]) for status in sorted(found)}


@dataclass(slots=True)
class SignedRequest:
    """The parts of an HTTP request that a signature covers.

    `path` and `query` are as they stood in the request line, still percent-encoded. `headers` are
    as they came, any case, repeated or not, without white space around their values.
    """

    method: str
    path: str
    query: str
    headers: Sequence[tuple[bytes, bytes]] = field(repr=False)
    body: bytes = field(repr=False)


@record
class Identity:
    """Who signed a request.

    `nonce` may be used once until `expires` (seconds since the epoch); it is empty in a protocol
    whose signatures have none.
    """

    access_key_id: str
    nonce: str
    expires: float


Mac = Callable[[bytes], bytes]
"""A message authentication code under a key: of some bytes, in lower-case hex."""


class SigningKeys(Interface):
    """Derived signing keys of the credentials of a key store, ready for use."""

    def get(self, access_key_id: str, scope: str, derive: Callable[[str], Mac]) -> tuple[bool, Mac]:
        """(whether the access key is known, what `derive` makes of its secret).

        For an unknown access key a key of the same kind comes back, at the same cost, that no
        signature can match. `scope` names what else the key depends on (date, region, ...).
        """
        ...


class Protocol(Interface):
    """A cloud's wire dialect, with the settings of one key store."""

    name: str
    base_path: str
    calls: frozenset[str]
    """The last part of a path without a key."""
    key_calls: frozenset[str]
    """The last part of a path with a key."""
    key_methods: frozenset[str]
    """What stands after a key and a colon (custom methods, Google's AIP-136)."""

    def authenticate(self, request: SignedRequest, keys: SigningKeys, now: float) -> Identity:
        """Verify a signature; `now` in seconds since the epoch. Raises Refusal, OperationError."""
        ...

    def open(self, call: str, body: bytes, identity: Identity) -> tuple[Caller, Fields]:
        """Parse a request body as far as its metadata; `identity` has signed it. Raises Refusal."""
        ...

    def decode(self, call: str, key_id: str, fields: Fields) -> Action:
        """Read the rest of it; `key_id` as it stood in the path. Raises Refusal, OperationError."""
        ...

    def encode(self, action: Action, result: Result | HealthReport, request_id: str) -> bytes:
        """The body of an answer with status 200."""
        ...

    def refuse(self, why: OperationError | Trouble) -> Refusal:
        """A failure in the words of this protocol."""
        ...

    def encode_refusal(self, refusal: Refusal, request_id: str) -> bytes:
        """The body of an error."""
        ...

    def headers(self, caller_request_id: str) -> bytes:
        """The lines of the headers of every answer, each ended by CR and LF."""
        ...
