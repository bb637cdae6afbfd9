"""The audit log: every record whole, on its own line, or a clear refusal."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import random
import resource
import stat
import subprocess
import sys
import textwrap
import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from xkiproxy.observability.audit import AuditError, AuditLog, AuditOptions, encode
from xkiproxy.observability.chain import START, chain, read_line
from xkiproxy.observability.logfiles import log_files
from xkiproxy.observability.verify import sort_files, verify_chain

KEY = b"a key of the tests, of 32 bytes."


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def problems(*paths: Path, key: bytes | None = None) -> list[str]:
    """What is wrong with the files of one chain."""
    ((name, files),) = sort_files(paths).items()
    return [str(problem) for problem in verify_chain(name, files, key).problems]


def whole_log(path: Path, key: bytes | None = None) -> list[dict]:
    """All records of a log that verifies."""
    files = log_files(path)
    assert problems(*files, key=key) == []
    found = {}
    for file in sort_files(files)[path.name]:
        for line in file.read_bytes().splitlines():
            record = read_line(line)
            if record is not None:
                # An unfinished line may lack its line feed alone: its number comes again.
                found[record.seq] = record.fields
    return list(found.values())


def test_records_are_lines_of_json_in_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append([encode({"n": 1, "text": "a\nb"})])
    log.append([encode({"n": 2})])
    assert [(r["n"], r.get("text")) for r in lines(path)] == [(1, "a\nb"), (2, None)]
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


def test_each_record_has_its_number_and_the_hash_of_the_line_before(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append([encode({"n": 1}), encode({"n": 2})])
    log.close()
    log = AuditLog(path)
    log.append([encode({"n": 3})])
    log.close()
    raw = path.read_bytes().splitlines()
    hashes = [hashlib.sha256(line).hexdigest() for line in raw]
    assert [(r["seq"], r["prev"]) for r in lines(path)] == [
        (1, "0" * 64), (2, hashes[0]), (3, hashes[1]),
    ]  # fmt: skip
    assert raw[0].startswith(b'{"seq":1,"prev":"0000')


def test_an_unfinished_line_of_any_length_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append([encode({"n": 1, "who": "né"})])
    first = path.stat().st_size
    log.append([encode({"n": 2, "who": "né"})])
    log.close()
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        log = AuditLog(path)
        log.append([encode({"n": 3})])
        log.close()
        assert path.read_bytes().startswith(whole[:cut])
        records = whole_log(path)
        kept = 1 if cut >= first else 0
        torn = cut - first * kept
        event = records[kept] if torn else {}
        assert (event.get("event"), event.get("bytes")) == (
            ("audit_recovered", torn) if torn else (None, None)
        )
        assert records[-1]["seq"] == kept + bool(torn) + 1


def test_a_recovery_that_is_torn_itself_is_recovered(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append([encode({"n": 1})])
    log.close()
    before = path.read_bytes() + b'{"seq":2,"pre'
    path.write_bytes(before)
    AuditLog(path).close()
    recovered = path.read_bytes()
    for cut in range(len(before), len(recovered)):
        path.write_bytes(recovered[:cut])
        AuditLog(path).close()
        log = AuditLog(path)
        log.append([encode({"n": 2})])
        log.close()
        assert [r.get("n") for r in whole_log(path)][-3:] == [1, None, 2]


def test_recovered_bytes_may_not_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append([encode({"n": 1})])
    log.close()
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"seq":2,"pre')
    AuditLog(path).close()
    changed = bytearray(path.read_bytes())
    changed[size + 3] ^= 1
    path.write_bytes(changed)
    assert "changed" in " ".join(problems(path))


def test_a_copy_of_a_line_that_lacked_its_end_is_found_wherever_it_is(tmp_path: Path) -> None:
    """The recovery that comes later excuses that line alone, not what was done with it before."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append([encode({"n": n}) for n in range(1, 6)])
    log.close()
    os.truncate(path, path.stat().st_size - 1)
    log = AuditLog(path)
    log.append([encode({"n": 6})])
    log.close()
    whole = path.read_bytes().splitlines(keepends=True)
    assert problems(path) == []
    for place in range(1, 4):
        path.write_bytes(b"".join([*whole[:place], whole[4], *whole[place:]]))
        assert problems(path) == [f"{path}:{place + 1}: inserted: a second record 5"]
    path.write_bytes(b"".join([*whole[:2], whole[3], whole[2], *whole[4:]]))
    assert problems(path) == [f"{path}:3: reordered: record 4 stands in another place than its own"]
    path.write_bytes(b"".join([*whole[:4], whole[6], *whole[4:6]]))
    assert problems(path) == [f"{path}:5: reordered: record 6 stands in another place than its own"]


