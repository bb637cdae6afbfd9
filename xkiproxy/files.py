"""Files that outlive a power cut, and are never seen half written: what they need of the system."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def replacing(path: Path, *, durable: bool) -> Iterator[TextIO]:
    """A new file of mode 0600 to write, which takes the place of `path` once the block has ended.

    Nothing changes if the block raises. `durable`: the new file is on the disk before it returns.
    Raises OSError.
    """
    # mkstemp makes files of mode 0600.
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise
    if durable:
        sync_directory(path.parent)


@contextmanager
def locked(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Keep others that lock this directory out, in this process and in others.

    Raises:
        BlockingIOError: another has the lock, and it is not to `wait`.
        OSError: the directory cannot be opened.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)  # which unlocks it


def sync_directory(directory: Path) -> None:
    """Let the names in a directory outlive a power cut; raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
