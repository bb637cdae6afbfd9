"""The audit log: every record whole, on its own line, or a clear refusal."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from xkiproxy.observability.audit import AuditError, AuditLog, encode


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_lines_of_json_in_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append([encode({"n": 1, "text": "a\nb"})])
    log.append([encode({"n": 2})])
    assert lines(path) == [{"n": 1, "text": "a\nb"}, {"n": 2}]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    log.close()


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    with pytest.raises(AuditError, match="another process"):
        AuditLog(path)
    log.close()
    AuditLog(path).close()


@pytest.mark.parametrize("name", ["", "missing/audit.jsonl"])
def test_a_place_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(AuditError, match=str(tmp_path)):
        AuditLog(tmp_path / name)


def test_a_torn_last_line_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b'{"n":1}\n{"n":2,"to')
    log = AuditLog(path)
    log.append([encode({"n": 3})])
    log.close()
    assert path.read_bytes() == b'{"n":1}\n{"n":2,"to\n{"n":3}\n'


def test_a_rotated_file_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append([encode({"n": 1})])
    path.rename(tmp_path / "audit.jsonl.1")
    log.append([encode({"n": 2})])
    log.check()
    log.append([encode({"n": 3})])
    log.close()
    assert [r["n"] for r in lines(tmp_path / "audit.jsonl.1")] == [1, 2]
    assert [r["n"] for r in lines(path)] == [3]


def test_a_full_disk_tears_no_record_and_is_noticed_when_there_is_room_again(
    tmp_path: Path,
) -> None:
    """A limit on the file's size is the full disk: the kernel writes a part and then refuses."""
    path = tmp_path / "audit.jsonl"
    program = f"""
        import resource, signal
        from pathlib import Path
        from xkiproxy.observability.audit import AuditError, AuditLog, encode
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        log = AuditLog(Path({str(path)!r}))
        log.append([encode({{"n": 1}})])
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
        for attempt in range(3):
            try:
                log.append([encode({{"n": 2, "text": "x" * 100}})])
            except AuditError as error:
                assert not log.available
                print(error)
        try:
            log.check()
        except AuditError:
            print("still")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        log.check()
        assert log.available
        log.append([encode({{"n": 3}})])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert done.stdout.count(str(path)) == 3
    assert "still" in done.stdout
    records = lines(path)
    assert [r.get("n") for r in records] == [1, None, 3]
    assert records[1]["event"] == "audit_resumed"


def test_a_directory_that_disappears_is_said_and_its_return_seen(tmp_path: Path) -> None:
    place = tmp_path / "logs"
    place.mkdir()
    log = AuditLog(place / "audit.jsonl")
    place.rename(tmp_path / "gone")
    with pytest.raises(AuditError):
        log.check()
    assert not log.available
    (tmp_path / "gone").rename(place)
    log.check()
    assert log.available
    log.close()


def test_the_file_is_not_inherited(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    assert not os.get_inheritable(log._descriptor)
    log.close()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