def test_a_line_that_is_no_record_before_a_file_without_lines(tmp_path: Path) -> None:
    path, moved = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    log = AuditLog(path)
    log.append([encode({"n": 1})])
    log.close()
    path.rename(moved)
    with moved.open("ab") as file:
        file.write(b"nothing\n")
    path.touch()
    assert problems(moved, path) == [f"{moved}:2: changed: the line is no record"]


def test_zeros_that_a_power_cut_leaves_are_an_unfinished_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append([encode({"n": 1})])
    log.close()
    with path.open("ab") as file:
        file.write(bytes(200_000))
    log = AuditLog(path)
    log.append([encode({"n": 2})])
    log.close()
    assert whole_log(path)[1]["bytes"] == 200_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"n":1}\n', "no record of a hash chain"),
        (b'{"seq":1,"prev":"%b","n":1}\n{"seq":3,"prev":"%b","n":2}\n' % ((b"0" * 64,) * 2),
         "record, 3, does not follow"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_verify_at_its_end_is_refused(
    tmp_path: Path, text: bytes, said: str
) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(text)
    with pytest.raises(AuditError, match=said) as caught:
        AuditLog(path)
    assert str(path) in str(caught.value)
    assert "move it" in str(caught.value)
    assert path.read_bytes() == text


def test_the_end_is_found_behind_a_long_record(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for n in range(3):
        log = AuditLog(path)
        log.append([encode({"n": n, "text": "x" * 300_000})])
        log.close()
    assert [r["n"] for r in whole_log(path)] == [0, 1, 2]


def test_a_file_that_others_moved_is_followed(tmp_path: Path) -> None:
    path, moved = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    log = AuditLog(path)
    log.append([encode({"n": 1})])
    path.rename(moved)
    log.append([encode({"n": 2})])
    log.check()
    log.append([encode({"n": 3})])
    log.close()
    assert [r["n"] for r in lines(moved)] == [1, 2]
    assert [r.get("n") for r in lines(path)] == [None, 3]
    assert (lines(path)[0]["event"], lines(path)[0]["previous"]) == ("audit_opened", moved.name)
    path.rename(tmp_path / "audit.jsonl-20260131")
    log = AuditLog(path)
    log.append([encode({"n": 4})])
    log.close()
    assert [r["seq"] for r in whole_log(path)] == [1, 2, 3, 4, 5, 6]


def test_a_file_that_others_emptied_is_gone_on_with(tmp_path: Path) -> None:
    """logrotate's copytruncate."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append([encode({"n": 1})])
    (tmp_path / "audit.jsonl.1").write_bytes(path.read_bytes())
    os.truncate(path, 0)
    log.check()
    log.append([encode({"n": 2})])
    log.close()
    assert [r.get("n") for r in whole_log(path)] == [1, None, 2]


def test_a_file_that_others_cut_is_refused_until_it_is_moved_away(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append([encode({"n": 1}), encode({"n": 2})])
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(AuditError, match="ends with record 1, not"):
        log.check()
    with pytest.raises(AuditError):
        log.append([encode({"n": 3})])
    path.rename(tmp_path / "kept")
    log.check()
    log.append([encode({"n": 3})])
    log.close()
    assert [r["seq"] for r in lines(path)] == [3, 4, 5]


def test_rotation_by_size(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, AuditOptions(max_bytes=2000, hmac_key=KEY))
    for n in range(100):
        log.append([encode({"n": n, "text": "x" * 100})])
    log.close()
    files = sort_files(log_files(path))["audit.jsonl"]
    assert len(files) > 10
    records = whole_log(path, KEY)
    assert [r["n"] for r in records if "n" in r] == list(range(100))
    assert [r["seq"] for r in records] == list(range(1, len(records) + 1))
    for file, after in pairwise(files):
        last, first = lines(file)[-1], lines(after)[0]
        assert file.name.endswith(f"Z-{last['seq']}.jsonl")
        assert (last["event"], last["file"], last["hmac"]) == ("audit_closed", file.name, True)
        assert (first["event"], first["previous"]) == ("audit_opened", file.name)
        assert stat.S_IMODE(file.stat().st_mode) == 0o400
        assert file.stat().st_size < 2300
        digest = hmac.new(KEY, file.read_bytes(), "sha256").hexdigest()
        beside = file.with_name(file.name + ".hmac")
        assert beside.read_text() == f"{digest}  {file.name}\n"
        assert stat.S_IMODE(beside.stat().st_mode) == 0o400
    assert not list(tmp_path.glob(".*"))


def test_a_wrong_or_missing_hmac_is_found(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, AuditOptions(max_bytes=500, hmac_key=KEY))
    for n in range(10):
        log.append([encode({"n": n, "text": "x" * 100})])
    log.close()
    files = sort_files(log_files(path))["audit.jsonl"]
    assert any("hmac" in text for text in problems(*files, key=b"another key"))
    files[0].with_name(files[0].name + ".hmac").unlink()
    assert problems(*files, key=KEY) == [f"{files[0]}: hmac: {files[0].name}.hmac is missing"]
    assert problems(*files) != []


def closed_files(path: Path, key: bytes | None, numbers: range) -> list[Path]:
    """A log is gone on with; its files, the one in use last."""
    log = AuditLog(path, AuditOptions(max_bytes=500, hmac_key=key))
    for n in numbers:
        log.append([encode({"n": n, "who": "mallory", "text": "x" * 100})])
    log.close()
    return sort_files(log_files(path))[path.name]


def forge(files: list[Path]) -> None:
    """What somebody can do who has the files and no key: a whole chain anew."""
    link = START
    for file in files:
        records = []
        for record in lines(file):
            kept = {name: value for name, value in record.items() if name not in ("seq", "prev")}
            changed = {"hmac": False} if "hmac" in kept else {"who": "bob"} if "who" in kept else {}
            records.append(encode({**kept, **changed}))
        text, link = chain(records, link)
        file.chmod(0o600)
        file.write_bytes(text)
        file.with_name(f"{file.name}.hmac").unlink(missing_ok=True)


def test_hmacs_that_were_taken_away_are_missed(tmp_path: Path) -> None:
    """Whatever the forged chain says of them, and whatever the files are called then."""
    path = tmp_path / "audit.jsonl"
    files = closed_files(path, KEY, range(12))
    forge(files)
    assert problems(*files) == []
    *closed, _ = files
    assert problems(*files, key=KEY) == [
        f"{file}: hmac: it has no HMAC, though there is a key" for file in closed
    ]
    moved = [path.with_name(f"audit.jsonl.{n}") for n in range(len(closed))]
    for file, name in zip(closed, moved, strict=True):
        file.rename(name)
    found = problems(*log_files(path), key=KEY)
    assert [text.split(": ")[1] for text in found] == ["hmac"] * len(closed)


@pytest.mark.parametrize("runs", [True, False])
def test_an_hmac_is_of_what_was_there_at_the_start_and_was_written_since(
    tmp_path: Path, runs: bool
) -> None:
    """A forged chain in the file in use shows if the server runs, and not if it starts on it."""
    path = tmp_path / "audit.jsonl"
    options = AuditOptions(hmac_key=KEY)
    log = AuditLog(path, options)
    log.append([encode({"n": 1, "who": "mallory"})])
    if not runs:
        log.close()
    forge([path])
    if not runs:
        log = AuditLog(path, options)
    log._rotate()
    log.close()
    kinds = {text.split(": ")[1] for text in problems(*log_files(path), key=KEY)}
    assert kinds == ({"changed", "hmac"} if runs else set())


def test_files_that_are_older_than_the_key_have_no_hmac(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    old = closed_files(path, None, range(8))[:-1]
    files = closed_files(path, KEY, range(8, 16))
    first = lines(files[len(old)])[0]["seq"]
    report = verify_chain(path.name, files, KEY, hmac_since=first)
    assert report.problems == []
    covered = sum(len(lines(file)) for file in files[len(old) : -1])
    assert report.notes == [f"HMACs cover {covered} of {report.records} records"]
    report = verify_chain(path.name, files, KEY, hmac_since=first - 1)
    assert [(problem.place.file, problem.kind) for problem in report.problems] == [
        (old[-1], "hmac")
    ]
    files[len(old)].with_name(f"{files[len(old)].name}.hmac").unlink()
    assert verify_chain(path.name, files, KEY, hmac_since=first).problem_count == 1


def test_rotation_by_age(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    options = AuditOptions(max_age=timedelta(hours=1))
    log = AuditLog(path, options)
    log.append([encode({"time": datetime.now(UTC) - timedelta(minutes=59), "n": 1})])
    log.close()
    log = AuditLog(path, options)
    log.check()
    assert len(log_files(path)) == 1
    log._file.begun -= timedelta(minutes=2)
    log.check()
    log.check()
    assert len(log_files(path)) == 2
    log._file.begun -= timedelta(hours=2)
    log.check()  # nothing but its opening is in it
    assert len(log_files(path)) == 2
    log.close()
    assert [r.get("event") for r in whole_log(path)] == [None, "audit_closed", "audit_opened"]


@pytest.mark.parametrize("step", ["write_hmac", "rename", "fchmod", "open"])
def test_a_rotation_that_ends_anywhere_is_taken_up_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "audit.jsonl"
    options = AuditOptions(hmac_key=KEY)
    log = AuditLog(path, options)
    log.append([encode({"n": 1})])

    class Killed(BaseException):
        pass

    def die(*arguments: object, **named: object) -> None:
        raise Killed

    places = {
        "write_hmac": "xkiproxy.observability.audit.write_hmac",
        "rename": "pathlib.Path.rename",
        "fchmod": "os.fchmod",
        "open": "xkiproxy.observability.audit.ChainFile",
    }
    with monkeypatch.context() as patched:
        patched.setattr(places[step], die)
        with pytest.raises(Killed):
            log._rotate()
    log.close()
    log = AuditLog(path, options)
    log.append([encode({"n": 2})])
    log.close()
    assert [r.get("n") for r in whole_log(path, KEY)] == [1, None, None, 2]
    (closed,) = set(log_files(path)) - {path}
    assert stat.S_IMODE(closed.stat().st_mode) == 0o400
    assert closed.with_name(closed.name + ".hmac").exists()


def test_a_rotation_that_fails_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append([encode({"n": 1})])

    def fail(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        with pytest.raises(AuditError, match="Permission denied"):
            log._rotate()
        with pytest.raises(AuditError, match="Permission denied"):
            log.append([encode({"n": 2})])
        with pytest.raises(AuditError, match="Permission denied"):
            log.check()
    log.check()
    log.append([encode({"n": 2})])
    log.close()
    events = [r.get("event") for r in whole_log(path)]
    assert events == [None, "audit_closed", "audit_opened", "audit_resumed", None]


def test_what_could_not_be_flushed_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, AuditOptions(fsync=True))
    log.append([encode({"n": 1})])

    def fail(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(AuditError, match="Input/output"):
            log.append([encode({"n": 2})])
    log.check()
    log.append([encode({"n": 3})])
    log.close()
    assert [r.get("n") for r in whole_log(path)] == [1, None, 3]


def test_what_could_not_be_cut_off_is_cut_off_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append([encode({"n": 1})])
    write = os.write

    def fail(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:20]))
        patched.setattr(os, "ftruncate", fail)
        with pytest.raises(AuditError, match="No space"):
            log.append([encode({"n": 2})])
        with pytest.raises(AuditError, match="Input/output"):
            log.check()
    log.check()
    log.append([encode({"n": 3})])
    log.close()
    assert [r.get("n") for r in whole_log(path)] == [1, None, 3]


def test_killed_again_and_again_it_leaves_a_chain_that_verifies(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    program = f"""
        from pathlib import Path
        from xkiproxy.observability.audit import AuditLog, AuditOptions, encode
        log = AuditLog(Path({str(path)!r}), AuditOptions(max_bytes=30_000, hmac_key={KEY!r}))
        print("ready", flush=True)
        while True:
            log.append([encode({{"n": n, "text": "x" * 250}}) for n in range(40)])
            log.check()
    """
    chance = random.Random(7)
    count = 0
    for _ in range(30):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0, 0.03))
            child.kill()
        AuditLog(path, AuditOptions(hmac_key=KEY)).close()
        records = whole_log(path, KEY)
        assert [r["seq"] for r in records] == list(range(1, len(records) + 1))
        assert len(records) >= count
        count = len(records)
    assert len(log_files(path)) > 30


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
    assert not os.get_inheritable(log._file.descriptor)
    log.close()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
