"""Beside the file of a log that has sinks, while it runs: `audit.jsonl.run`.

Sinks may hold records that the file has not: it could not be written and any of them was enough, or
a power cut took its end away. A run that ends in order has all in the file and removes this one. A
start that finds it says so in the chain, before the numbers of such records come a second time.

It holds how far the chain has come without its file, so that the next start goes on from there. The
place for that is taken while there is room: a full disk does not keep it from being written over.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from xkiproxy.observability.chain import START, Link

_LINE = re.compile(rb"([0-9]{19}) ([0-9a-f]{64})\n")


def run_file(path: Path) -> Path:
    """Where it is for a log."""
    return path.with_name(f"{path.name}.run")


def read_run(path: Path) -> Link:
    """How far a log's chain had come when its run was ended, as far as is known; raises OSError."""
    try:
        found = _LINE.match(run_file(path).read_bytes())
    except FileNotFoundError:
        return START
    return START if found is None else Link(int(found[1]), found[2].decode("ascii"))


class RunFile:
    """Is there while a log runs."""

    def __init__(self, path: Path) -> None:
        """Make it, or go on with the one that is there; raises OSError."""
        self._path = run_file(path)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not os.fstat(self._descriptor).st_size:
            self.note(START)

    def note(self, link: Link) -> None:
        """The chain has come so far without its file.

        Where that cannot be written either, the next start knows no more than that it is there.
        """
        with suppress(OSError):
            os.pwrite(self._descriptor, f"{link.seq:019} {link.hash}\n".encode(), 0)

    def close(self, *, is_in_order: bool) -> None:
        """End the run: with all of the chain in the file, or not."""
        os.close(self._descriptor)
        if is_in_order:
            with suppress(OSError):
                self._path.unlink()
