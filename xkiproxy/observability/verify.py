"""Verifying the audit log: line by line, with one look back, and a name for what is wrong.

Where a line does not follow from the one before it, the lines around say why: a record whose
successor has another hash for it was changed; a number that comes twice was inserted; one that
comes early and is missing later was moved; one that never comes was removed.

What another sink than the file has stored is verified in the same way, with three differences: the
same record may come again (a connection that broke), it may begin anywhere, and it may have records
that the file lost with the run that wrote them: the next run begins where the file ends.
"""

from __future__ import annotations

import hmac
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from xkiproxy.observability.chain import (
    CLOSED,
    FILE,
    OPENED,
    RECOVERED,
    RESTARTED,
    START,
    Line,
    Link,
    read_line,
)
from xkiproxy.observability.logfiles import (
    closed_seq,
    hmac_file,
    new_hmac,
    read_hmac,
    split_name,
)

_MAX_LINE = 64 << 20
_MAX_PROBLEMS = 1000
_LOOK_BACK = 64
"""Lines that may stand between a whole record and the record of a recovery."""

_COPIES = 1 << 18
"""Records back from which one may be sent again: more than the largest buffer of a sink holds."""

_MAX_TWINS = 7
"""Of so many records with the same number copies are known."""

_BEGINNINGS = {OPENED, RECOVERED, RESTARTED}
"""The first record of a run is one of these, where the one before was not ended in order."""

_LISTED = 10

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

    link: Link | None = None
    """What the line is to hang on; None where nothing is known of it."""

    place: Place | None = None
    """Where the last record stands."""

    is_wrong: bool = False
    """The last record was changed, which has been said: that its successor disagrees is no news."""

    broken: tuple[Place, ...] = ()
    """Lines since then that are no records."""

    def is_followed_by(self, line: Line) -> bool:
        """Whether a record is the next one, and agrees on the one before it."""
        link = self.link
        return link is not None and line.seq == link.seq + 1 and line.prev == link.hash


class _Early(NamedTuple):
    """A record that stands before its turn: what should be between is missing, or comes later."""

    before: _State
    line: Line
    place: Place


@dataclass(slots=True)
class _Gap:
    """Records that are missing, and those of them that came late."""

    first: int
    last: int
    place: Place
    late: int = 0


class _Amendment(NamedTuple):
    """What the last problem becomes if the next record has this hash for the one before it."""

    hash: str
    problem: Problem


class _Before(NamedTuple):
    """A line, and what was known before it: if it is forgiven, it has told nothing."""

    raw: bytes
    state: _State
    early: _Early | None
    amendment: _Amendment | None
    problems: int
    records: int


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

    def amend(self, problem: Problem) -> None:
        """Say the last problem in another way."""
        if not self.unlisted:
            self.problems[-1] = problem

    @property
    def problem_count(self) -> int:
        """How many problems there are."""
        return len(self.problems) + self.unlisted


