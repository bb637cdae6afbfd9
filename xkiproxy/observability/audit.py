"""The audit log: one JSON object a line, chained by hashes, written before the answer leaves.

It fails closed: a record that cannot be written makes the request fail, and while the log is
broken nothing is served. A torn record (a full disk in the middle of a line) is cut off again; one
that a killed server left is closed at the next start by a record of its own. Files are rotated by
size and age, and the chain goes on from one to the next. One process writes a log; a lock on the
file says so. docs/audit.md has the format.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from xkiproxy.observability.chain import (
    CLOSED,
    FILE,
    RESTARTED,
    RESUMED,
    START,
    ChainError,
    Link,
    chain,
    encode,
    encode_event,
)
from xkiproxy.observability.chainfile import ChainFile, Mirror
from xkiproxy.observability.logfiles import READ_ONLY, closed_name, closed_seq, write_hmac
from xkiproxy.observability.runfile import RunFile, run_file

__all__ = ["AuditError", "AuditLog", "AuditOptions", "Sink", "SinkState", "encode"]

_MOVE_AWAY = (
    "; it was changed, or is no log of this version: keep it for examination, move it to another"
    " folder and start again"
)


class AuditError(Exception):
    """The audit log cannot be written; the text says why and what to do."""


class SinkState(NamedTuple):
    """Whether a sink takes records, and if not, why."""

    name: str
    error: str

    @property
    def is_up(self) -> bool:
        """Whether it takes records."""
        return not self.error


class Sink(Protocol):
    """Where audit records go: a file (`AuditLog`), or that and others (`Fanout`)."""

    def append(self, records: Sequence[bytes]) -> None:
        """Take a group of records, all or none; raises AuditError."""

    def check(self) -> None:
        """Once a second: housekeeping, and try again what was broken; raises AuditError."""

    def states(self) -> list[SinkState]:
        """How it is with each place that records go to."""

    def close(self) -> None:
        """Let go of what is held."""


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """How a log is kept; 0 is no limit."""

    max_bytes: int = 256 << 20
    max_age: timedelta = timedelta(hours=24)
    fsync: bool = False
    hmac_key: bytes | None = field(default=None, repr=False)


class AuditLog:
    """Appends records to a file; the file that goes before it is closed, with its HMAC.

    Records reach the operating system before `append` returns: they outlive the process, whatever
    ends it. With `fsync` they are on the disk.
    """

    def __init__(
        self, path: Path, options: AuditOptions | None = None, mirror: Mirror | None = None
    ) -> None:
        """Open or make the file (mode 0600) and go on with its chain; raises AuditError.

        `mirror` is given every line that was written, also those that the log writes of itself.
        """
        self._path = path
        self._mirror = mirror
        self._options = options or AuditOptions()
        self._limit = self._options.max_bytes or sys.maxsize
        self._closing: str | None = None
        """The name that the file is to have: it has its last record, the rest is to be done."""
        self._run: RunFile | None = None
        """There where others have the records too."""
        self.available = True
        self.error = ""
        self._file = self._open(None, "", None)
        try:
            self._take_up_rotation()
            self._begin_run()
        except AuditError:
            self._file.close()
            raise

    def append(self, records: Sequence[bytes]) -> None:
        """Append records as `encode` made them, all or none.

        Raises:
            AuditError: none was written; the log counts as broken.
        """
        if not self.available:
            raise AuditError(self.error)
        file = self._file
        lines, link = chain(records, file.link)
        if file.size + len(lines) > self._limit and file.has_records:
            self._rotate()
            file = self._file
            lines, link = chain(records, file.link)
        try:
            file.append(lines, link)
        except OSError as error:
            raise self._broken(f"{self._path}: {error.strerror}") from None

    def check(self) -> None:
        """Once a second: rotate, follow a file that others moved, try a broken log again.

        Raises:
            AuditError: the log is broken.
        """
        if self._closing is not None:
            self._finish_rotation()
        self._look_after_file()
        if not self.available:
            self._write(RESUMED, after=self.error)
            self.available = True
            self.error = ""
        age = datetime.now(UTC) - self._file.begun
        if self._options.max_age and age > self._options.max_age and self._file.has_records:
            self._rotate()

    def states(self) -> list[SinkState]:
        """See `Sink`."""
        return [SinkState(FILE, self.error)]

    @property
    def link(self) -> Link:
        """What the next record hangs on."""
        return self._file.ahead or self._file.link

    def go_on(self, link: Link) -> None:
        """While the log is broken: others have taken the chain so far. It says so when it can."""
        self._file.ahead = link
        if self._run is not None:
            self._run.note(link)

    def close(self) -> None:
        """Close the file; its chain goes on at the next start."""
        if not self.available:
            with suppress(AuditError):  # once more: what broke it may be mended since the last try
                self.check()
        if self._run is not None:
            self._run.close(is_in_order=self._file.ahead is None)
        self._file.close()  # last: the next run may begin

    def _write(self, event: str, **fields: Any) -> None:
        """A record of the log's own: it may pass the size, since it says why."""
        try:
            self._file.append_event(event, **fields)
        except OSError as error:
            raise self._broken(f"{self._path}: {error.strerror}") from None
        if self._run is not None:
            self._run.note(START)  # the file has come as far as the chain

    def _begin_run(self) -> None:
        """Say that the last run was not ended in order; leave what tells of this one."""
        left = run_file(self._path)
        try:
            was_left = left.exists()
            if self._mirror is not None:
                self._run = RunFile(self._path)
            if was_left:
                self._say_restarted()
            if self._mirror is None:
                left.unlink(missing_ok=True)
        except OSError as error:
            raise AuditError(f"{left}: {error.strerror}") from None

    def _say_restarted(self) -> None:
        """Before any record that may have a number for the second time, wherever that goes."""
        try:
            self._write(RESTARTED)
        except AuditError:
            if self._mirror is None:
                raise
            lines, link = chain([encode_event(RESTARTED)], self.link)
            self._mirror(lines, link)
            self.go_on(link)

    def _broken(self, text: str) -> AuditError:
        self.available = False
        self.error = text
        return AuditError(text)

    def _rotate(self) -> None:
        now = datetime.now(UTC)
        name = closed_name(self._path, now, self._file.link.seq + 1)
        has_hmac = self._options.hmac_key is not None
        self._write(CLOSED, file=name, hmac=has_hmac)
        self._closing = name
        self._finish_rotation()

    def _take_up_rotation(self) -> None:
        """Finish what a killed server had begun: the file has its last record already."""
        last = self._file.last
        if last is None or last.event != CLOSED:
            return
        name = str(last.fields.get("file"))
        if closed_seq(self._path, name) != last.seq:
            raise AuditError(f"{self._path}: its last record names no file of this log{_MOVE_AWAY}")
        self._closing = name
        self._finish_rotation()

    def _finish_rotation(self) -> None:
        """From the last record on; each step may be done again after a failure or a kill."""
        target = self._path.with_name(self._closing or "")
        try:
            if not self._is_moved():
                if self._file.mac is not None:
                    digest = self._file.mac.hexdigest()
                    write_hmac(target, digest, fsync=self._options.fsync)
                self._path.rename(target)
                # It holds all that it will; whether its mode can be changed matters less.
                with suppress(OSError):
                    os.fchmod(self._file.descriptor, READ_ONLY)
        except OSError as error:
            raise self._broken(f"{target}: {error.strerror}") from None
        self._closing = None
        self._reopen()

    def _look_after_file(self) -> None:
        try:
            if self._is_moved():
                self._reopen()
                return
            self._file.repair()
            if self._file.is_shortened():
                # Others copied and emptied it; what they leave in it decides.
                self._file.settle(self._file.link, "")
        except OSError as error:
            raise self._broken(f"{self._path}: {error.strerror}") from None
        except ChainError as error:
            raise self._broken(f"{self._path}: {error}{_MOVE_AWAY}") from None

    def _is_moved(self) -> bool:
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(self._file.descriptor))
        except FileNotFoundError:
            return True

    def _reopen(self) -> None:
        try:
            file = self._open(self._file.link, self._file.name(), self._file.ahead)
        except AuditError as error:
            raise self._broken(str(error)) from None
        self._file.close()
        self._file = file

    def _open(self, link: Link | None, previous: str, ahead: Link | None) -> ChainFile:
        path, options = self._path, self._options
        try:
            return ChainFile(
                path,
                link,
                previous,
                ahead=ahead,
                hmac_key=options.hmac_key,
                fsync=options.fsync,
                mirror=self._mirror,
            )
        except BlockingIOError:
            raise AuditError(f"{path}: another process writes this audit log") from None
        except OSError as error:
            raise AuditError(f"{path}: {error.strerror}") from None
        except ChainError as error:
            raise AuditError(f"{path}: {error}{_MOVE_AWAY}") from None
