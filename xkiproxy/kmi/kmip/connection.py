"""A TLS connection to a KMIP server: one message after the other (KMIP 1.4, section 10)."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import cast

from xkiproxy.config.models import KmipSettings, split_address
from xkiproxy.config.secrets import SecretError
from xkiproxy.config.tls import TlsError, client_context
from xkiproxy.kmi.base import BreakReason, LaneError
from xkiproxy.kmi.kmip import messages, ttlv
from xkiproxy.kmi.kmip.messages import Answer, KmipError, Op, Request, Version
from xkiproxy.observability.outlet import reason

NEEDED = (Op.LOCATE, Op.GET_ATTRIBUTES, Op.ENCRYPT, Op.DECRYPT)
"""Without these a server cannot be used."""

_MAX_MESSAGE_SIZE = 4 << 20


class Connection(asyncio.Protocol):
    """Messages go out and come back in turn; whatever goes wrong ends the connection."""

    def __init__(self, timeout: float) -> None:
        """`timeout` in seconds, for each message."""
        self.version: Version = messages.VERSIONS[-1]
        self.operations: frozenset[int] = frozenset()
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._turn = asyncio.Lock()
        self._received = bytearray()
        self._answer: asyncio.Future[bytes] | None = None
        self.broken: asyncio.Future[LaneError] = self._loop.create_future()

    async def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """Send one message with these requests; their answers, in their order.

        Raises:
            LaneError: the connection is of no use any more.
            KmipError: the server refuses the message as a whole.
        """
        async with self._turn:
            data = await self._exchange(messages.encode_message(self.version, requests))
        try:
            return messages.decode_message(data, len(requests))
        except ttlv.TtlvError as error:
            raise self.end(f"it does not speak KMIP: {error}", BreakReason.DEVICE) from None

    async def ask_one(self, request: Request) -> Answer:
        """The answer to one request; raises LaneError or KmipError, also for one that failed."""
        (answer,) = await self.ask([request])
        if answer.failed:
            words = answer.message or f"reason 0x{answer.reason:x}"
            raise KmipError(f"{request[0].name}: {words}")
        return answer

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
