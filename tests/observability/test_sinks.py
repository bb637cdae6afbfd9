"""Sinks beside the audit log's file: real connections, each side misbehaving in its turn."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import ssl
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import make_certificate
from syslog_server import SyslogServer

from xkiproxy.config.models import (
    AuditSettings,
    ClientTlsSettings,
    StdoutSettings,
    SyslogSettings,
)
from xkiproxy.config.secrets import SecretSource
from xkiproxy.observability.audit import AuditError, AuditLog, AuditOptions, Sink, encode
from xkiproxy.observability.fanout import Fanout
from xkiproxy.observability.logfiles import log_files
from xkiproxy.observability.verify import ChainReport, sort_files, verify_chain
from xkiproxy.server.sinks import open_audit

BUFFER = 64 << 10


def group(n: int, count: int = 8, size: int = 500) -> list[bytes]:
    return [encode({"n": n, "text": "x" * size}) for _ in range(count)]


def syslog(port: int, **more: Any) -> SyslogSettings:
    made = {"type": "syslog", "address": f"localhost:{port}", "buffer_bytes": BUFFER, **more}
    return SyslogSettings.model_validate(made)


def settings(folder: Path, *sinks: Any, **more: Any) -> AuditSettings:
    return AuditSettings(path=folder / "audit.jsonl", sink=sinks, **more)


async def opened(folder: Path, *sinks: Any, **more: Any) -> Sink:
    audit = await open_audit(settings(folder, *sinks, **more), AuditOptions())
    with_errors(audit.check)
    return audit


def with_errors(call: Callable[..., None], *arguments: Any) -> str:
    """What a call complains of."""
    try:
        call(*arguments)
    except AuditError as error:
        return str(error)
    return ""


def errors(audit: Sink) -> dict[str, str]:
    return {state.name: state.error for state in audit.states()}


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        await asyncio.sleep(0.02)


async def until_well(audit: Sink) -> None:
    """As the server does it: a check now and then, until there is nothing to complain of."""

    def is_well() -> bool:
        with_errors(audit.check)
        return not any(errors(audit).values())

    await until(is_well)


def verified(file: Path, sink: str = "file") -> ChainReport:
    return verify_chain(file.name, [file], None, sink=sink)


def stored(server: SyslogServer, folder: Path) -> Path:
    file = folder / "stored.jsonl"
    file.write_bytes(server.stored)
    return file


async def has_all(server: SyslogServer, folder: Path) -> None:
    """Until the server has the last line of the file."""
    last = (folder / "audit.jsonl").read_bytes().splitlines()[-1]
    await until(lambda: server.messages and server.messages[-1].msg == last)


@pytest.fixture
async def server() -> Any:
    made = SyslogServer()
    await made.start()
    yield made
    await made.stop()
    assert made.failures == []


async def test_without_other_sinks_it_is_the_file_alone(tmp_path: Path) -> None:
    audit = await opened(tmp_path)
    assert type(audit) is AuditLog
    assert errors(audit) == {"file": ""}
    audit.close()


async def test_a_syslog_server_gets_the_chain_of_the_file(
    tmp_path: Path, server: SyslogServer
) -> None:
    audit = await opened(tmp_path, syslog(server.port, facility="authpriv", app_name="hyok"))
    audit.append([encode({"n": 1, "who": "né \x7f"}), encode({"n": 2})])
    for n in range(20):
        audit.append(group(n))
    await has_all(server, tmp_path)
    audit.close()
    assert server.stored == (tmp_path / "audit.jsonl").read_bytes()
    first = server.messages[0]
    assert (first.priority, first.app_name, first.procid) == (10 * 8 + 6, "hyok", "audit")
    assert verified(stored(server, tmp_path), "syslog").problems == []


async def test_what_the_log_writes_of_itself_goes_there_too(
    tmp_path: Path, server: SyslogServer
) -> None:
    """Rotation, and a line that a killed server left: the store has it all in one chain."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append(group(0))
    log.close()
    with path.open("ab") as file:
        file.write(b'{"seq":9,"pr')
    options = AuditOptions(max_bytes=64 << 10, hmac_key=b"k" * 32)
    audit = await open_audit(settings(tmp_path, syslog(server.port)), options)
    audit.check()
    for n in range(40):
        audit.append(group(n))
    await has_all(server, tmp_path)
    audit.close()
    assert len(log_files(path)) == 4
    ((name, files),) = sort_files(log_files(path)).items()
    assert verify_chain(name, files, b"k" * 32).problems == []
    events = [json.loads(message.msg).get("event") for message in server.messages]
    assert events[0] == "audit_recovered"
    assert events.count("audit_closed") == events.count("audit_opened") == 3
    report = verified(stored(server, tmp_path), "syslog")
    assert report.problems == []
    assert report.first_seq == 9
    assert report.last == verify_chain(name, files, None).last


