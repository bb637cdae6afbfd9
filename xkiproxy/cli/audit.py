"""`xkiproxy audit`: whether the audit log is what was written, and what is in it."""

from __future__ import annotations

import heapq
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from xkiproxy.cli.common import (
    DEFAULT_CONFIG,
    CommandError,
    ConfigOption,
    JsonOption,
    err,
    out,
    print_json,
    print_table,
)
from xkiproxy.config import Config, load_config
from xkiproxy.observability.chain import FILE, Link
from xkiproxy.observability.logfiles import log_files
from xkiproxy.observability.verify import ChainReport, read_lines, sort_files, verify_chain

app = typer.Typer(no_args_is_help=True, help="Verify the audit log, and search it.")

FilesArgument = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[FILE]...", help="Files of the log; else all that the proxy keeps."),
]

_PROGRESS_SECONDS = 1.0
_TRIES = 5
_AGO = re.compile(r"(\d+)([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_MAX_CELL = 72
_COLUMNS = (
    "time", "seq", "keystore", "operation", "key", "principal", "status", "code", "request_id",
    "kms_request_id",
)  # fmt: skip


@app.command(
    epilog="Examples: xkiproxy audit verify; with what was noted before: xkiproxy audit verify"
    " --expect 41234:9f86d0…; files of an archive: xkiproxy audit verify archive/audit*.jsonl; of a"
    " syslog server: xkiproxy audit verify --sink syslog /var/log/xkiproxy/audit.jsonl; with a key"
    " that came when there were records already: xkiproxy audit verify --hmac-since 41235"
)
def verify(
    files: FilesArgument = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SEQ:HASH", help="A record that must be there: what a verify printed earlier."
        ),
    ] = None,
    sink: Annotated[
        str,
        typer.Option(metavar="NAME", help="The audit sink that has stored the files."),
    ] = FILE,
    hmac_since: Annotated[
        int,
        typer.Option(
            metavar="SEQ", min=0, help="Files that end before this record had no key: no HMAC."
        ),
    ] = 0,
    config: ConfigOption = DEFAULT_CONFIG,
    json: JsonOption = False,
) -> None:
    """Verify the hash chain and the HMACs; name each record that was changed or is missing.

    It prints the last record's number and hash. Note them elsewhere: that the last records are
    still there, no log can prove by itself.

    Where the configuration has audit.hmac_key, every file but the one in use must have an HMAC. Of
    files that were closed when there was no key yet, only you know: --hmac-since names the first
    record of the first file that has one.

    What a syslog server or a collector of standard output has stored is verified with --sink and
    the name of that sink: records may be there twice, and those that it was not given, as the log
    says, are no problem but a note.
    """
    if sink != FILE and not files:
        raise typer.BadParameter("name the files that it has stored", param_hint="--sink")
    expected = set(map(_parse_expected, expect or []))
    settings = load_config(config) if not files or config.exists() else None
    key = settings and settings.audit.hmac_key and settings.audit.hmac_key.read_key()
    if hmac_since and not key:
        raise typer.BadParameter("there is no audit.hmac_key", param_hint="--hmac-since")
    began = time.monotonic()
    reports = _verify(_find(files, settings), key or None, expected, sink, hmac_since)
    seconds = time.monotonic() - began
    if json:
        print_json(_document(reports, expected, seconds))
    else:
        _print_reports(reports, seconds)
    count = sum(report.problem_count for report in reports)
    missing = "".join(f"; record {seq} with hash {digest} is not there" for seq, digest in expected)
    if count or missing:
        raise CommandError(f"the audit log does not verify: {count} problem(s){missing}")


