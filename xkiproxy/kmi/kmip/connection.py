"""A TLS connection to a KMIP server: one message after the other (KMIP 1.4, section 10)."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Iterator, Sequence
from typing import cast

from xkiproxy.config.models import KmipSettings, split_address
from xkiproxy.config.secrets import SecretError
from xkiproxy.config.tls import TlsError, client_context
from xkiproxy.kmi.base import BreakReason, LaneError
from xkiproxy.kmi.kmip import messages, ttlv
from xkiproxy.kmi.kmip.messages import Answer, KmipError, Op, Reason, Request, Version
from xkiproxy.observability.outlet import reason

NEEDED = (Op.LOCATE, Op.GET_ATTRIBUTES, Op.ENCRYPT, Op.DECRYPT)
"""Without these a server cannot be used."""

_MAX_MESSAGE_SIZE = 4 << 20

_MAX_BATCH_SIZE = 512 << 10
"""Bytes of requests in a message, and so about those of its answers: servers take and give messages
of 1 MiB (PyKMIP) and up.
"""

_log = logging.getLogger(__name__)


class Connection(asyncio.Protocol):
    """Messages go out and come back in turn; whatever goes wrong ends the connection."""

    def __init__(self, timeout: float) -> None:
        """`timeout` in seconds, for each message."""
        self.version: Version = messages.VERSIONS[-1]
        self.operations: frozenset[int] = frozenset()
        self.max_batch = 1
        self._timeout = timeout
        self._asked = 0
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._turn = asyncio.Lock()
        self._received = bytearray()
        self._answer: asyncio.Future[bytes] | None = None
        self.broken: asyncio.Future[LaneError] = self._loop.create_future()

    async def ask(self, requests: Sequence[Request], most: int = 1024) -> list[Answer]:
        """The answers to these requests, in their order; in one message if the server takes it.

        What is refused alone as it was in a message is an answer that failed. `most`: so many are
        asked for in a message at most.

        Raises:
            LaneError: the connection is of no use any more.
        """
        answers: list[Answer] = []
        for part in _parts(requests, min(self.max_batch, most)):
            answers += await self._ask_part(part, self._loop.time() + self._timeout)
        return answers

    async def ask_one(self, request: Request) -> Answer:
        """The answer to one request; raises LaneError or KmipError, also for one that failed."""
        (answer,) = await self.ask([request])
        if answer.failed:
            raise KmipError(f"{request[0].name}: {messages.words_of(answer)}", answer.reason)
        return answer

    async def ask_at_once(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers to one message with these requests.

        Raises:
            LaneError: the connection is of no use any more.
            KmipError: the server refuses the message as a whole.
        """
        first = self._asked
        self._asked += len(requests)
        async with self._turn:
            data = await self._exchange(messages.encode_message(self.version, requests, first))
        try:
            return messages.decode_message(data, requests, first)
        except ttlv.TtlvError as error:
            raise self.end(f"it does not speak KMIP: {error}", BreakReason.DEVICE) from None

    async def _ask_part(self, part: Sequence[Request], until: float) -> list[Answer]:
        """One message; if it is refused as a whole, its halves, until the time is over.

        It may be too large, or one of them cannot be read: the others are not to suffer for it.
        """
        try:
            return await self.ask_at_once(part)
        except KmipError as error:
            if len(part) == 1:
                return [_failed(error.reason, error)]
            if self._loop.time() > until:
                # Nothing was shown to be wrong with any of them.
                return [_failed(Reason.INTERNAL_SERVER_ERROR, error) for _ in part]
        half = len(part) // 2
        return [
            *await self._ask_part(part[:half], until),
            *await self._ask_part(part[half:], until),
        ]

    async def _exchange(self, message: bytes) -> bytes:
        if self.broken.done():
            broken = self.broken.result()
            raise LaneError(broken.message, broken.reason, started=False)
        self._answer = self._loop.create_future()
        cast(asyncio.Transport, self._transport).write(message)
        try:
            async with asyncio.timeout(self._timeout):
                return await self._answer
        except TimeoutError:
            text = f"no answer for {self._timeout:g} s"
            raise self.end(text, BreakReason.TIMEOUT) from None
        except asyncio.CancelledError:
            self.end("a request was given up", BreakReason.EXIT)  # its answer would be in the way
            raise
        finally:
            self._answer = None

    def end(self, message: str, why: BreakReason) -> LaneError:
        """End the connection, for a reason that is returned."""
        error = LaneError(message, why)
        if not self.broken.done():
            self.broken.set_result(error)
        if self._transport is not None:
            self._transport.abort()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        return error

    # ---- asyncio.Protocol ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        why = reason(exc) if isinstance(exc, OSError) else "the server has closed the connection"
        self.end(why, BreakReason.EXIT)

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        if len(received) < ttlv.HEADER_SIZE:
            return
        size = ttlv.message_size(received)
        if size > _MAX_MESSAGE_SIZE:
            self.end(f"it sends a message of {size} bytes", BreakReason.DEVICE)
        elif len(received) > size or self._answer is None:
            self.end("it sends what nobody has asked for", BreakReason.DEVICE)
        elif len(received) == size and not self._answer.done():
            self._answer.set_result(bytes(received))
            received.clear()


