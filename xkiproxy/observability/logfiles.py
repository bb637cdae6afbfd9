"""The files of the audit log: how they are named, which belong together, and their HMACs.

The file in use is `audit.jsonl`. A closed one is `audit-20260131T235959Z-41234.jsonl`: when it was
closed and the number of its last record. Others may have moved a file to `audit.jsonl.1` or
`audit.jsonl-20260131`. A worker process has files of its own: `audit-2.jsonl` and so on.
"""

from __future__ import annotations

import hmac
import os
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from xkiproxy.observability.chain import START, ChainError, Link, read_end

READ_ONLY = 0o400

_CLOSED = r"-\d{8}T\d{6}Z-(?P<seq>\d+)"
_MOVED = r"(?:\.\d+|-\d{8,})"


def closed_name(path: Path, time: datetime, seq: int) -> str:
    """The name of a file that is closed with record `seq`."""
    return f"{path.stem}-{time:%Y%m%dT%H%M%SZ}-{seq}{path.suffix}"


def closed_seq(path: Path, name: str) -> int | None:
    """The number in a closed file's name; None if it is no such name of this log."""
    match = re.fullmatch(f"{re.escape(path.stem)}{_CLOSED}{re.escape(path.suffix)}", name)
    return None if match is None else int(match["seq"])


def split_name(name: str) -> tuple[str, bool]:
    """The name that a file had when it was in use, and whether the log itself closed it."""
    path = Path(re.sub(rf"{_MOVED}$", "", name))
    bare = re.sub(rf"{_CLOSED}$", "", path.stem)
    return bare + path.suffix, bare != path.stem


def log_files(path: Path, *, with_workers: bool = False) -> list[Path]:
    """The files of a log, in no order; `with_workers`: those of all worker processes too."""
    worker = r"(?:-\d{1,2})?" if with_workers else ""
    stem, suffix = re.escape(path.stem) + worker, re.escape(path.suffix)
    pattern = re.compile(f"{stem}(?:{_CLOSED}{suffix}|{suffix}{_MOVED}?)")
    try:
        found = [file for file in path.parent.iterdir() if pattern.fullmatch(file.name)]
    except FileNotFoundError:
        return []
    return [file for file in found if file.is_file()]


def find_previous(path: Path) -> tuple[Link, str]:
    """What a new file goes on from: the end of the log's last file, and its name.

    Raises:
        ChainError: the last closed file does not end as a chain does.
        OSError: it cannot be read.
    """
    link, name = START, ""
    own: tuple[int, Path] | None = None
    for file in log_files(path):
        seq = closed_seq(path, file.name)
        if seq is not None:
            own = max(own or (0, file), (seq, file))
        elif file != path:
            with suppress(ChainError, OSError):  # moved by others: it may be anything
                link, name = max((link, name), (_end_of(file), file.name))
    if own is not None:
        link, name = max((link, name), (_end_of(own[1]), own[1].name))
        if name == own[1].name:
            own[1].chmod(READ_ONLY)  # the server may have been killed before it did so
    return link, name


def _end_of(file: Path) -> Link:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = read_end(descriptor)
    except ChainError as error:
        raise ChainError(f"{file}: {error}") from None
    finally:
        os.close(descriptor)
    return START if end.last is None else end.last.link


def hmac_file(path: Path) -> Path:
    """Where the HMAC of a closed file stands."""
    return path.with_name(f"{path.name}.hmac")


def write_hmac(path: Path, digest: str, *, fsync: bool) -> None:
    """Write the HMAC of a closed file beside it, whole or not at all."""
    target = hmac_file(path)
    draft = target.with_name(f".{target.name}.draft")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, READ_ONLY)
    with os.fdopen(descriptor, "wb") as file:
        file.write(f"{digest}  {path.name}\n".encode())
        file.flush()
        if fsync:
            os.fsync(descriptor)
    draft.replace(target)


def read_hmac(path: Path) -> str | None:
    """The HMAC that stands beside a closed file; None if there is none. Raises OSError."""
    try:
        text = hmac_file(path).read_bytes()[:65]
    except FileNotFoundError:
        return None
    return text.split(b" ")[0].strip().decode("ascii", "replace")


def new_hmac(key: bytes) -> hmac.HMAC:
    """An HMAC-SHA256 to feed a file to."""
    return hmac.new(key, digestmod="sha256")