class ChainVerifier:
    """Takes the lines of a chain's files one after the other."""

    def __init__(self, report: ChainReport, sink: str, copies: _Copies) -> None:
        """`sink`: whose records they are; `copies`: what came before, of all but the file."""
        self.report = report
        self._sink = sink
        self._copies = copies
        self._restarts: list[int] = []
        """Records with which a run began after one that was not ended in order."""
        self._told: list[tuple[int, int]] = []
        """Records that the sink was not given, as the chain says."""
        self._state = _State()
        self._early: _Early | None = None
        self._moved: dict[int, tuple[str, Place]] = {}
        """Records that stood before their turn, by number: their hashes and places."""
        self._met: tuple[int, tuple[str, Place]] | None = None
        """The one of these that the last line has settled."""
        self._gaps: list[_Gap] = []
        self._late = ""
        self._amendment: _Amendment | None = None
        self._history: deque[_Before] = deque(maxlen=_LOOK_BACK)

    def begin_file(self) -> None:
        """What follows is in another file."""
        self._history.clear()

    def take(self, raw: bytes, place: Place) -> Line | None:
        """Take a line with its line feed; what it is as a record."""
        line = read_line(raw[:-1]) if raw.endswith(b"\n") else None
        if line is not None and line.event == RECOVERED and self._sink == FILE:
            self._forgive(line, place)
        report, state = self.report, self._state
        before = state, self._early, self._amendment, len(report.problems), report.records
        self._history.append(_Before(raw, *before))
        self._met = None
        if line is None:
            self._state = state._replace(broken=(*state.broken[:_LOOK_BACK], place))
            return None
        report.records += 1
        told = line.missing(self._sink)
        if told is not None:
            self._told.append(told)
        if line.event == RESTARTED:
            self._restarts.append(line.seq)
        if self._early is None and not state.broken and state.is_followed_by(line):
            self._go_on(line, place)
        else:
            self._judge(line, place, raw)
        return line

    def end_file(self) -> None:
        """The file is over: an unfinished line stays one."""
        # A file without lines leaves what the one before it ended in as it is.
        if self._state.broken and self._history and not self._history[-1].raw.endswith(b"\n"):
            *broken, place = self._state.broken
            self._state = self._state._replace(broken=tuple(broken))
            text = "the last line has no end: it is being written, or the server was killed"
            self.report.add(place, "unfinished", text)

    def end(self) -> None:
        """All files are over."""
        self.report.last = self._end_branch()
        if self._restarts and self._sink == FILE:
            self.report.notes.append(_restarted(self._restarts))

    def _end_branch(self) -> Link:
        """Nothing more comes that hangs on these records; the last one."""
        for place in self._state.broken:
            self.report.add(place, "changed", "the line is no record")
        self._settle_early()
        last = self._state.link or START
        for seq, (digest, place) in sorted(self._moved.items()):
            if seq == last.seq + 1:
                last = Link(seq, digest)
                self._add_reordered(place, seq)
            else:
                self._add_second(place, seq)
        for gap in self._gaps:
            if gap.late <= gap.last - gap.first:
                self._add_missing(gap)
        return last

    def _go_on(self, line: Line, place: Place, *, is_wrong: bool = False) -> None:
        if self._moved:
            self._meet_moved(line)
        self._state = _State(line.link, place, is_wrong)
        self._amendment = None

    def _judge(self, line: Line, place: Place, raw: bytes) -> None:
        """A record that does not simply follow."""
        if self._is_new_run(line):
            self._begin_run(line, place)
            return
        early = self._early
        if early is not None:
            if early.before.is_followed_by(line):
                # What was missing comes now: the early record alone is out of its place.
                self._moved[early.line.seq] = (early.line.hash, early.place)
                self._early, self._state = None, early.before
            else:
                self._settle_early()
        if self._state.broken and self._judge_broken(line):
            self._go_on(line, place)
            return
        state = self._state
        if state.link is None:
            self._begin(line, place)
        elif (
            state.is_followed_by(line)
            or (line.seq == state.link.seq + 1 and state.is_wrong)
            or self._is_after_moved(line, state.link)
        ):
            self._go_on(line, place)
        else:
            self._judge_wrong(line, place, raw, state.link)

    def _is_new_run(self, line: Line) -> bool:
        """Whether it has numbers anew, as the file had not what was given to this sink."""
        last = self._state.link
        return (
            self._sink != FILE
            and last is not None
            and line.event in _BEGINNINGS
            and line.seq <= last.seq
            and self._copies.may_precede(line)
        )

    def _begin_run(self, line: Line, place: Place) -> None:
        last = self._end_branch()
        self._moved.clear()
        self._gaps.clear()
        self.report.notes.append(
            f"{place}: {_records(line.seq, last.seq)} before this line are of a run that was ended"
            " before the file had them: the next one gives their numbers anew"
        )
        self._go_on(line, place)

    def _begin(self, line: Line, place: Place) -> None:
        """The first record that there is."""
        self.report.first_seq = line.seq
        if line.seq == 1 and line.prev != START.hash:
            self.report.add(place, "changed", "record 1 hangs on another before it")
        elif line.seq > 1 and not self._may_begin(line):
            text = f"what was before record {line.seq} is missing: it does not begin a file"
            self.report.add(place, "removed", text)
        elif line.seq > 1:
            text = f"begins with record {line.seq}: what was before it is not in these files"
            self.report.notes.append(text)
        self._go_on(line, place)

    def _may_begin(self, line: Line) -> bool:
        """Whether there may be none before it: in another file, or with other sinks alone."""
        is_told = line.missing(FILE) == (1, line.seq - 1)
        return self._sink != FILE or is_told or "previous" in line.fields

    def _judge_wrong(self, line: Line, place: Place, raw: bytes, link: Link) -> None:
        """A record whose number or hash is not the next one."""
        amendment, expected = self._amendment, link.seq + 1
        if amendment is not None and line.prev == amendment.hash:
            self.report.amend(amendment.problem)
            self._go_on(line, place)
        elif line.seq == expected:
            self._add_changed(line, place, raw, link)
        elif line.prev == link.hash:
            text = f"record {expected} has number {line.seq}"
            self.report.add(place, "changed", text)
            self._go_on(line._replace(seq=expected), place, is_wrong=True)
        elif line.seq > expected:
            self._early = _Early(self._state, line, place)
            self._state = _State(line.link, place)
            self._amendment = None
        else:
            self._judge_late(line, place, link)

    def _add_changed(self, line: Line, place: Place, raw: bytes, link: Link) -> None:
        """The number is right, the hash is not: the record before was changed, or this one's hash.

        The next record tells: if it agrees with this one as it would be with the right hash, then
        nothing but the hash was changed.
        """
        text = f"record {link.seq} is not what it was when record {line.seq} was written"
        self.report.add(self._state.place or place, "changed", text)
        self._go_on(line, place)
        mended = raw[:-1].replace(line.prev.encode("ascii"), link.hash.encode("ascii"), 1)
        text = f"record {line.seq} has a wrong hash of the record before it"
        problem = Problem(place, "changed", text)
        self._amendment = _Amendment(sha256(mended).hexdigest(), problem)

    def _judge_late(self, line: Line, place: Place, link: Link) -> None:
        """A number that was there already, or was missing."""
        for gap in self._gaps:
            if gap.first <= line.seq <= gap.last:
                gap.late += 1
                if line.prev != self._late:  # else it goes on from another late one: said already
                    self._add_reordered(place, line.seq)
                self._late = line.hash
                return
        self._add_second(place, line.seq)
        if line.seq == link.seq and self._state.place is not None:
            # Which of the two is the true one, the next record says.
            problem = Problem(self._state.place, "inserted", _second(line.seq))
            self._amendment = _Amendment(line.hash, problem)

    def _judge_broken(self, line: Line) -> bool:
        """Say what became of lines that are no records; True: `line` follows them."""
        broken, link = self._state.broken, self._state.link
        self._state = self._state._replace(broken=())
        follows = self._state.is_followed_by(line)
        kind = "inserted" if follows else "changed"
        for place in broken:
            self.report.add(place, kind, "the line is no record")
        return link is not None and link.seq + 1 < line.seq <= link.seq + 1 + len(broken)

    def _settle_early(self) -> None:
        """What should have stood before an early record is missing."""
        early, self._early = self._early, None
        if early is not None and early.before.link is not None:
            first = early.before.link.seq + 1
            self._gaps.append(_Gap(first, early.line.seq - 1, early.place))

    def _is_after_moved(self, line: Line, link: Link) -> bool:
        """Whether the record in between is one that stood before its turn."""
        moved = self._moved.get(link.seq + 1)
        if moved is None or line.seq != link.seq + 2 or line.prev != moved[0]:
            return False
        self._met = link.seq + 1, self._moved.pop(link.seq + 1)
        self._add_reordered(moved[1], link.seq + 1)
        return True

    def _meet_moved(self, line: Line) -> None:
        """A record that stood before its turn stands at its place too: the early one is a copy."""
        moved = self._moved.pop(line.seq, None)
        if moved is not None:
            self._met = line.seq, moved
            self._add_second(moved[1], line.seq)

    def _add_reordered(self, place: Place, seq: int) -> None:
        self.report.add(place, "reordered", f"record {seq} stands in another place than its own")

    def _add_second(self, place: Place, seq: int) -> None:
        self.report.add(place, "inserted", _second(seq))

    def _add_missing(self, gap: _Gap) -> None:
        if any(first <= gap.first and gap.last <= last for first, last in self._told):
            text = f"{gap.place}: {_missing(gap)}: as the log says, {self._sink} was not given them"
            self.report.notes.append(text)
        else:
            self.report.add(gap.place, "removed", _missing(gap))

    def _forgive(self, line: Line, place: Place) -> None:
        """Unfinished bytes that a record of their recovery tells of are no problem.

        One of them may be a record that lacked its line feed alone. All that it has told is
        forgotten, not only what was wrong with it: the record of the recovery has its number and
        tells the same of the lines before.
        """
        size, region = line.fields.get("bytes"), b""
        for before in reversed(self._history):
            region = before.raw + region
            if len(region) - 1 == size:
                if sha256(region[:-1]).hexdigest() == line.fields.get("sha256"):
                    self._go_back(before)
                    return
                break
        text = "the unfinished bytes before it are not those that it tells of"
        self.report.add(place, "changed", text)

    def _go_back(self, before: _Before) -> None:
        """Only the last line may have been a record: what it met is still to be met."""
        self._state, self._early, self._amendment = before.state, before.early, before.amendment
        if self._met is not None:
            self._moved[self._met[0]] = self._met[1]
        del self.report.problems[before.problems :]
        self.report.records = before.records