def tls_files(folder: Path) -> tuple[ssl.SSLContext, ClientTlsSettings]:
    """A server that wants certificates of its clients, and a client that has one."""
    ca = make_certificate(folder, "ca", common_name="CA", dns_names=())
    make_certificate(folder, "server", issuer=ca)
    make_certificate(folder, "client", common_name="proxy", issuer=ca)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca.crt")
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    return context, ClientTlsSettings(
        ca=folder / "ca.crt",
        certificate=folder / "client.crt",
        private_key=SecretSource(file=folder / "client.key"),
    )


async def test_the_same_over_tls(tmp_path: Path) -> None:
    context, tls = tls_files(tmp_path)
    server = SyslogServer(context)
    await server.start()
    audit = await opened(tmp_path, syslog(server.port, tls=tls))
    for n in range(50):
        audit.append(group(n, count=64))
        await asyncio.sleep(0.002)
    await has_all(server, tmp_path)
    assert server.stored == (tmp_path / "audit.jsonl").read_bytes()

    await server.stop()
    await until(lambda: errors(audit)["syslog"])
    await server.start()
    await until_well(audit)
    audit.append(group(50))
    await has_all(server, tmp_path)
    audit.close()
    await asyncio.sleep(0.05)
    report = verified(stored(server, tmp_path), "syslog")
    assert report.problems == []
    await server.stop()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ca": "other.crt"}, "its certificate is refused"),
        ({"server_name": "logs.example.com"}, "Hostname mismatch"),
        ({"certificate": None, "private_key": None}, "has closed the connection"),
        ({"ca": "missing.crt"}, "missing.crt: No such file"),
        ({"private_key": "server.key"}, "is not the key of"),
    ],
)
async def test_a_tls_server_or_client_that_is_not_the_right_one(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    context, tls = tls_files(tmp_path)
    make_certificate(tmp_path, "other")
    changes = {
        "ca": lambda name: tmp_path / name,
        "server_name": str,
        "certificate": lambda _: None,
        "private_key": lambda name: name and SecretSource(file=tmp_path / name),
    }
    changed = {name: changes[name](value) for name, value in change.items()}
    server = SyslogServer(context)
    await server.start()
    audit = await opened(tmp_path, syslog(server.port, tls=tls.model_copy(update=changed)))
    # Of a client's certificate a server complains after the handshake, as TLS 1.3 has it.
    await until(lambda: complaint in errors(audit)["syslog"])
    assert complaint in with_errors(audit.append, group(1))
    assert server.messages == []
    audit.close()
    await server.stop()


async def test_tls_is_not_spoken_with_one_who_does_not(
    tmp_path: Path, server: SyslogServer
) -> None:
    _, tls = tls_files(tmp_path)
    audit = await opened(tmp_path, syslog(server.port, tls=tls, connect_timeout_seconds=1))
    assert errors(audit)["syslog"]
    assert "syslog: " in with_errors(audit.append, group(1))
    audit.close()
    server.failures.clear()  # it was sent what is no message


async def test_one_that_cannot_be_reached_is_required_and_comes(
    tmp_path: Path, server: SyslogServer
) -> None:
    await server.stop()
    audit = await opened(tmp_path, syslog(server.port))
    assert with_errors(audit.append, group(1)) == (
        f"syslog: localhost:{server.port}: Connection refused"
    )
    assert (tmp_path / "audit.jsonl").read_bytes() == b""  # nobody was given it
    await server.start()
    await until_well(audit)
    audit.append(group(2))
    await has_all(server, tmp_path)
    assert [json.loads(message.msg)["seq"] for message in server.messages] == list(range(1, 9))
    audit.close()


async def test_one_that_says_nothing_is_not_waited_for(tmp_path: Path) -> None:
    """An address that takes a connection, and then nothing of the TLS handshake."""
    _, tls = tls_files(tmp_path)
    mute = await asyncio.start_server(lambda _reader, _writer: asyncio.sleep(5), "127.0.0.1", 0)
    port = mute.sockets[0].getsockname()[1]
    began = time.monotonic()
    audit = await opened(tmp_path, syslog(port, tls=tls, connect_timeout_seconds=0.2))
    assert time.monotonic() - began < 4
    assert "no connection within 0.2 s" in errors(audit)["syslog"]
    audit.close()
    mute.close()


async def test_one_that_stalls_is_noticed_and_nothing_is_lost(
    tmp_path: Path, server: SyslogServer
) -> None:
    audit = await opened(tmp_path, syslog(server.port))
    server.stall()
    written, longest = 0, 0.0
    while not (said := with_errors(audit.append, group(written, count=64))):
        began = time.monotonic()
        await asyncio.sleep(0)
        longest = max(longest, time.monotonic() - began)
        written += 1
        assert written < 5000  # the buffers of two kernels, and ours
    assert "bytes wait for it" in said
    assert longest < 2
    size = (tmp_path / "audit.jsonl").stat().st_size
    assert with_errors(audit.append, group(0)) == said
    assert (tmp_path / "audit.jsonl").stat().st_size == size
    server.go_on()
    await until_well(audit)
    audit.append(group(1))
    await has_all(server, tmp_path)
    audit.close()
    report = verified(stored(server, tmp_path), "syslog")
    assert (report.problems, report.notes) == ([], [])
    assert server.stored == (tmp_path / "audit.jsonl").read_bytes()
    assert '"event":"audit_sink_resumed"' in server.stored.decode()


async def test_little_that_waits_too_long_is_a_stall_too(
    tmp_path: Path, server: SyslogServer
) -> None:
    audit = await opened(tmp_path, syslog(server.port, buffer_bytes=4 << 20))
    server.stall()
    outlet = audit._outlets[0]
    while not outlet._waiting:
        audit.append(group(0, count=64))
        await asyncio.sleep(0.05 if outlet._waiting else 0)  # the kernels may still move it
    assert not errors(audit)["syslog"]
    outlet._stall_seconds = 0.1
    await until(lambda: "bytes wait for it" in with_errors(audit.check))
    server.go_on()
    await until_well(audit)
    await has_all(server, tmp_path)
    audit.close()
    assert server.stored == (tmp_path / "audit.jsonl").read_bytes()


async def test_what_a_server_had_not_read_comes_again(tmp_path: Path, server: SyslogServer) -> None:
    """It is ended with records in its buffers: the kernel had them acknowledged."""
    audit = await opened(tmp_path, syslog(server.port))
    audit.append(group(0))
    await has_all(server, tmp_path)
    server.stall()
    for n in range(10):
        audit.append(group(n))
    await asyncio.sleep(0.1)
    await server.stop()
    await until(lambda: errors(audit)["syslog"])
    assert len(server.messages) < 88
    server.reads.set()
    await server.start()
    await until_well(audit)
    audit.append(group(11))
    await has_all(server, tmp_path)
    audit.close()
    file = stored(server, tmp_path)
    report = verified(file, "syslog")
    assert report.problems == []
    assert report.records == 97  # 12 groups and what the log says of the connection
    (note,) = report.notes
    assert "came again, unchanged" in note
    events = [json.loads(message.msg) for message in server.messages]
    (event,) = [event for event in events if event.get("event") == "audit_sink_resumed"]
    assert event["sink"] == "syslog"
    assert event["resent_from"] == 1
    assert "missing_first" not in event
    assert verified(tmp_path / "audit.jsonl").problems == []
    # A copy that is none is found.
    changed = file.read_bytes().replace(b'"n":0', b'"n":7', 1)
    file.write_bytes(changed)
    assert verified(file, "syslog").problems


async def test_any_goes_on_without_the_server_and_names_what_it_missed(
    tmp_path: Path, server: SyslogServer
) -> None:
    audit = await opened(tmp_path, syslog(server.port), required="any")
    audit.append(group(0))
    await has_all(server, tmp_path)
    await server.stop()
    await until(lambda: errors(audit)["syslog"])
    for n in range(100):
        audit.append(group(n))
        audit.check()
    await server.start()
    await until_well(audit)
    audit.append(group(101))
    await has_all(server, tmp_path)
    audit.close()
    assert verified(tmp_path / "audit.jsonl").problems == []
    file = stored(server, tmp_path)
    report = verified(file, "syslog")
    assert report.problems == []
    (gap,) = [note for note in report.notes if "missing" in note]
    assert "as the log says, syslog was not given them" in gap
    events = [json.loads(message.msg) for message in server.messages]
    (event,) = [event for event in events if event.get("event") == "audit_sink_resumed"]
    first, last = event["missing_first"], event["missing_last"]
    assert f"records {first} to {last} are missing" in gap
    numbers = {event["seq"] for event in events}
    assert set(range(1, event["seq"] + 9)) - numbers == set(range(first, last + 1))

    # What the chain does not name is found, and a gap of one sink excuses no other.
    assert [problem.kind for problem in verified(file).problems if problem.kind == "removed"]
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(line for line in lines if f'"seq":{last + 1},'.encode() not in line))
    assert [problem.kind for problem in verified(file, "syslog").problems] == ["removed"]
    whole = (tmp_path / "audit.jsonl").read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(whole[: first - 1] + whole[last:]))
    assert [problem.kind for problem in verified(file).problems] == ["removed"]