@app.command(
    epilog="Examples: xkiproxy audit search --key payroll --since 2h --outcome 403;"
    " xkiproxy audit search --request-id 0b9c… --json"
)
def search(
    files: FilesArgument = None,
    key: Annotated[str | None, typer.Option(help="The external key ID.")] = None,
    principal: Annotated[str | None, typer.Option(help="Who asked the cloud.")] = None,
    request_id: Annotated[
        str | None, typer.Option(help="The request's ID, here or in the cloud.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="2026-01-31T12:00:00Z, or 90m, 2h, 7d ago.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="The same forms.")] = None,
    outcome: Annotated[
        str | None, typer.Option(metavar="CODE", help="Such as OK, KeyNotFound, 403.")
    ] = None,
    operation: Annotated[
        str | None, typer.Option(help="Such as encrypt, key_changed, reload_ok.")
    ] = None,
    keystore: Annotated[str | None, typer.Option(help="The key store's name.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0 is all.")] = 0,
    config: ConfigOption = DEFAULT_CONFIG,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """Find records by what they hold, oldest first; it verifies nothing."""
    now = datetime.now(UTC)
    wanted = {"key": key, "principal": principal, "operation": operation, "keystore": keystore}
    query = _Query(
        {name: value for name, value in wanted.items() if value is not None},
        request_id,
        outcome,
        None if since is None else _parse_time(since, now),
        None if until is None else _parse_time(until, now),
    )
    found = _find(files, None if files else load_config(config))
    records = _search(found, query)
    if limit:
        records = islice(records, limit)
    if json:
        for record in records:
            sys.stdout.write(orjson.dumps(record).decode() + "\n")
        return
    rows = [
        [*(_cell(record, column) for column in _COLUMNS), _changes(record)] for record in records
    ]
    print_table([*(column.upper() for column in _COLUMNS), "CHANGES"], rows)


def _find(files: list[Path] | None, settings: Config | None) -> dict[str, list[Path]]:
    """The files of each chain, in order."""
    try:
        if files or settings is None:
            return sort_files(files or [])
        # A file may get another name meanwhile: look until two looks agree.
        for _ in range(_TRIES):
            found = sort_files(log_files(settings.audit.path, with_workers=True))
            if set(chain(*found.values())) == set(
                log_files(settings.audit.path, with_workers=True)
            ):
                break
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from None
    if not found:
        raise CommandError(f"{settings.audit.path}: there is no audit log")
    return found


def _verify(
    chains: dict[str, list[Path]],
    key: bytes | None,
    expected: set[Link],
    sink: str,
    hmac_since: int,
) -> list[ChainReport]:
    progress = _Progress()
    try:
        return [
            verify_chain(name, files, key, progress.show, expected, sink, hmac_since)
            for name, files in chains.items()
        ]
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from None
    finally:
        progress.end()


class _Progress:
    """A line on standard error, once a second, where somebody sees it."""

    def __init__(self) -> None:
        self._shown = time.monotonic()
        self._is_there = False

    def show(self, file: Path, read_bytes: int, records: int) -> None:
        """Say how far it is."""
        now = time.monotonic()
        if now - self._shown >= _PROGRESS_SECONDS:
            self._shown = now
            self._is_there = True
            end = "\r" if err.is_terminal else "\n"
            text = f"{file.name}: {records:,} records, {read_bytes >> 20:,} MiB"
            err.print(text, end=end, markup=False)

    def end(self) -> None:
        """Leave the line."""
        if self._is_there and err.is_terminal:
            err.print()


def _print_reports(reports: list[ChainReport], seconds: float) -> None:
    for report in reports:
        for problem in report.problems:
            out.print(str(problem), markup=False, style="red")
        if report.unlisted:
            out.print(f"{report.name}: {report.unlisted} more problems", markup=False, style="red")
        for note in report.notes:
            out.print(f"{report.name}: note: {note}", markup=False)
    columns = ["CHAIN", "FILES", "RECORDS", "FIRST", "LAST", "LAST HASH", "PROBLEMS"]
    rows = [
        [r.name, len(r.files), r.records, r.first_seq, r.last.seq, r.last.hash, r.problem_count]
        for r in reports
    ]
    print_table(columns, rows)
    records = sum(report.records for report in reports)
    out.print(f"{records:,} records in {seconds:.1f} s, {records / seconds:,.0f} a second")
    out.print(
        "Note LAST and LAST HASH elsewhere: whether the last records were removed, or the very last"
        " one changed, only that shows (--expect LAST:HASH)."
    )


def _document(reports: list[ChainReport], missing: set[Link], seconds: float) -> dict[str, Any]:
    return {
        "chains": [
            {
                "chain": report.name,
                "files": [str(file) for file in report.files],
                "records": report.records,
                "first_seq": report.first_seq,
                "last_seq": report.last.seq,
                "last_hash": report.last.hash,
                "problem_count": report.problem_count,
                "problems": [
                    {
                        "file": str(p.place.file),
                        "line": p.place.line,
                        "kind": p.kind,
                        "text": p.text,
                    }
                    for p in report.problems
                ],
                "notes": report.notes,
            }
            for report in reports
        ],
        "expected_but_missing": [f"{seq}:{digest}" for seq, digest in sorted(missing)],
        "seconds": round(seconds, 3),
        "records_per_second": round(sum(r.records for r in reports) / seconds),
    }


def _parse_expected(text: str) -> Link:
    match = re.fullmatch(r"(\d{1,19}):([0-9a-f]{64})", text)
    if match is None:
        raise typer.BadParameter(
            "write it as SEQ:HASH, as verify prints them", param_hint="--expect"
        )
    return Link(int(match[1]), match[2])


@dataclass(frozen=True, slots=True)
class _Query:
    """What a record must have."""

    fields: dict[str, str]
    request_id: str | None
    outcome: str | None
    since: datetime | None
    until: datetime | None

    def fits(self, record: dict[str, Any]) -> bool:
        """Whether a record is one that is looked for."""
        if any(_value(record, name) != value for name, value in self.fields.items()):
            return False
        ids = (record.get("request_id"), record.get("kms_request_id"))
        if self.request_id is not None and self.request_id not in ids:
            return False
        outcomes = (str(record.get("code")).lower(), str(record.get("status")))
        if self.outcome is not None and self.outcome.lower() not in outcomes:
            return False
        if self.since is None and self.until is None:
            return True
        made = _time_of(record)
        return (self.since is None or made >= self.since) and (
            self.until is None or made <= self.until
        )


def _search(chains: dict[str, list[Path]], query: _Query) -> Iterator[dict[str, Any]]:
    """The records of all chains that fit, by time."""
    found = (_search_chain(files, query) for files in chains.values())
    try:
        yield from heapq.merge(*found, key=_time_of)
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from None


def _search_chain(files: list[Path], query: _Query) -> Iterator[dict[str, Any]]:
    sought = [*query.fields.values(), query.request_id]
    # A line that does not have a value's bytes anywhere need not be parsed.
    needles = [orjson.dumps(value) for value in sought if value is not None]
    for raw in chain.from_iterable(map(read_lines, files)):
        if all(needle in raw for needle in needles):
            record = _parse(raw)
            if record is not None and query.fits(record):
                yield record


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        record = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _time_of(record: dict[str, Any]) -> datetime:
    try:
        made = datetime.fromisoformat(str(record.get("time")))
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return made if made.tzinfo else made.replace(tzinfo=UTC)


def _parse_time(text: str, now: datetime) -> datetime:
    """A time, or how long ago it was."""
    ago = _AGO.fullmatch(text)
    try:
        if ago is not None:
            return now - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        made = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{text!r} is no time: write 2026-01-31, 2026-01-31T12:00:00Z (UTC) or 90m, 2h, 7d"
        ) from None
    return made if made.tzinfo else made.replace(tzinfo=UTC)


def _value(record: dict[str, Any], name: str) -> Any:
    """A field; what the log says of itself has an event for an operation."""
    value = record.get(name)
    return record.get("event") if value is None and name == "operation" else value


def _changes(record: dict[str, Any]) -> str:
    """What a reload or a command has changed, and who; it stands last, so it is not cut off."""
    found = [
        f"{name} {_text(old)} -> {_text(new)}"
        for name, old, new in _differences(record.get("before"), record.get("after"))
    ]
    for name in ("changes", "problems"):
        said = record.get(name)
        found += map(str, said) if isinstance(said, list) else ()
    if record.get("by"):
        found.append(f"by {record['by']}")
    return "; ".join(found)


def _differences(before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """What is different in two descriptions of a key; one that is none describes no key."""
    old = before if isinstance(before, dict) else {}
    new = after if isinstance(after, dict) else {}
    for name in old | new:
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _cell(record: dict[str, Any], column: str) -> str:
    """A field for people."""
    value = _value(record, column)
    text = "" if value is None else str(value)
    # One long ARN would pad all lines; --json has it whole.
    return text if len(text) <= _MAX_CELL else f"{text[: _MAX_CELL // 2]}…{text[-_MAX_CELL // 2 :]}"