def _missing(gap: _Gap) -> str:
    verb = "is" if gap.first == gap.last else "are"
    return f"{_records(gap.first, gap.last)} {verb} missing before this line"


def _records(first: int, last: int) -> str:
    return f"record {first}" if first == last else f"records {first} to {last}"


def _restarted(numbers: list[int]) -> str:
    listed = ", ".join(map(str, numbers[:_LISTED]))
    more = f" and {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else ""
    return (
        f"the run before record {listed}{more} was not ended in order: whether other sinks were"
        " given records of it that the file has not, they alone show"
    )


def _second(seq: int) -> str:
    return f"a second record {seq}"


class Watcher(Protocol):
    """Told now and then how far the verifying is."""

    def __call__(self, file: Path, read_bytes: int, records: int) -> None:
        """So many bytes and records of all files were read, now in `file`."""


def verify_chain(
    name: str,
    files: list[Path],
    hmac_key: bytes | None,
    watch: Watcher | None = None,
    expected: set[Link] | None = None,
    sink: str = FILE,
    hmac_since: int = 0,
) -> ChainReport:
    """Verify the files of one chain, in their order; raises OSError.

    A record of `expected` that is there is taken out of it. `sink`: what has stored the files.
    With a key, all files but the one in use and those that end before record `hmac_since` must
    have an HMAC: what the log says of it itself is no measure, the chain has no key.
    """
    report = ChainReport(name, files)
    in_use = next((file for file in reversed(files) if split_name(file.name)[0] == file.name), None)
    covered = 0
    copies = _Copies()
    verifier = ChainVerifier(report, sink, copies)
    read_bytes = 0
    for file in files:
        mac = None if hmac_key is None else new_hmac(hmac_key)
        verifier.begin_file()
        before = report.records
        line: Line | None = None
        for number, raw in enumerate(read_lines(file), 1):
            if sink != FILE and copies.has(raw):
                continue
            line = verifier.take(raw, Place(file, number))
            read_bytes += len(raw)
            if expected and line is not None:
                expected.discard(line.link)
            if mac is not None:
                mac.update(raw)
            if watch is not None and not number % _REPORT_LINES:
                watch(file, read_bytes, report.records)
        verifier.end_file()
        if sink == FILE:
            digest = "" if mac is None else mac.hexdigest()
            is_needed = mac is not None and file != in_use and _last_seq(line) >= hmac_since
            if _check_hmac(report, file, line, digest, is_needed=is_needed):
                covered += report.records - before
    verifier.end()
    if hmac_key is not None and sink == FILE:
        report.notes.append(f"HMACs cover {covered} of {report.records} records")
    if copies.count:
        report.notes.append(f"{copies.count} records came again, unchanged")
    order = {file: index for index, file in enumerate(files)}
    report.problems.sort(key=lambda problem: (order[problem.place.file], problem.place.line))
    return report


