"""Signed requests, made before they are needed, each beside what its answer must hold."""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from base64 import b64encode
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from orjson import JSONDecodeError, loads

from benchmarks.load.wire import DECRYPT, DIALECTS, ENCRYPT, Dialect, Head

Call = Literal["encrypt", "decrypt", "mixed"]

MAX_AGE_SECONDS = 200
"""A request signed longer ago is not sent any more: XKS refuses one after 300 s."""

RIGHT, WRONG, BAD_CIPHERTEXT = "", "wrong plaintext", "bad ciphertext"
"""What a check says, beside the kinds of errors of a target."""

_CHUNK = 16
"""So many are signed at once when they have run out: about a fifth of a millisecond's work."""
_AGE_CHECK = 256
"""The age is looked at once in so many requests."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked, of whom, and signed with what.

    `path` is the prefix of the key store, such as "/demo"; `host` is the Host header.
    `plaintext_size` is in bytes. Requests go through `plaintexts` different plaintexts in turn, so
    that an answer to somebody else's request is seen.
    """

    protocol: Literal["xki", "xks"]
    path: str
    key_id: str
    access_key_id: str
    secret: str = field(repr=False)
    host: str
    call: Call = "encrypt"
    plaintext_size: int = 32
    plaintexts: int = 64

    @property
    def dialect(self) -> Dialect:
        """The wire names and the signature of the protocol."""
        return DIALECTS[self.protocol]

    def call_path(self, call: str) -> str:
        """The path of a call."""
        return f"{self.path.rstrip('/')}{self.dialect.base_path}/keys/{self.key_id}/{call}"

    def plaintext(self, number: int) -> bytes:
        """The plaintext of this number: it looks random, and is the same wherever it is made."""
        return hashlib.shake_128(b"plaintext %d" % number).digest(self.plaintext_size)


@dataclass(frozen=True, slots=True)
class Material:
    """What a run needs from the target beforehand: real ciphertexts, decrypted once and found good.

    `decrypts` has for every plaintext the fields of its decrypt request; `sizes` are those of the
    parts of every ciphertext, in bytes.
    """

    decrypts: tuple[dict[str, str], ...]
    sizes: tuple[int, ...]


class Request(NamedTuple):
    """A whole HTTP/1.1 request, and the number of the plaintext that belongs to it."""

    raw: bytes
    call: str
    number: int


class _Mould:
    """Makes the requests of one call."""

    def __init__(self, workload: Workload, call: str) -> None:
        path = workload.call_path(call)
        self.call = call
        self.dialect = workload.dialect
        self.head: Head = self.dialect.head(call, path, workload.host, workload.access_key_id)

    def fill(
        self, values: dict[bytes, bytes | int], key: bytes, body: bytes, number: int
    ) -> Request:
        """Sign one; `values` has date, day and nonce, and is used up."""
        head = self.head
        values[b"hash"] = hashlib.sha256(body).hexdigest().encode()
        values[b"digest"] = hashlib.sha256(head.canonical % values).hexdigest().encode()
        to_sign = head.to_sign % values
        values[b"signature"] = hmac.digest(key, to_sign, "sha256").hex().encode()
        values[b"length"] = len(body)
        values[b"body"] = body
        return Request(head.request % values, self.call, number)


