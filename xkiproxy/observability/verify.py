"""Verifying the audit log: line by line, with one look back, and a name for what is wrong.

Where a line does not follow from the one before it, the lines around say why: a record whose
successor has another hash for it was changed; a number that comes twice was inserted; one that
comes early and is missing later was moved; one that never comes was removed.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from xkiproxy.observability.chain import CLOSED, RECOVERED, START, Line, Link, read_line
from xkiproxy.observability.logfiles import hmac_file, new_hmac, read_hmac, split_name

_MAX_LINE = 64 << 20
_MAX_PROBLEMS = 1000
_LOOK_BACK = 64
"""Lines that may stand between a whole record and the record of a recovery."""

_WAIT_SECONDS = 0.1
_REPORT_LINES = 1 << 16


class Place(NamedTuple):
    """A line of a file."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Problem(NamedTuple):
    """What is wrong, and where; `line` is 0 where it is the whole file."""

    place: Place
    kind: str
    text: str

    def __str__(self) -> str:
        where = self.place if self.place.line else self.place.file
        return f"{where}: {self.kind}: {self.text}"


class _State(NamedTuple):
    """What is known before a line."""

    link: Link | None
    """What the line is to hang on; None where nothing is known of it."""

    place: Place | None
    """Where the last record stands."""

    is_known_wrong: bool
    """The last record was changed, which has been said: what its successor holds is no news."""

    broken: tuple[tuple[Place, str], ...]
    """Lines since then that are no records."""


class _Stray(NamedTuple):
    """A record that stood before its turn, and what was expected in its place."""

    line: Line
    place: Place


@dataclass(slots=True)
class ChainReport:
    """What was found in the files of one chain."""

    name: str
    files: list[Path] = field(default_factory=list)
    records: int = 0
    first_seq: int = 0
    last: Link = START
    problems: list[Problem] = field(default_factory=list)
    unlisted: int = 0
    """Problems beyond those that are listed."""
    notes: list[str] = field(default_factory=list)

    def add(self, place: Place, kind: str, text: str) -> None:
        """Note a problem; of a log that is wrong all over, the first thousand."""
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(Problem(place, kind, text))
        else:
            self.unlisted += 1

    @property
    def problem_count(self) -> int:
        """How many problems there are."""
        return len(self.problems) + self.unlisted


class ChainVerifier:
    """Takes the lines of a chain's files one after the other."""

    def __init__(self, report: ChainReport) -> None:
        self.report = report
        self._state = _State(None, None, False, ())
        self._stray: _Stray | None = None
        self._before_stray = self._state
        self._twin = ""
        """The hash of a record that may be the true one of two with the same number."""
        self._history: deque[tuple[bytes, _State, int]] = deque(maxlen=_LOOK_BACK)
        self._is_unfinished = False

    def begin_file(self) -> None:
        """What follows is in another file."""
        self._history.clear()

    def take(self, raw: bytes, place: Place) -> Line | None:
        """Take a line with its line feed."""
        line = read_line(raw[:-1]) if raw.endswith(b"\n") else None
        report = self.report
        if line is None:
            self._history.append((raw, self._state, report.problem_count))
            what = "unfinished" if not raw.endswith(b"\n") else "changed"
            state = self._state
            self._state = state._replace(broken=(*state.broken[:_LOOK_BACK], (place, what)))
            return None
        if line.event == RECOVERED:
            self._forgive(line, place)
        self._history.append((raw, self._state, report.problem_count))
        state, report.records = self._state, report.records + 1
        link = state.link
        if (
            link is not None
            and not state.broken
            and line.seq == link.seq + 1
            and (line.prev == link.hash or state.is_known_wrong or line.prev == self._twin)
        ):
            self._go_on(line, place)
        else:
            self._judge(line, place)
        return line

    def end_file(self) -> None:
        """The file is over: an unfinished line stays one."""
        self._report_broken(None)

    def end(self) -> None:
        """All files are over."""
        self.end_file()
        if self._stray is not None:
            self._drop_stray()

    def _go_on(self, line: Line, place: Place, *, is_known_wrong: bool = False) -> None:
        self._state = _State(line.link, place, is_known_wrong, ())
        self._twin = ""
        self.report.last = line.link
        stray = self._stray
        if stray is not None and stray.line.seq == line.seq + 1:
            # Its turn has come: the next line says whether it is the one that is missing here.
            self._before_stray = self._state

    def _judge(self, line: Line, place: Place) -> None:
        """A line that does not simply follow."""
        link = self._state.link
        if link is None:
            self._begin(line, place)
            return
        broken = self._state.broken
        expected = link.seq + 1
        if broken:
            replaced = line.seq == expected + len(broken)
            self._report_broken(line)
            if replaced:
                self._go_on(line, place)
                return
        if line.seq == expected:
            self._judge_hash(line, place, link)
        elif line.prev == link.hash:
            self._judge_number(line, place, expected)
        elif line.seq > expected:
            self._judge_early(line, place, expected)
        else:
            self._judge_late(line, place, expected)

    def _begin(self, line: Line, place: Place) -> None:
        """The first record that there is."""
        self._report_broken(line)
        self.report.first_seq = line.seq
        if line.seq == 1 and line.prev != START.hash:
            self.report.add(place, "changed", "record 1 hangs on a record before it")
        elif line.seq > 1:
            self.report.notes.append(
                f"begins with record {line.seq}: what was before it is not in these files"
            )
        self._go_on(line, place)

    def _judge_hash(self, line: Line, place: Place, link: Link) -> None:
        """The number is right, the hash is not."""
        if self._state.broken or self._state.is_known_wrong or line.prev == self._twin:
            self._go_on(line, place)
            return
        changed = self._state.place or place
        self.report.add(changed, "changed", f"record {link.seq} is not what record {line.seq} hangs on")
        self._go_on(line, place)