class _Copies:
    """Which lines came before, of the last ones."""

    def __init__(self) -> None:
        self.count = 0
        self._known: dict[int, tuple[bytes, ...]] = {}
        """The hashes of the records that have a number: one, and one more for each new run."""

    def has(self, raw: bytes) -> bool:
        """Whether a line is a record that was there already, octet by octet; it is noted."""
        line = read_line(raw[:-1])
        if line is None:
            return False
        digest = bytes.fromhex(line.hash)
        known = self._known.get(line.seq, ())
        if digest in known:
            self.count += 1
            return True
        self._known[line.seq] = (*known[-_MAX_TWINS:], digest)
        if len(self._known) > _COPIES:
            del self._known[next(iter(self._known))]
        return False

    def may_precede(self, line: Line) -> bool:
        """Whether a record hangs on one that came before, or on one that is not known any more."""
        known = self._known.get(line.seq - 1)
        return known is None or bytes.fromhex(line.prev) in known


def _last_seq(line: Line | None) -> int:
    return 0 if line is None else line.seq


def _check_hmac(
    report: ChainReport, file: Path, last: Line | None, digest: str, *, is_needed: bool
) -> bool:
    """Whether a file's HMAC is there and right."""
    place = Place(file, 0)
    written = read_hmac(file)
    promised = last is not None and last.event == CLOSED and last.fields.get("hmac") is True
    if written is None:
        if promised:
            report.add(place, "hmac", f"{hmac_file(file).name} is missing")
        elif is_needed:
            report.add(place, "hmac", "it has no HMAC, though there is a key")
        return False
    if not digest:
        report.notes.append(f"{file.name}: its HMAC was not checked, for want of the key")
        return False
    if not hmac.compare_digest(written.encode(), digest.encode()):
        report.add(place, "hmac", "the file is not what it was when it was closed")
        return False
    return True


def read_lines(file: Path) -> Iterator[bytes]:
    """The lines of a file, with their line feeds; one that is being written is waited for."""
    with file.open("rb", buffering=1 << 20) as stream:
        for raw in iter(partial(stream.readline, _MAX_LINE), b""):
            if raw.endswith(b"\n") or len(raw) == _MAX_LINE:
                yield raw
            else:
                time.sleep(_WAIT_SECONDS)
                yield raw + stream.readline(_MAX_LINE)


def sort_files(files: Iterable[Path]) -> dict[str, list[Path]]:
    """The files of each chain in their order, by the chain's name; raises OSError."""
    chains: dict[str, list[Path]] = {}
    for file in dict.fromkeys(files):
        chains.setdefault(split_name(file.name)[0], []).append(file)
    for found in chains.values():
        found.sort(key=_order)
    return dict(sorted(chains.items()))


def _order(file: Path) -> int:
    """A number between those of a file's records and those of the next file's."""
    seq = closed_seq(file.with_name(split_name(file.name)[0]), file.name)
    if seq is not None:
        return seq
    for raw in islice(read_lines(file), _LOOK_BACK):
        line = read_line(raw[:-1])
        if line is not None:
            return line.seq
    return 1 << 63
