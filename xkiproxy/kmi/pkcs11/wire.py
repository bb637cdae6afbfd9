"""Frames between the server and a lane process: 4 bytes of length, big-endian, and MessagePack.

MessagePack, not pickle: a lane holds somebody else's module, and what comes from it must not be
able to run code in the server. A message is a list that begins with its kind. Operations and
outcomes are lists too, so that a lane process need not know the server's classes.

    to the lane       [OPEN, settings]  [BATCH, epoch, operations]  [PROBE]  [MANAGE, command, args]
    from the lane     [READY]  [FAILED, reason, text]  [OUTCOMES, outcomes]  [BROKEN, text]
                      [PROBED]  [DONE, value]  [ERROR, text]
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgpack

from xkiproxy.crypto.algorithms import Algorithm, KeySpec, Padding, Usage
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
)

OPEN, BATCH, PROBE, MANAGE = range(4)
READY, FAILED, OUTCOMES, BROKEN, PROBED, DONE, ERROR = range(10, 17)
ENCRYPT, DECRYPT, RANDOM, DESCRIBE = range(4)

MAX_FRAME = 64 << 20
_LENGTH = struct.Struct(">I")
LENGTH_SIZE = _LENGTH.size

_RAW = CiphertextFormat.RAW
_ALGORITHMS = {algorithm.value: algorithm for algorithm in Algorithm}
_PADDINGS: dict[str | None, Padding | None] = {None: None, **{p.value: p for p in Padding}}

Frame = list[Any]


class FrameError(Exception):
    """What came is not a frame."""


def pack(frame: Sequence[Any]) -> bytes:
    """The bytes of a frame."""
    body: bytes = msgpack.packb(frame)
    return _LENGTH.pack(len(body)) + body


def unpack(body: bytes | memoryview) -> Frame:
    """The frame in a body (without its length); raises FrameError."""
    try:
        frame = msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException):
        raise FrameError("a frame cannot be read") from None
    if not isinstance(frame, list) or not frame:
        raise FrameError("a frame is not a list")
    return frame


def body_length(head: bytes | memoryview) -> int:
    """The length that the first 4 bytes of a frame say; raises FrameError."""
    length = int(_LENGTH.unpack(head)[0])
    if length > MAX_FRAME:
        raise FrameError(f"a frame of {length} bytes is too long")
    return length


class FrameBuffer:
    """Cuts a stream of bytes into frames."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are complete with these bytes; raises FrameError."""
        buffer = self._data
        buffer += data
        frames = []
        position = 0
        while len(buffer) - position >= LENGTH_SIZE:
            start = position + LENGTH_SIZE
            end = start + body_length(bytes(buffer[position:start]))
            if len(buffer) < end:
                break
            frames.append(unpack(bytes(buffer[start:end])))
            position = end
        del buffer[:position]
        return frames


def operation_fields(operation: Operation) -> tuple[Any, ...]:
    """An operation as it goes to a lane."""
    kind = type(operation)
    if kind is Encrypt:
        o: Any = operation
        return (
            ENCRYPT, o.key_id, o.algorithm, o.padding, o.iv, o.aad, o.plaintext, o.format is _RAW,
        )  # fmt: skip
    if kind is Decrypt:
        o = operation
        return (
            DECRYPT, o.key_id, o.algorithm, o.padding, o.iv, o.aad, o.ciphertext,
            o.format is _RAW, o.version,
        )  # fmt: skip
    if isinstance(operation, Random):
        return (RANDOM, operation.length)
    assert isinstance(operation, Describe)  # noqa: S101 - there are four
    return (DESCRIBE, operation.key_id)


def failure(error: OperationError) -> tuple[Any, ...]:
    """A failed operation as it comes from a lane."""
    return (-1, error.fault.name, error.message, error.parameter)


def outcome(fields: Sequence[Any]) -> Result | OperationError:
    """What became of an operation; raises FrameError."""
    try:
        return _outcome(fields)
    except (ValueError, KeyError, TypeError, IndexError):
        raise FrameError("an outcome cannot be read") from None


def _outcome(fields: Sequence[Any]) -> Result | OperationError:
    kind = fields[0]
    if kind == ENCRYPT:
        _, ciphertext, iv, version, algorithm, padding = fields
        return Encrypted(ciphertext, iv, version, _ALGORITHMS[algorithm], _PADDINGS[padding])
    if kind == DECRYPT:
        _, plaintext, version, algorithm, padding = fields
        return Decrypted(plaintext, version, _ALGORITHMS[algorithm], _PADDINGS[padding])
    if kind == RANDOM:
        return RandomBytes(fields[1])
    if kind == DESCRIBE:
        _, key_id, spec, usage, version = fields
        return KeyDescription(key_id, KeySpec(spec), Usage(usage), version, None)
    _, fault, message, parameter = fields
    return OperationError(Fault[fault], message, parameter)