class RequestMaker:
    """Signs the requests of a workload, one plaintext after the other.

    The key of a day is derived once. Decrypt requests need `material`.
    """

    def __init__(self, workload: Workload, material: Material | None = None) -> None:
        if workload.call != ENCRYPT and material is None:
            raise ValueError("decrypt requests need ciphertexts: the material")
        self._workload = workload
        self._material = material
        self._serial = 0
        self._prefix = os.urandom(8).hex().encode()
        self._day, self._key = "", b""
        calls = (ENCRYPT, DECRYPT) if workload.call == "mixed" else (workload.call,)
        self._moulds = [_Mould(workload, call) for call in calls]
        self._bodies = [self._call_bodies(call) for call in calls]

    def make(self, count: int, now: float | None = None) -> list[Request]:
        """So many requests, dated `now` (seconds since the epoch; None is the present)."""
        values = self._date_values(time.time() if now is None else now)
        moulds, bodies, key = self._moulds, self._bodies, self._key
        kinds, numbers = len(moulds), self._workload.plaintexts
        requests = []
        for serial in range(self._serial, self._serial + count):
            kind, number = serial % kinds, serial // kinds % numbers
            nonce = b"%b-%012x" % (self._prefix, serial)
            before, after = bodies[kind][number]
            body = b"%breq-%b%b" % (before, nonce, after)
            requests.append(moulds[kind].fill({**values, b"nonce": nonce}, key, body, number))
        self._serial += count
        return requests

    def decrypt(self, fields: dict[str, str], number: int) -> Request:
        """The decrypt request of one ciphertext."""
        values = self._date_values(time.time())
        nonce = b"%b-%012x" % (self._prefix, self._serial)
        self._serial += 1
        before, after = self._workload.dialect.body(DECRYPT, fields)
        body = b"%breq-%b%b" % (before, nonce, after)
        mould = _Mould(self._workload, DECRYPT)
        return mould.fill({**values, b"nonce": nonce}, self._key, body, number)

    def _date_values(self, now: float) -> dict[bytes, bytes | int]:
        date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        day = date[:8]
        if day != self._day:
            self._key = self._workload.dialect.signing_key(self._workload.secret, day)
            self._day = day
        return {b"date": date.encode(), b"day": day.encode()}

    def _call_bodies(self, call: str) -> list[tuple[bytes, bytes]]:
        """For each plaintext what stands before and after the ID of a request."""
        workload, dialect = self._workload, self._workload.dialect
        bodies = []
        for number in range(workload.plaintexts):
            if call == ENCRYPT:
                fields = dialect.encrypt_fields(workload.plaintext(number))
            else:
                assert self._material is not None
                fields = self._material.decrypts[number]
            bodies.append(dialect.body(call, fields))
        return bodies


class Supply:
    """Requests signed beforehand; when they run out more are signed in passing, and counted."""

    def __init__(self, maker: RequestMaker, count: int) -> None:
        self._maker = maker
        self._signed_at = time.monotonic()
        self._ready = maker.make(count)
        self._ready.reverse()
        self._until_check = _AGE_CHECK
        self.signed_late = 0

    def next(self) -> Request:
        """The next request; each is given out once."""
        self._until_check -= 1
        if self._until_check < 0:
            self._check_age()
        if not self._ready:
            self._ready = self._maker.make(_CHUNK)
            self._ready.reverse()
            self._signed_at = time.monotonic()
            self.signed_late += _CHUNK
        return self._ready.pop()

    def _check_age(self) -> None:
        self._until_check = _AGE_CHECK
        if time.monotonic() - self._signed_at > MAX_AGE_SECONDS:
            self._ready.clear()


class Checker:
    """Tells right answers from others."""

    def __init__(self, workload: Workload, sizes: tuple[int, ...]) -> None:
        """`sizes`: see `Material`."""
        self._dialect = workload.dialect
        self._sizes = sizes
        self._plaintexts = [
            b64encode(workload.plaintext(number)).decode() for number in range(workload.plaintexts)
        ]

    def check(self, request: Request, status: int, body: bytes) -> str:
        """ "" for a right answer, `WRONG` for a wrong plaintext, else the kind of error."""
        try:
            fields = loads(body)
        except JSONDecodeError:
            return f"{status} not JSON"
        if not isinstance(fields, dict):
            return f"{status} not a JSON object"
        if status != 200:
            return f"{status} {fields.get(self._dialect.code_field, 'without a code')}"
        if request.call == DECRYPT:
            right = fields.get(self._dialect.plaintext_field) == self._plaintexts[request.number]
            return RIGHT if right else WRONG
        try:
            sizes = self._dialect.sizes(fields)
        except (KeyError, TypeError, ValueError):
            return BAD_CIPHERTEXT
        return RIGHT if sizes == self._sizes else BAD_CIPHERTEXT
