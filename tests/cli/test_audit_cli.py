"""`xkiproxy audit`: a log of 100,000 records, and what is done to it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cli_site import Outcome, Run, Site

from xkiproxy.config.secrets import write_secret_file
from xkiproxy.observability.audit import AuditLog, AuditOptions, encode
from xkiproxy.observability.logfiles import log_files
from xkiproxy.observability.verify import sort_files, verify_chain

RECORDS = 100_000
KEY = b"a key of the tests, of 32 bytes."
START = datetime(2026, 1, 31, 12, tzinfo=UTC)

Lines = list[bytes]
Change = Callable[[Lines], object]


def record(number: int) -> bytes:
    failed = number % 10 == 0
    return encode(
        {
            "time": START + timedelta(seconds=number),
            "request_id": f"here-{number}",
            "kms_request_id": f"cloud-{number}",
            "keystore": "demo",
            "operation": "decrypt" if number % 2 else "encrypt",
            "key": f"key-{number % 3}",
            "principal": f"user-{number % 5}",
            "status": 403 if failed else 200,
            "code": "KeyDisabledForbidden" if failed else "OK",
        }
    )


def write(path: Path, numbers: range, options: AuditOptions | None = None) -> None:
    log = AuditLog(path, options)
    for start in range(numbers.start, numbers.stop, 50):
        log.append([record(n) for n in range(start, min(start + 50, numbers.stop))])
    log.close()


@pytest.fixture(scope="module")
def long_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "audit.jsonl"
    write(path, range(1, RECORDS + 1), AuditOptions(max_bytes=0))
    return path


@dataclass(frozen=True)
class Found:
    problems: list[tuple[int, str]]
    last: tuple[int, str]


def find(path: Path, lines: Lines) -> Found:
    """What is wrong with a file of these lines."""
    path.write_bytes(b"".join(lines))
    report = verify_chain(path.name, [path], None)
    return Found([(p.place.line, p.kind) for p in report.problems], report.last)


def test_a_long_log_verifies(run: Run, long_log: Path) -> None:
    outcome = run("audit", "verify", long_log, "--json")
    (chain,) = outcome.json()["chains"]
    assert (chain["records"], chain["first_seq"], chain["last_seq"]) == (RECORDS, 1, RECORDS)
    assert chain["problems"] == chain["notes"] == []
    done = subprocess.run(
        ["sha256sum"], input=long_log.read_bytes().splitlines()[-1], capture_output=True, check=True
    )
    assert done.stdout.decode().startswith(chain["last_hash"])
    printed = run("audit", "verify", long_log)
    assert printed.status == 0
    assert chain["last_hash"] in printed.out
    assert "100,000 records" in printed.out


def test_a_changed_byte_is_found_wherever_it_is(long_log: Path, tmp_path: Path) -> None:
    whole = long_log.read_bytes()
    last = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    second = whole.index(b"\n") + 1
    chance = random.Random(1)
    places = [0, 5, 8, 20, second - 2, second - 1, second, second + 8, second + 20]
    places += [last - 2, last - 1, last, last + 8, last + 20, len(whole) - 2, len(whole) - 1]
    places += [chance.randrange(last) for _ in range(4)]
    feeds = [whole.index(b"\n", chance.randrange(last)) for _ in range(3)]
    hashes = [whole.index(b'"prev":"', chance.randrange(last)) + 30 for _ in range(3)]
    numbers = [whole.index(b'{"seq":', chance.randrange(last)) + 8 for _ in range(3)]
    path = tmp_path / "audit.jsonl"
    for place in [*places, *feeds, *hashes, *numbers]:
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        report = verify_chain(path.name, [path], None)
        line = whole.count(b"\n", 0, place) + 1
        assert report.problems, place
        lines = {problem.place.line for problem in report.problems}
        assert lines <= {line, line + 1}, place
        assert line in lines, place


def test_a_change_of_the_very_last_record_shows_by_what_was_noted(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, range(1, 20))
    (chain,) = run("audit", "verify", path, "--json").json()["chains"]
    noted = f"{chain['last_seq']}:{chain['last_hash']}"
    assert run("audit", "verify", path, "--expect", noted).status == 0
    whole = path.read_bytes()
    for changed in (
        whole[: whole.rindex(b"\n", 0, -1) + 1],
        whole[:-20] + whole[-20:].replace(b"OK", b"ok"),
    ):
        path.write_bytes(changed)
        assert run("audit", "verify", path).status == 0
        outcome = run("audit", "verify", path, "--expect", noted)
        assert outcome.status == 1
        assert "record 19" in outcome.err
    assert run("audit", "verify", path, "--expect", "19").status == 2


def swap(lines: Lines, one: int, other: int) -> None:
    lines[one], lines[other] = lines[other], lines[one]


CHANGES: dict[str, tuple[Change, list[tuple[int, str]]]] = {
    "nothing": (len, []),
    "one removed": (lambda lines: lines.pop(500), [(501, "removed")]),
    "many removed": (lambda lines: lines.__delitem__(slice(500, 600)), [(501, "removed")]),
    "the first removed": (lambda lines: lines.pop(0), [(1, "removed")]),
    "two swapped": (lambda lines: swap(lines, 500, 501), [(501, "reordered")]),
    "two far apart swapped": (
        lambda lines: swap(lines, 300, 600), [(302, "reordered"), (601, "reordered")]
    ),
    "the last two swapped": (lambda lines: swap(lines, -2, -1), [(999, "reordered")]),
    "moved back": (lambda lines: lines.insert(500, lines.pop(10)), [(501, "reordered")]),
    "moved forward": (lambda lines: lines.insert(10, lines.pop(500)), [(11, "reordered")]),
    "a copy": (lambda lines: lines.insert(700, lines[300]), [(701, "inserted")]),
    "a copy from later": (lambda lines: lines.insert(300, lines[700]), [(301, "inserted")]),
    "a copy beside it": (lambda lines: lines.insert(300, lines[300]), [(302, "inserted")]),
    "a forged one before": (
        lambda lines: lines.insert(300, lines[300].replace(b"demo", b"DEMO")), [(301, "inserted")]
    ),
    "a forged one after": (
        lambda lines: lines.insert(301, lines[300].replace(b"demo", b"DEMO")), [(302, "inserted")]
    ),
    "no record": (lambda lines: lines.insert(300, b"nothing\n"), [(301, "inserted")]),
    "replaced by none": (lambda lines: swap_in(lines, 300, b"{}\n"), [(301, "changed")]),
    "cut off in a line": (
        lambda lines: swap_in(lines, -1, lines[-1][:-9]), [(1000, "unfinished")]
    ),
    "two changed, one removed": (
        lambda lines: (
            swap_in(lines, 300, lines[300].replace(b"demo", b"DEMO")),
            swap_in(lines, 400, lines[400].replace(b"demo", b"DEMO")),
            lines.pop(800),
        ),
        [(301, "changed"), (401, "changed"), (801, "removed")],
    ),
}  # fmt: skip


def swap_in(lines: Lines, place: int, line: bytes) -> None:
    lines[place] = line


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_done_to_it_is_said_by_its_line(long_log: Path, tmp_path: Path, name: str) -> None:
    with long_log.open("rb") as file:
        lines = [file.readline() for _ in range(1000)]
    change, expected = CHANGES[name]
    change(lines)
    found = find(tmp_path / "audit.jsonl", lines)
    assert found.problems == expected


def test_the_log_of_a_configuration_with_all_workers(run: Run, site: Site) -> None:
    key = site.directory / "audit.key"
    write_secret_file(key, KEY.hex())
    with site.config.open("a") as file:
        file.write('[audit]\nhmac_key = "audit.key"\n')
    options = AuditOptions(max_bytes=50_000, hmac_key=KEY)
    for number in (1, 2):
        write(site.directory / f"audit-{number}.jsonl", range(1, 1001), options)
    (site.directory / "audit-notes.jsonl").write_text("not a file of the log\n")
    document = run("audit", "verify", "--config", site.config, "--json").json()
    assert [chain["chain"] for chain in document["chains"]] == ["audit-1.jsonl", "audit-2.jsonl"]
    assert [chain["problem_count"] for chain in document["chains"]] == [0, 0]
    assert all(len(chain["files"]) > 3 for chain in document["chains"])

    files = sort_files(log_files(site.directory / "audit-2.jsonl"))["audit-2.jsonl"]
    files[1].unlink()
    outcome = run("audit", "verify", "--config", site.config)
    assert outcome.status == 1
    assert f"{files[2]}:1: removed" in outcome.out
    write_text(files[0], files[0].read_text().replace("demo", "DEMO", 1))
    outcome = run("audit", "verify", "--config", site.config)
    assert f"{files[0]}:1: changed" in outcome.out
    assert f"{files[0]}: hmac" in outcome.out
    key.unlink()
    write_secret_file(key, "short")
    outcome = run("audit", "verify", "--config", site.config)
    assert "must be 32 bytes" in outcome.err


def test_a_key_that_came_later(run: Run, site: Site) -> None:
    path = site.directory / "audit.jsonl"
    write(path, range(1, 501), AuditOptions(max_bytes=50_000))
    old = len(log_files(path)) - 1
    refused = run("audit", "verify", "--config", site.config, "--hmac-since", 1)
    assert (refused.status, "there is no audit.hmac_key" in refused.err) == (2, True)
    write_secret_file(site.directory / "audit.key", KEY.hex())
    with site.config.open("a") as file:
        file.write('[audit]\nhmac_key = "audit.key"\n')
    write(path, range(501, 1001), AuditOptions(max_bytes=50_000, hmac_key=KEY))
    outcome = run("audit", "verify", "--config", site.config)
    assert outcome.status == 1
    assert outcome.out.count(": hmac: it has no HMAC") == old
    file = sort_files(log_files(path))["audit.jsonl"][old]
    since = json.loads(file.read_bytes().splitlines()[0])["seq"]
    outcome = run("audit", "verify", "--config", site.config, "--hmac-since", since)
    assert outcome.status == 0, outcome.out
    assert "audit.jsonl: note: HMACs cover " in outcome.out


def write_text(path: Path, text: str) -> None:
    path.chmod(0o600)
    path.write_text(text)


def test_there_is_no_log(run: Run, site: Site, tmp_path: Path) -> None:
    assert "there is no audit log" in run("audit", "verify", "--config", site.config).err
    outcome = run("audit", "verify", tmp_path / "missing.jsonl")
    assert (outcome.status, "missing.jsonl: No such file" in outcome.err) == (1, True)


@pytest.fixture
def search(run: Run, site: Site) -> Callable[..., list[int]]:
    write(site.directory / "audit-1.jsonl", range(1, 101), AuditOptions(max_bytes=9_000))
    write(site.directory / "audit-2.jsonl", range(101, 201))

    def search(*arguments: object) -> list[int]:
        outcome: Outcome = run("audit", "search", "--config", site.config, "--json", *arguments)
        assert outcome.status == 0, outcome.err
        found: list[dict[str, Any]] = list(map(json.loads, outcome.out.splitlines()))
        return [int(r["request_id"].removeprefix("here-")) for r in found if "request_id" in r]

    return search


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--request-id", "here-17"], [17]),
        (["--request-id", "cloud-117"], [117]),
        (["--key", "key-1", "--principal", "user-2"], list(range(7, 201, 15))),
        (["--outcome", "403"], list(range(10, 201, 10))),
        (["--outcome", "keydisabledforbidden", "--limit", "2"], [10, 20]),
        (["--operation", "decrypt", "--since", "2026-01-31T12:03:15Z"], [195, 197, 199]),
        (["--since", "2026-01-31T12:01:39Z", "--until", "2026-01-31T12:01:41"], [99, 100, 101]),
        (["--keystore", "other"], []),
        (["--since", "1s"], []),
    ],
)
def test_search(
    search: Callable[..., list[int]], arguments: list[str], expected: list[int]
) -> None:
    assert search(*arguments) == expected


def test_search_prints_a_table(run: Run, search: Callable[..., list[int]], site: Site) -> None:
    del search
    outcome = run("audit", "search", "--config", site.config, "--request-id", "here-17")
    head, row = outcome.out.splitlines()
    assert head.split()[:3] == ["TIME", "SEQ", "KEYSTORE"]
    assert "key-2" in row
    wrong = run("audit", "search", "--config", site.config, "--since", "yesterday")
    assert wrong.status == 2
    assert "is no time" in wrong.err


def test_a_long_name_does_not_widen_the_table(run: Run, site: Site) -> None:
    log = AuditLog(site.directory / "audit.jsonl")
    arn = f"acs:ram::1:user/{'n' * 2000}/the-end"
    log.append([encode({"time": "2026-01-31T12:00:00Z", "principal": arn, "key": "long"})])
    log.append([encode({"event": "key_changed", "key": "long"})])
    log.close()
    lines = run("audit", "search", "--config", site.config, "--key", "long").out.splitlines()
    assert max(map(len, lines)) < 300
    assert "acs:ram::1:user/" in lines[1]
    assert "…" in lines[1]
    assert "/the-end" in lines[1]
    assert "key_changed" in lines[2]
    whole = run("audit", "search", "--config", site.config, "--key", "long", "--json").out
    assert arn in whole


def test_a_terminal_obeys_no_principal(run: Run, site: Site) -> None:
    log = AuditLog(site.directory / "audit.jsonl")
    log.append([encode({"principal": "me\x1b[2J\nyou", "key": "k"})])
    log.close()
    lines = run("audit", "search", "--config", site.config, "--key", "k").out.splitlines()
    assert len(lines) == 2
    assert "me�[2J�you" in lines[1]


def test_events_are_found_and_show_what_changed(run: Run, site: Site) -> None:
    before, after = {"state": "ENABLED", "version": 1}, {"state": "DISABLED", "version": 1}
    changed = {"event": "key_changed", "key": "k", "before": before, "after": after}
    log = AuditLog(site.directory / "audit.jsonl")
    log.append([encode({"operation": "encrypt", "key": "k"})])
    log.append([encode({**changed, "by": "me\x1b[2J\n (7)"})])
    log.append([encode({**changed, "before": None, "after": {"labels": {"a": "\x1b[1m"}}})])
    log.append([encode({"event": "reload_ok", "changes": ["store \x1b[2J is new", "and that"]})])
    log.append([encode({"event": "reload_failed", "problems": ["a mistake"]})])
    log.append([encode({"event": "key_changed", "before": "nonsense", "after": 3, "changes": 4})])
    log.close()

    def found(operation: str) -> list[str]:
        outcome = run("audit", "search", "--config", site.config, "--operation", operation)
        assert "\x1b" not in outcome.out
        return outcome.out.splitlines()[1:]

    disabled, labelled, nonsense = found("key_changed")
    assert disabled.endswith("  state ENABLED -> DISABLED; by me�[2J� (7)")
    assert labelled.endswith('  labels none -> {"a":"\\u001b[1m"}')
    assert nonsense.endswith("key_changed")
    assert [line.split("reload_ok")[1].strip() for line in found("reload_ok")] == [
        "store �[2J is new; and that"
    ]
    assert found("reload_failed")[0].endswith("a mistake")
    assert len(found("encrypt")) == 1


def test_search_goes_on_when_its_reader_does_not(long_log: Path) -> None:
    """`| head`: no traceback."""
    with subprocess.Popen(
        [sys.executable, "-m", "xkiproxy", "audit", "search", str(long_log), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert b"Traceback" not in child.stderr.read()


def test_the_program_in_the_documentation_agrees(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for start in range(1, 30, 5):
        write(path, range(start, start + 5), AuditOptions(max_bytes=3000))
    for torn in (1, 100):
        os.truncate(path, path.stat().st_size - torn)
        write(path, range(30, 33))
    text = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()
    program = text.split("```python\n")[1].split("```")[0]
    files = sort_files(log_files(path))[path.name]
    assert len(files) > 2
    report = verify_chain(path.name, files, None)
    assert report.problems == []
    command = [sys.executable, "-c", program, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"last: {report.last.seq} {report.last.hash}\n"
    write_text(files[0], files[0].read_text().replace("demo", "DEMO", 1))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == "record 2 does not follow from 1\n"
