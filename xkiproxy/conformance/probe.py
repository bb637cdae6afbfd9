"""The client: it sends what a case asks for and judges what comes."""

from __future__ import annotations

import asyncio
import secrets
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson
from yarl import URL

from xkiproxy.conformance.wire import (
    Answer,
    Credential,
    Expected,
    Fields,
    Refused,
    Request,
    Signing,
    Skipped,
    Unmet,
    Wire,
)

if TYPE_CHECKING:
    # Loaded where it is used: it takes a quarter of a second, and every command would wait for it.
    import aiohttp


@dataclass(frozen=True, slots=True)
class Subject:
    """What is tested: where it is, and the keys and credentials to test it with.

    `base` is the path of all calls, such as `/demo/kms/xki/v1`. The optional keys are empty where
    there are none: the cases that need them are skipped. `deadline` is in seconds. `tls` makes a
    context that trusts the proxy (None: plain HTTP), with the client's certificate or without;
    `client_certificate` says whether there is one.
    """

    origin: str
    base: str
    key: str
    credentials: tuple[Credential, ...]
    region: str = ""
    encrypt_only_key: str = ""
    decrypt_only_key: str = ""
    disabled_key: str = ""
    missing_key: str = ""
    deadline: float = 0.25
    latency_requests: int = 200
    tls: Callable[[bool], ssl.SSLContext] | None = None
    client_certificate: bool = False


@dataclass(slots=True)
class Probe:
    """A client of the proxy under test."""

    subject: Subject
    wire: Wire
    session: aiohttp.ClientSession
    remembered: dict[str, Any] = field(default_factory=dict)

    def optional_key(self, option: str) -> str:
        """A key that only some installations have; raises Skipped."""
        key = str(getattr(self.subject, option.replace("-", "_")))
        if not key:
            raise Skipped(f"give one with --{option}")
        return key

    def signing(self, **changes: Any) -> Signing:
        """A right signature's ingredients, but for what is changed."""
        right = Signing(
            self.subject.credentials[0],
            self.subject.region or self.wire.default_region,
            datetime.now(UTC),
            secrets.token_hex(16),
        )
        return replace(right, **changes)

    def path(self, call: str, key: str = "") -> str:
        """The path of a call."""
        return f"{self.subject.base}/keys/{key}/{call}" if key else f"{self.subject.base}/{call}"

    def request(
        self, call: str, key: str = "", *, body: bytes | None = None, **fields: Any
    ) -> Request:
        """An unsigned call; `metadata` among the fields replaces the request metadata."""
        metadata = fields.pop("metadata", None) or self.wire.metadata(call)
        if body is None:
            body = orjson.dumps({self.wire.metadata_name: metadata, **fields})
        return Request("POST", self.path(call, key), {"host": self.authority}, body)

    @property
    def authority(self) -> str:
        """What the Host header says."""
        return URL(self.subject.origin).authority

    async def call(self, call: str, key: str = "", /, **fields: Any) -> Answer:
        """A call as the cloud makes it."""
        return await self.sign_and_send(self.request(call, key, **fields))

    async def sign_and_send(self, request: Request, **changes: Any) -> Answer:
        """Sign with these changes, and send."""
        return await self.send(self.wire.sign(request, self.signing(**changes)))

    async def send(self, request: Request) -> Answer:
        """Send a request as it is; raises Unmet where no answer comes."""
        from aiohttp import ClientError  # noqa: PLC0415

        url = URL(self.subject.origin + request.path, encoded=True)
        began = time.perf_counter()
        try:
            async with self.session.request(
                request.method, url, headers=request.headers, data=request.body or None
            ) as answer:
                body = await answer.read()
        except (ClientError, TimeoutError) as error:
            raise Unmet(f"no answer: {type(error).__name__}: {error}") from None
        seconds = time.perf_counter() - began
        headers = {name.lower(): value for name, value in answer.headers.items()}
        return Answer(answer.status, headers, body, seconds)

    def accept(self, answer: Answer) -> Answer:
        """Demand success; raises Unmet."""
        if answer.status != 200:
            raise Unmet(f"expected HTTP 200; {self._came(answer)}")
        return answer

    def refuse(self, answer: Answer, why: Refused | Expected) -> None:
        """Demand that it was refused, and so; raises Unmet."""
        expected = self.wire.refusals[why] if isinstance(why, Refused) else why
        if answer.status not in expected.statuses:
            raise Unmet(f"expected {expected}; {self._came(answer)}")
        code, _ = self.wire.code(answer)
        if expected.codes and code not in expected.codes:
            raise Unmet(f"expected {expected}; {self._came(answer)}")

    def _came(self, answer: Answer) -> str:
        """What came, without a value of a successful answer: it may be a plaintext."""
        if answer.status == 200:
            names = ", ".join(sorted(answer.fields)) or "nothing"
            return f"came HTTP 200 with {names}"
        try:
            code, message = self.wire.code(answer)
        except Unmet as error:
            return f"came {error}"
        return f"came HTTP {answer.status} {code}: {message}"

    async def encrypt(
        self, plaintext: bytes, aad: bytes | None = None, key: str = "", **more: Any
    ) -> Fields:
        """What a successful encrypt answers."""
        fields = self.wire.encrypt_fields(plaintext, aad) | more
        answer = await self.call("encrypt", key or self.subject.key, **fields)
        return self.accept(answer).fields

    async def decrypt(
        self, encrypted: Fields, aad: bytes | None = None, key: str = "", **more: Any
    ) -> Answer:
        """The answer to a decrypt of what encrypt answered, whatever it is."""
        fields = self.wire.decrypt_fields(encrypted, aad) | more
        return await self.call("decrypt", key or self.subject.key, **fields)

    async def opened(self, encrypted: Fields, aad: bytes | None = None, **more: Any) -> bytes:
        """The plaintext that a successful decrypt answers."""
        answer = self.accept(await self.decrypt(encrypted, aad, **more))
        return answer.data(self.wire.plaintext_name)

    async def missing_key(self) -> str:
        """The ID of a key that is not there."""
        return self.subject.missing_key or f"no-such-key-{uuid.uuid4()}"


@asynccontextmanager
async def connect(subject: Subject, wire: Wire) -> AsyncIterator[Probe]:
    """A probe with connections of its own."""
    from aiohttp import ClientSession, ClientTimeout, TCPConnector  # noqa: PLC0415

    trust = subject.tls(True) if subject.tls is not None else True
    connector = TCPConnector(ssl=trust, limit=64)
    skip = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")
    timeout = ClientTimeout(total=30, sock_connect=10)
    async with ClientSession(
        connector=connector, timeout=timeout, skip_auto_headers=skip
    ) as session:
        yield Probe(subject, wire, session)
    await asyncio.sleep(0)  # lets TLS connections end