async def test_any_goes_on_without_the_file_and_the_chain_is_one(
    tmp_path: Path, server: SyslogServer
) -> None:
    path = tmp_path / "audit.jsonl"
    audit = await opened(tmp_path, syslog(server.port), required="any")
    audit.append(group(0))
    path.rename(tmp_path / "kept.jsonl")
    path.mkdir()
    audit.check()
    assert "Is a directory" in errors(audit)["file"]
    for n in range(5):
        audit.append(group(n))
    path.rmdir()
    (tmp_path / "kept.jsonl").rename(path)
    await until_well(audit)
    audit.append(group(6))
    await has_all(server, tmp_path)
    audit.close()
    report = verified(stored(server, tmp_path), "syslog")
    assert (report.problems, report.records) == ([], 57)
    found = verified(path)
    assert (found.problems, found.last) == ([], report.last)
    (note,) = found.notes
    assert "records 9 to 48 are missing" in note
    assert "as the log says, file was not given them" in note
    event = json.loads(path.read_bytes().splitlines()[8])
    assert (event["event"], event["seq"]) == ("audit_resumed", 49)


async def test_any_goes_on_in_a_new_file(tmp_path: Path, server: SyslogServer) -> None:
    """The file was moved while it was broken: the new one begins where the chain has come to."""
    path = tmp_path / "audit.jsonl"
    audit = await opened(tmp_path, syslog(server.port), required="any")
    audit.append(group(0))
    path.rename(tmp_path / "audit.jsonl.1")
    path.mkdir()
    audit.check()
    audit.append(group(1))
    path.rmdir()
    await until_well(audit)
    audit.append(group(2))
    await has_all(server, tmp_path)
    audit.close()
    assert verified(stored(server, tmp_path), "syslog").problems == []
    report = verify_chain("audit", [tmp_path / "audit.jsonl.1", path], None)
    assert report.problems == []
    assert "records 9 to 16 are missing" in report.notes[0]
    AuditLog(path).close()


