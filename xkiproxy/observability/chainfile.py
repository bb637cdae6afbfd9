"""One file of the audit log's chain: opened where it ends, locked, written in groups."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from hmac import HMAC
from pathlib import Path
from typing import Any

from xkiproxy.files import sync_directory
from xkiproxy.observability.chain import (
    FILE,
    OPENED,
    RECOVERED,
    START,
    ChainError,
    End,
    Line,
    Link,
    chain,
    encode_event,
    missing_fields,
    read_end,
    read_line,
)
from xkiproxy.observability.logfiles import find_previous, new_hmac
from xkiproxy.observability.runfile import read_run

_BLOCK = 1 << 20
_FIRST_LINE = 1 << 16

Mirror = Callable[[bytes, Link], None]
"""Given the lines that were written, and the link of the last; it raises nothing."""


class ChainFile:
    """A file that records are appended to; it raises OSError and ChainError."""

    def __init__(
        self,
        path: Path,
        known: Link | None,
        previous: str,
        *,
        ahead: Link | None = None,
        hmac_key: bytes | None,
        fsync: bool,
        mirror: Mirror | None = None,
    ) -> None:
        """Open or make the file (mode 0600) and go on where it ends.

        `known` is what the last record of the caller's files is, and `previous` the file before
        this one, where the caller has written a file already; else what is found on the disk
        decides. `ahead` is where the chain has come to without its file.
        """
        self.path = path
        self.ahead = ahead
        self._mirror = mirror
        self.size = 0
        self.link = START
        self.mac: HMAC | None = None
        """Fed with what was in the file when it was opened and with what is written since."""
        self.last: Line | None = None
        """The last whole record at the time when the file was opened."""
        self.begun = datetime.now(UTC)
        self._first = 0
        self._fsync = fsync
        self._hmac_key = hmac_key
        self._is_torn = False
        self.descriptor = _open_locked(path)
        try:
            if known is None:
                self.ahead = read_run(path)
            self.settle(known, previous)
            if fsync:
                sync_directory(path.parent)  # its name too outlives a power cut
        except BaseException:
            os.close(self.descriptor)
            raise

    @property
    def has_records(self) -> bool:
        """Whether there is more in it than the record that opened it."""
        return self.link.seq > self._first

    def settle(self, known: Link | None, previous: str) -> None:
        """Take the file as it is: find its end, close an unfinished line, carry the chain over."""
        end = read_end(self.descriptor)
        if end.last is not None:
            if known is not None and end.last.link != known:
                raise ChainError(
                    f"it ends with record {end.last.seq}, not with what was written last,"
                    f" record {known.seq}"
                )
            known = end.last.link
        elif known is None:
            known, previous = find_previous(self.path)
        self.last, self.link = end.last, known
        if self.ahead is not None and self.ahead.seq <= known.seq:
            self.ahead = None  # the file has come further
        self.size = os.fstat(self.descriptor).st_size
        self._read_beginning()
        self._feed_hmac()
        self._write_beginning(end, previous)

    def append(self, lines: bytes, link: Link) -> None:
        """Append lines as `chain` made them, all or none; raises OSError."""
        written = 0
        try:
            written = os.write(self.descriptor, lines)
            if written != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._fsync:
                os.fdatasync(self.descriptor)
        except OSError:
            if written:
                self._cut()
            raise
        self.size += written
        self.link = link
        if self.mac is not None:
            self.mac.update(lines)
        if self._mirror is not None:
            self._mirror(lines, link)

    def append_event(self, event: str, **fields: Any) -> None:
        """Append a record of the log's own; it names what the file has missed. Raises OSError."""
        self._append_event(b"", event, fields)

    def _append_event(self, before: bytes, event: str, fields: dict[str, Any]) -> None:
        link = self.ahead or self.link
        if self.ahead is not None:
            fields = {**fields, **missing_fields(FILE, self.link.seq + 1, self.ahead.seq)}
        lines, link = chain([encode_event(event, **fields)], link)
        self.append(before + lines, link)
        self.ahead = None

    def repair(self) -> None:
        """Cut off what a failed write has left and could not be cut off then; raises OSError."""
        if self._is_torn:
            os.ftruncate(self.descriptor, self.size)
            self._is_torn = False

    def is_shortened(self) -> bool:
        """Whether others have cut off a part of it."""
        return os.fstat(self.descriptor).st_size < self.size

    def name(self) -> str:
        """The name that the file has now; empty if the system does not say."""
        try:
            return Path(f"/proc/self/fd/{self.descriptor}").readlink().name
        except OSError:
            return ""

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def _cut(self) -> None:
        try:
            os.ftruncate(self.descriptor, self.size)
        except OSError:
            self._is_torn = True

    def _read_beginning(self) -> None:
        """When the file was begun, and what its records follow: the one that opened it, if any."""
        self.begun, self._first = datetime.now(UTC), self.link.seq
        first = read_line(os.pread(self.descriptor, _FIRST_LINE, 0).partition(b"\n")[0])
        if first is not None:
            self._first = first.seq if "previous" in first.fields else first.seq - 1
            try:
                self.begun = datetime.fromisoformat(str(first.fields.get("time")))
            except ValueError:
                return

    def _feed_hmac(self) -> None:
        """Take what is in the file as it is: what was changed while no server ran is not known.

        The state of an HMAC cannot be kept from one run to the next. docs/audit.md says what tells.
        """
        if self._hmac_key is None:
            return
        self.mac = new_hmac(self._hmac_key)
        for offset in range(0, self.size, _BLOCK):
            self.mac.update(os.pread(self.descriptor, min(_BLOCK, self.size - offset), offset))

    def _write_beginning(self, end: End, previous: str) -> None:
        """The record that says what was found in the file, if there is something to say."""
        from_file = {"previous": previous} if end.last is None and self.link != START else {}
        if end.unfinished:
            digest = sha256(end.unfinished).hexdigest()
            size = len(end.unfinished)
            found = {"bytes": size, "sha256": digest, **from_file}
            self._append_event(b"\n", RECOVERED, found)
        elif from_file:
            self.append_event(OPENED, **from_file)
            self._first = self.link.seq


def _open_locked(path: Path) -> int:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(path.stat(), os.fstat(descriptor)):
            # Another process has just closed this file and goes on in the next.
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
