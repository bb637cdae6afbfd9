"""The hash chain of the audit log: how a line is made, read, and how a log's end is judged.

A line is one JSON object that begins with its number and the hash of the line before it:

    {"seq":17,"prev":"<SHA-256 of line 16, without its line feed, in hex>","time":...}

The first line of a chain has number 1 and a `prev` of 64 zeros. A chain goes on from file to file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, NamedTuple

import orjson

RECOVERED = "audit_recovered"
OPENED = "audit_opened"
CLOSED = "audit_closed"
RESUMED = "audit_resumed"
RESTARTED = "audit_restarted"
SINK_RESUMED = "audit_sink_resumed"

FILE = "file"
"""The sink that every log has: the chain is at home there."""

_HEAD = re.compile(rb'\{"seq":([1-9][0-9]{0,18}),"prev":"([0-9a-f]{64})",')
_FIRST_WINDOW = 1 << 16
_MAX_WINDOW = 1 << 26


class ChainError(Exception):
    """The end of a log is not the end of a chain; the text says where and why."""


class Link(NamedTuple):
    """What the next record hangs on: the last record's number and its hash."""

    seq: int
    hash: str


START = Link(0, "0" * 64)
"""What the first record of a chain hangs on."""


class Line(NamedTuple):
    """A line that is a record."""

    seq: int
    prev: str
    hash: str
    fields: dict[str, Any]

    @property
    def link(self) -> Link:
        """What the record after it hangs on."""
        return Link(self.seq, self.hash)

    @property
    def event(self) -> str:
        """What the log says of itself by this record; empty for a request's."""
        return str(self.fields.get("event", ""))

    def missing(self, sink: str) -> tuple[int, int] | None:
        """The first and last of the records that this one says a sink was not given."""
        first, last = self.fields.get("missing_first"), self.fields.get("missing_last")
        if self.fields.get("sink") != sink or not (type(first) is type(last) is int):
            return None
        return first, last


def encode(record: Mapping[str, Any]) -> bytes:
    """A record as JSON, without the number and the hash that `chain` puts before it."""
    return orjson.dumps(record, option=orjson.OPT_UTC_Z)


def encode_event(event: str, **fields: Any) -> bytes:
    """A record that the log writes of itself."""
    return encode({"time": datetime.now(UTC), "event": event, **fields})


def missing_fields(sink: str, first: int, last: int) -> dict[str, Any]:
    """What `Line.missing` reads."""
    return {"sink": sink, "missing_first": first, "missing_last": last}


def chain(records: Sequence[bytes], link: Link) -> tuple[bytes, Link]:
    """The lines of records (JSON objects that are not empty), and what the next one hangs on.

    This is on the hot path: number and hash are put before what is encoded already.
    """
    seq, digest = link
    lines = []
    for record in records:
        seq += 1
        line = f'{{"seq":{seq},"prev":"{digest}",'.encode() + record[1:]
        digest = sha256(line).hexdigest()
        lines.append(line)
    lines.append(b"")
    return b"\n".join(lines), Link(seq, digest)


def read_line(line: bytes) -> Line | None:
    """A line without its line feed as a record; None if it is none."""
    head = _HEAD.match(line)
    if head is None:
        return None
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return Line(int(head[1]), head[2].decode("ascii"), sha256(line).hexdigest(), fields)


@dataclass(frozen=True, slots=True)
class End:
    """How a log ends: its last whole record, and the bytes of an unfinished line after it."""

    last: Line | None
    unfinished: bytes


def read_end(descriptor: int) -> End:
    """Read a log's end; raises ChainError if its last records do not hang together.

    Only as much is read as that takes, from the end backwards.
    """
    size = os.fstat(descriptor).st_size
    window = _FIRST_WINDOW
    while True:
        start = max(0, size - window)
        data = os.pread(descriptor, size - start, start)
        if len(data) != size - start:
            raise ChainError("its end cannot be read")
        skipped = data.find(b"\n") + 1 if start else 0
        if not start or skipped:
            end = _judge_end(data[skipped:], is_whole=not start)
            if end is not None:
                return end
        if window >= _MAX_WINDOW:
            raise ChainError(f"its last {_MAX_WINDOW >> 20} MiB hold no record")
        window *= 8


def _judge_end(data: bytes, *, is_whole: bool) -> End | None:
    """The end, from the lines in `data`; None if more of the file has to be read for it."""
    stop = data.rfind(b"\n") + 1
    while stop:
        start = data.rfind(b"\n", 0, stop - 1) + 1
        text = data[start : stop - 1]
        line = read_line(text)
        if line is not None:
            before = _check_link(data, start, line, is_whole=is_whole)
            return End(line, data[stop:]) if before else None
        if _is_object(text):
            raise ChainError(f"its last line is no record of a hash chain: {_excerpt(text)}")
        stop = start
    return End(None, data) if is_whole else None


def _check_link(data: bytes, start: int, line: Line, *, is_whole: bool) -> bool:
    """Whether a record was found to follow from what stands before it; False: not in `data`."""
    if line.event == RECOVERED:
        start = _skip_unfinished(data, start, line)
    if start < 0 or (start == 0 and not is_whole):
        return False
    if start == 0:
        return True  # a file's first record follows from another file
    before = read_line(data[data.rfind(b"\n", 0, start - 1) + 1 : start - 1])
    if before is not None and line.missing(FILE) == (before.seq + 1, line.seq - 1):
        return True  # other sinks have what is between
    if before is None or before.seq + 1 != line.seq or before.hash != line.prev:
        raise ChainError(f"its last record, {line.seq}, does not follow from what is before it")
    return True


def _skip_unfinished(data: bytes, start: int, line: Line) -> int:
    """Where the unfinished bytes begin that a record of their recovery tells of."""
    size = line.fields.get("bytes")
    if not isinstance(size, int) or size < 1:
        raise ChainError(f"record {line.seq} tells of no unfinished bytes")
    begin = start - 1 - size
    if begin >= 0 and sha256(data[begin : start - 1]).hexdigest() != line.fields.get("sha256"):
        raise ChainError(f"the unfinished bytes before record {line.seq} were changed")
    return begin


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False


def _excerpt(text: bytes) -> str:
    return ascii(text[:60].decode("utf-8", "replace"))