@pytest.mark.parametrize("event", ["audit_resumed", "audit_recovered"])
def test_a_gap_that_is_named_is_an_end_like_any_other(tmp_path: Path, event: str) -> None:
    """The server is killed right after it: the next start takes it, and takes no other gap."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append(group(0))
    log.go_on(log.link._replace(seq=20))
    log._file.append_event(event)
    log.close()
    whole = path.read_bytes()
    assert json.loads(whole.splitlines()[-1])["missing_last"] == 20
    if event == "audit_resumed":
        AuditLog(path).close()
        assert path.read_bytes() == whole
    for wrong in (b'"missing_first":8', b'"missing_first":10', b'"missing_first":"9"'):
        path.write_bytes(whole.replace(b'"missing_first":9', wrong))
        with pytest.raises(AuditError):
            AuditLog(path)
    path.write_bytes(whole.replace(b'"sink":"file"', b'"sink":"else"'))
    with pytest.raises(AuditError):
        AuditLog(path)


async def test_any_needs_one(tmp_path: Path, server: SyslogServer) -> None:
    path = tmp_path / "audit.jsonl"
    audit = await opened(tmp_path, syslog(server.port), required="any")
    audit.append(group(0))
    path.rename(tmp_path / "kept.jsonl")
    path.mkdir()
    audit.check()
    await until(lambda: len(server.messages) == 8)
    await server.stop()
    await until(lambda: errors(audit)["syslog"])
    assert "Is a directory" in with_errors(audit.append, group(1))
    assert "Is a directory" in with_errors(audit.check)
    assert "syslog: " in with_errors(audit.check)
    path.rmdir()
    (tmp_path / "kept.jsonl").rename(path)
    await until(lambda: not with_errors(audit.check))  # one of them is enough
    audit.append(group(2))
    await server.start()
    await until_well(audit)
    await has_all(server, tmp_path)
    audit.close()
    # What was refused has no number: neither has a gap.
    assert verified(path).notes == []
    assert verified(stored(server, tmp_path), "syslog").problems == []


async def test_all_needs_the_file(tmp_path: Path, server: SyslogServer) -> None:
    path = tmp_path / "audit.jsonl"
    audit = await opened(tmp_path, syslog(server.port))
    audit.append(group(0))
    path.rename(tmp_path / "kept.jsonl")
    path.mkdir()
    assert "Is a directory" in with_errors(audit.check)
    assert "Is a directory" in with_errors(audit.append, group(1))
    path.rmdir()
    (tmp_path / "kept.jsonl").rename(path)
    await until_well(audit)
    audit.append(group(2))
    await has_all(server, tmp_path)
    audit.close()
    assert server.stored == path.read_bytes()
    assert verified(path).problems == []


async def test_two_servers_and_one_of_them_fails(tmp_path: Path, server: SyslogServer) -> None:
    second = SyslogServer()
    await second.start()
    sinks = syslog(server.port), syslog(second.port, name="second")
    audit = await opened(tmp_path, *sinks)
    audit.append(group(0))
    await has_all(second, tmp_path)
    await second.stop()
    await until(lambda: errors(audit)["second"])
    assert "second: " in with_errors(audit.append, group(1))
    assert errors(audit)["syslog"] == ""
    await second.start()
    await until_well(audit)
    audit.append(group(2))
    await has_all(server, tmp_path)
    await has_all(second, tmp_path)
    audit.close()
    for each, name in ((server, "syslog"), (second, "second")):
        report = verified(stored(each, tmp_path), name)
        assert (report.problems, report.records) == ([], 17)
    await second.stop()


# ---- what the file has not when a run ends -----------------------------------------------------


class Disk:
    """Is full, or fails, as far as the audit log is concerned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = self.is_dead = False
        self._write, self._pwrite = os.write, os.pwrite
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(os, "pwrite", self.pwrite)

    def write(self, descriptor: int, data: bytes) -> int:
        if self.is_full or self.is_dead:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._write(descriptor, data)

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        """What has its place may be written over on a full one."""
        if self.is_dead:
            raise OSError(errno.EIO, "Input/output error")
        return self._pwrite(descriptor, data, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def kill(audit: Sink) -> None:
    """As a signal does it: nothing more is said."""
    assert type(audit) is Fanout
    audit._log._file.close()
    audit._log._run.close(is_in_order=False)
    for outlet in audit._outlets:
        outlet.close()


def events(file: Path) -> list[tuple[int, str]]:
    """What the log says of itself, by number."""
    records = map(json.loads, file.read_bytes().splitlines())
    return [(record["seq"], record["event"]) for record in records if "event" in record]


async def test_what_the_file_missed_is_named_at_the_end_too(
    tmp_path: Path, server: SyslogServer, disk: Disk
) -> None:
    """There is room again, and the server is stopped before it has looked."""
    audit = await opened(tmp_path, syslog(server.port), required="any")
    audit.append(group(0))
    disk.is_full = True
    audit.append(group(1))
    disk.is_full = False
    audit.close()
    path = tmp_path / "audit.jsonl"
    await has_all(server, tmp_path)
    assert events(path) == [(17, "audit_resumed")]
    audit = await opened(tmp_path, syslog(server.port), required="any")
    audit.append(group(2))
    await has_all(server, tmp_path)
    audit.close()
    (note,) = verified(path).notes
    assert "records 9 to 16 are missing" in note
    report = verified(stored(server, tmp_path), "syslog")
    assert (report.problems, report.notes, report.records) == ([], [], 25)
    assert list(tmp_path.glob("*.run")) == []


@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.parametrize("is_full_at_the_start", [False, True])
async def test_a_run_that_ends_without_its_file_is_gone_on_with(
    tmp_path: Path,
    server: SyslogServer,
    disk: Disk,
    is_killed: bool,
    is_full_at_the_start: bool,
) -> None:
    path = tmp_path / "audit.jsonl"
    audit = await opened(tmp_path, syslog(server.port), required="any")
    audit.append(group(0))
    disk.is_full = True
    audit.append(group(1))
    audit.append(group(2))
    kill(audit) if is_killed else audit.close()
    disk.is_full = is_full_at_the_start
    audit = await opened(tmp_path, syslog(server.port), required="any")
    audit.append(group(3))
    disk.is_full = False
    await until_well(audit)
    audit.append(group(4))
    await has_all(server, tmp_path)
    audit.close()
    file = stored(server, tmp_path)
    report = verified(file, "syslog")
    assert (report.problems, report.notes) == ([], [])
    found = verified(path)
    assert (found.problems, found.last) == ([], report.last)
    if is_full_at_the_start:
        assert events(file) == [(25, "audit_restarted"), (34, "audit_resumed")]
        assert "records 9 to 33 are missing" in found.notes[0]
    else:
        assert events(path) == [(25, "audit_restarted")]
        assert "records 9 to 24 are missing" in found.notes[0]
        assert "the run before record 25 was not ended in order" in found.notes[1]


async def test_numbers_that_are_given_twice_are_named(
    tmp_path: Path, server: SyslogServer, disk: Disk
) -> None:
    """The disk had failed altogether: nobody could note how far the others had come."""
    path = tmp_path / "audit.jsonl"
    audit = await opened(tmp_path, syslog(server.port), required="any")
    audit.append(group(0))
    disk.is_dead = True
    audit.append(group(1))
    audit.append(group(2))
    kill(audit)
    disk.is_dead = False
    audit = await opened(tmp_path, syslog(server.port), required="any")
    for n in range(4):
        audit.append(group(n))
    await has_all(server, tmp_path)
    audit.close()
    assert events(path) == [(9, "audit_restarted")]
    found = verified(path)
    assert found.problems == []
    (note,) = found.notes
    assert "the run before record 9 was not ended in order" in note
    file = stored(server, tmp_path)
    report = verified(file, "syslog")
    assert (report.problems, report.last, report.records) == ([], found.last, 24 + 33)
    (note,) = report.notes
    assert note.startswith(f"{file}:25: records 9 to 24 before this line are of a run that was")

    # Both branches are chains that are looked at like any other.
    lines = file.read_bytes().splitlines(keepends=True)
    for place in range(len(lines) - 1):
        file.write_bytes(b"".join([*lines[:place], *lines[place + 1 :]]))
        kinds = {problem.kind for problem in verified(file, "syslog").problems}
        if place not in (0, 23):  # what begins and what ends a branch proves nothing
            assert "removed" in kinds or "inserted" in kinds, place
    changed = bytearray(lines[24])
    changed[lines[24].index(b'"prev":"') + 8] ^= 1
    file.write_bytes(b"".join([*lines[:24], changed, *lines[25:]]))
    assert verified(file, "syslog").problems
    assert verified(file).problems


@pytest.mark.parametrize("torn", [0, 100])
@pytest.mark.parametrize("required", ["all", "any"])
async def test_after_a_power_cut_the_sinks_have_more(
    tmp_path: Path, server: SyslogServer, required: str, torn: int
) -> None:
    """The last records, or a part of them, had not come to the disk."""
    path = tmp_path / "audit.jsonl"
    audit = await opened(tmp_path, syslog(server.port), required=required)
    audit.append(group(0))
    size = path.stat().st_size
    audit.append(group(1))
    await has_all(server, tmp_path)
    kill(audit)
    os.truncate(path, size + torn)
    audit = await opened(tmp_path, syslog(server.port), required=required)
    await until_well(audit)
    audit.append(group(2))
    await has_all(server, tmp_path)
    audit.close()
    assert [event for _, event in events(stored(server, tmp_path))] == [
        *["audit_recovered"] * bool(torn), "audit_restarted",
    ]  # fmt: skip
    assert verified(path).problems == []
    report = verified(stored(server, tmp_path), "syslog")
    assert (report.problems, len(report.notes)) == ([], 1)
    assert "records 9 to 16 before this line are of a run" in report.notes[0]


async def test_a_run_that_was_not_ended_is_told_of_without_sinks_too(
    tmp_path: Path, server: SyslogServer
) -> None:
    path = tmp_path / "audit.jsonl"
    audit = await opened(tmp_path, syslog(server.port))
    audit.append(group(0))
    kill(audit)
    for _ in range(2):
        (await opened(tmp_path)).close()
    assert events(path) == [(9, "audit_restarted")]


async def test_a_log_that_begins_without_its_file(
    tmp_path: Path, server: SyslogServer, disk: Disk
) -> None:
    audit = await opened(tmp_path, syslog(server.port), required="any")
    disk.is_full = True
    audit.append(group(0))
    disk.is_full = False
    audit.close()
    report = verified(tmp_path / "audit.jsonl")
    assert (report.problems, report.first_seq) == ([], 9)
    (note,) = report.notes
    assert "begins with record 9" in note


# ---- standard output -------------------------------------------------------------------------

STDOUT = """
    import asyncio, os, sys, time
    from pathlib import Path
    import uvloop
    from xkiproxy.config.models import AuditSettings, StdoutSettings
    from xkiproxy.observability.audit import AuditError, AuditOptions, encode
    from xkiproxy.server.sinks import open_audit

    def say(*words):
        print(*words, file=sys.stderr, flush=True)

    def refused(call, *arguments):
        try:
            call(*arguments)
        except AuditError as error:
            return str(error)
        return ""

    async def main():
        sink = StdoutSettings(type="stdout", buffer_bytes=1 << 16)
        settings = AuditSettings(path=Path(sys.argv[1]), sink=(sink,))
        audit = await open_audit(settings, AuditOptions())
        records = [encode({"n": 1, "text": "x" * 500}) for _ in range(16)]
"""


def run_on_stdout(folder: Path, body: str, **more: Any) -> subprocess.Popen[bytes]:
    text = textwrap.dedent(STDOUT) + textwrap.indent(textwrap.dedent(body), " " * 4)
    program = [sys.executable, "-c", text + "\nuvloop.run(main())\n", str(folder / "audit.jsonl")]
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.Popen(program, stdin=subprocess.PIPE, **more)


def test_standard_output_has_the_same_lines(tmp_path: Path) -> None:
    with run_on_stdout(
        tmp_path,
        """
        for _ in range(50):
            audit.append(records)
            audit.check()
            while audit._outlets[0]._waiting:
                await asyncio.sleep(0.001)
        audit.close()
        """,
    ) as child:
        written, said = child.communicate(timeout=60)
    assert (child.returncode, said) == (0, b"")
    assert written == (tmp_path / "audit.jsonl").read_bytes()
    assert written.count(b"\n") == 800


@pytest.mark.parametrize("kind", ["file", "socket", "terminal"])
def test_standard_output_may_be_many_things(tmp_path: Path, kind: str) -> None:
    import pty
    import socket

    body = "audit.append(records[:2])\naudit.close()\n"
    kept = tmp_path / "out.jsonl"
    if kind == "file":
        kept.write_bytes(b"before\n")
        with kept.open("r+b") as file, run_on_stdout(tmp_path, body, stdout=file) as child:
            said = child.communicate(timeout=60)[1]
        written = kept.read_bytes().removeprefix(b"before\n")
    elif kind == "socket":
        ours, theirs = socket.socketpair()
        with ours, theirs, run_on_stdout(tmp_path, body, stdout=theirs) as child:
            said = child.communicate(timeout=60)[1]
            written = ours.recv(1 << 16)
    else:
        ours_fd, theirs_fd = pty.openpty()
        with run_on_stdout(tmp_path, body, stdout=theirs_fd) as child:
            said = child.communicate(timeout=60)[1]
            written = os.read(ours_fd, 1 << 16).replace(b"\r\n", b"\n")
        os.close(ours_fd)
        os.close(theirs_fd)
    assert (child.returncode, said) == (0, b"")
    assert written == (tmp_path / "audit.jsonl").read_bytes()


def test_a_pipe_that_nobody_reads_stops_nothing_but_the_records(tmp_path: Path) -> None:
    with run_on_stdout(
        tmp_path,
        """
        count = 0
        began = time.monotonic()
        while not (said := refused(audit.append, records)):
            count += 1
            assert count < 10000
        say(said, time.monotonic() - began < 10)
        say(os.get_blocking(1))
        while refused(audit.check):
            await asyncio.sleep(0.02)
        audit.append(records)
        while audit._outlets[0]._waiting:
            await asyncio.sleep(0.02)
        audit.close()
        """,
    ) as child:
        assert child.stderr is not None
        said = child.stderr.readline()
        assert b"bytes wait for it True" in said
        assert child.stderr.readline() == b"True\n"  # it is as it was for all who share it
        written, said = child.communicate(timeout=60)
    assert (child.returncode, said) == (0, b"")
    assert written == (tmp_path / "audit.jsonl").read_bytes()
    assert b'"event":"audit_sink_resumed","sink":"stdout"' in written


def test_a_pipe_whose_reader_has_gone(tmp_path: Path) -> None:
    with run_on_stdout(
        tmp_path,
        """
        audit.append(records)
        say("ready")
        sys.stdin.readline()
        while not (said := refused(audit.check)):  # without a record to write
            await asyncio.sleep(0.02)
        say(said)
        say(refused(audit.append, records))
        audit.close()
        """,
    ) as child:
        assert child.stderr is not None
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stderr.readline() == b"ready\n"
        child.stdout.close()
        child.stdin.write(b"\n")
        child.stdin.flush()
        said = child.stderr.read()
    assert child.returncode == 0, said
    assert said.count(b"stdout: ") == 2
    assert len((tmp_path / "audit.jsonl").read_bytes().splitlines()) == 16


def test_standard_output_that_was_closed_is_no_other_file(tmp_path: Path) -> None:
    """Descriptor 1 is then free for the next file that is opened: the log must not go there."""
    with run_on_stdout(
        tmp_path,
        """
        say(refused(audit.append, records))
        """,
        stdout=None,
        preexec_fn=lambda: os.close(1),
    ) as child:
        said = child.communicate(timeout=60)[1]
    assert b"stdout: standard output is closed" in said
    assert (tmp_path / "audit.jsonl").read_bytes() == b""


def test_the_settings_of_standard_output() -> None:
    made = AuditSettings(path=Path("a.jsonl"), sink=(StdoutSettings(type="stdout"),))
    assert made.sink[0].name == "stdout"
    with pytest.raises(ValueError, match="two sinks have the name 'stdout'"):
        AuditSettings(path=Path("a.jsonl"), sink=(made.sink[0], made.sink[0]))
