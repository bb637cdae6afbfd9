"""The audit log: one JSON object a line, written before the answer leaves.

It fails closed: a record that cannot be written makes the request fail, and while the log is
broken nothing is served. A torn record (a full disk in the middle of a line) is cut off again, so
that the log stays parsable line by line. One process writes a log; a lock on the file says so.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson


class AuditError(Exception):
    """The audit log cannot be written; the text says why and what to do."""


def encode(record: Mapping[str, Any]) -> bytes:
    """A record as its line."""
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z)


class AuditLog:
    """Appends records to a file.

    Records reach the operating system before `append` returns: they outlive the process, whatever
    ends it. Flushing them to the disk is left to the operating system.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the file (mode 0600); raises AuditError."""
        self._path = path
        self._descriptor = _open(path)
        self._size = os.fstat(self._descriptor).st_size
        self.available = True
        self.error = ""

    def append(self, lines: bytes) -> None:
        """Append records as `encode` made them, all or none.

        Raises:
            AuditError: none was written; the log counts as broken.
        """
        try:
            written = os.write(self._descriptor, lines)
            if written != len(lines):
                os.ftruncate(self._descriptor, self._size)
                raise OSError(28, "No space left on device")
        except OSError as error:
            self.available = False
            self.error = f"{self._path}: {error.strerror}"
            raise AuditError(self.error) from None
        self._size += written

    def check(self) -> None:
        """Once a second: follow a rotated file, and try a broken log again; raises AuditError."""
        if self._is_moved():
            self._reopen()
        if not self.available:
            lost = self.error
            event = {"time": datetime.now(UTC), "event": "audit_resumed", "after": lost}
            self.append(encode(event))
            self.available = True
            self.error = ""

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _is_moved(self) -> bool:
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            return True
        except OSError as error:
            self.available = False
            self.error = f"{self._path}: {error.strerror}"
            raise AuditError(self.error) from None

    def _reopen(self) -> None:
        try:
            descriptor = _open(self._path)
        except AuditError as error:
            self.available = False
            self.error = str(error)
            raise
        os.close(self._descriptor)
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise AuditError(f"{path}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _end_last_line(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        raise AuditError(f"{path}: another process writes this audit log") from None
    except OSError as error:
        os.close(descriptor)
        raise AuditError(f"{path}: {error.strerror}") from None
    return descriptor


def _end_last_line(descriptor: int) -> None:
    """A record torn by a power cut stays as it is; the next one begins on a line of its own."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")