def _failed(reason: int, error: KmipError) -> Answer:
    return Answer(ttlv.Structure(0, []), True, reason, str(error))


def _parts(requests: Sequence[Request], most: int) -> Iterator[Sequence[Request]]:
    """The requests in messages of at most so many, and of a size that servers take."""
    start, size = 0, 0
    for index, (_, payload) in enumerate(requests):
        size += len(payload)
        if index > start and (index - start == most or size > _MAX_BATCH_SIZE):
            yield requests[start:index]
            start, size = index, len(payload)
    if start < len(requests):
        yield requests[start:]


async def connect(settings: KmipSettings, index: int) -> Connection:
    """Connect to one of the addresses, agree on a version, and see what the server can do.

    Raises:
        LaneError: whatever does not work, in words that name the address.
    """
    address = settings.address[index % len(settings.address)]
    host, port = split_address(address)
    try:
        context = client_context(settings.tls)
        connection = await _open(settings, context, host, port)
    except (SecretError, TlsError) as error:
        raise LaneError(str(error), BreakReason.START) from None
    except TimeoutError:
        text = f"{address}: no connection within {settings.connect_timeout_seconds:g} s"
        raise LaneError(text, BreakReason.START) from None
    except OSError as error:
        raise LaneError(f"{address}: {reason(error)}", BreakReason.START) from None
    try:
        await _agree(connection, settings)
    except (LaneError, KmipError) as error:
        connection.end("it cannot be used", BreakReason.START)
        text = error.message if isinstance(error, LaneError) else str(error)
        if isinstance(error, LaneError) and error.reason is BreakReason.EXIT:
            # In TLS 1.3 a client learns after the handshake that its certificate is refused.
            text += " at once: does it know the client certificate?"
        raise LaneError(f"{address}: {text}", BreakReason.START) from None
    except BaseException:
        connection.end("it was given up", BreakReason.START)
        raise
    return connection


async def _open(
    settings: KmipSettings, context: ssl.SSLContext, host: str, port: int
) -> Connection:
    async with asyncio.timeout(settings.connect_timeout_seconds):
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(settings.operation_timeout_ms / 1000),
            host,
            port,
            ssl=context,
            server_hostname=settings.tls.server_name or host,
            ssl_handshake_timeout=settings.connect_timeout_seconds,
        )
    return connection


async def _agree(connection: Connection, settings: KmipSettings) -> None:
    """Choose a version; refuse a server that lacks what is needed."""
    if settings.version is None:
        offered = messages.discovered(await connection.ask_one(messages.discover_versions()))
        common = [version for version in messages.VERSIONS if version in offered]
        if not common:
            spoken = ", ".join(f"{major}.{minor}" for major, minor in offered) or "none"
            raise KmipError(f"the server speaks KMIP {spoken}; needed is 1.4, 2.0 or 2.1")
        connection.version = common[0]
    else:
        major, _, minor = settings.version.partition(".")
        connection.version = (int(major), int(minor))
    connection.max_batch = await _batch_of(connection, settings)
    found = messages.queried(await connection.ask_one(messages.query_operations()))
    connection.operations = frozenset(value for value in found if isinstance(value, int))
    missing = [operation for operation in NEEDED if operation not in connection.operations]
    if missing:
        why = ""
        if Op.ENCRYPT in missing or Op.DECRYPT in missing:
            why = ": it only stores keys, and they would have to leave it"
        raise KmipError(f"the server lacks {', '.join(op.name for op in missing)}{why}")
    if settings.random == "server" and Op.RNG_RETRIEVE not in connection.operations:
        raise KmipError(
            'the server lacks RNG_RETRIEVE: random = "generator" lets the proxy draw random bytes'
        )


async def _batch_of(connection: Connection, settings: KmipSettings) -> int:
    """How many operations a message may have: servers need not take more than one."""
    if settings.max_batch == 1:
        return 1
    try:
        await connection.ask_at_once([messages.query_operations()] * 2)
    except KmipError as error:
        _log.warning(
            "KMI %s: %s takes one operation in a message, so each costs a round trip: %s",
            settings.name,
            ", ".join(settings.address),
            error,
        )
        return 1
    return settings.max_batch
