"""A server whose audit log goes to a real rsyslog over TLS too, and to standard output."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import make_certificate
from rsyslog import Rsyslog
from test_end_to_end import wait_for
from test_workers import Workers

_SINK = """
[[audit.sink]]
type = "syslog"
address = "{address}"
[audit.sink.tls]
ca = "{tls}/ca.crt"
certificate = "{tls}/client.crt"
private_key = {{ file = "{tls}/client.key" }}
server_name = "localhost"
"""


class Site:
    """An rsyslog that wants certificates of its clients, and a proxy that has one."""

    def __init__(self, folder: Path, workers: int, more: str = "") -> None:
        tls = folder / "log-tls"
        tls.mkdir()
        ca = make_certificate(tls, "ca", common_name="CA", dns_names=())
        make_certificate(tls, "server", issuer=ca)
        make_certificate(tls, "client", common_name="proxy", issuer=ca)
        self.rsyslog = Rsyslog(folder / "rsyslog", tls)
        self.proxy = Workers(folder / "demo", workers)
        text = self.proxy.config.read_text()
        sink = _SINK.format(address=self.rsyslog.address, tls=tls)
        self.proxy.config.write_text(f"{text}{more}{sink}")

    def chain_names(self) -> list[str]:
        """The names of the chains: what rsyslog's files are called after."""
        return [file.stem for file in sorted(self.proxy.directory.glob("audit*.jsonl"))]

    def verify(self, name: str) -> int:
        """Both copies of a chain are whole, and end in the same record; its number."""
        file = self.proxy.directory / f"{name}.jsonl"
        own = self.proxy.run("audit", "verify", "--json", str(file))
        copy = self.proxy.run(
            "audit", "verify", "--json", "--sink", "syslog", str(self.rsyslog.stored(name))
        )
        (first,), (second,) = (json.loads(done.stdout)["chains"] for done in (own, copy))
        assert first["last_hash"] == second["last_hash"]
        return int(first["last_seq"])

    def has_all(self) -> bool:
        return all(
            (self.proxy.directory / f"{name}.jsonl").read_bytes().splitlines()[-1:]
            == self.rsyslog.stored(name).read_bytes().splitlines()[-1:]
            for name in self.chain_names()
            if self.rsyslog.stored(name).exists()
        )

    def stop(self) -> None:
        self.proxy.stop(signal.SIGKILL)
        self.rsyslog.stop(signal.SIGKILL)


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path, request.param)
    made.rsyslog.start()
    made.proxy.start()
    yield made
    made.stop()


def test_rsyslog_has_the_same_chain(site: Site) -> None:
    site.proxy.run("check")
    for n in range(40):
        assert site.proxy.encrypt(b"%d" % n)[0] == 200
    status = site.proxy.status()
    for process in status.get("workers", [status]):
        sinks = {sink["name"]: sink["up"] for sink in process["audit"]["sinks"]}
        assert sinks == {"file": True, "syslog": True}
    assert site.proxy.sample("xkiproxy_audit_sink_up", sink="syslog") == 1
    assert site.proxy.stop() == 0
    wait_for(site.has_all)
    assert sum(site.verify(name) for name in site.chain_names()) >= 40
    for name in site.chain_names():
        copy = site.rsyslog.stored(name).read_bytes()
        assert copy == (site.proxy.directory / f"{name}.jsonl").read_bytes()


def test_without_rsyslog_nothing_is_answered_and_with_it_all_goes_on(site: Site) -> None:
    assert site.proxy.encrypt(b"before")[0] == 200
    site.rsyslog.stop()
    wait_for(lambda: site.proxy.admin("readyz")[0] == 503)
    assert {site.proxy.encrypt(b"x")[0] for _ in range(4)} == {503}
    assert site.proxy.sample("xkiproxy_refusing", part="audit") == 1
    assert "syslog" in str(site.proxy.status()["problems"])
    assert site.proxy.sample("xkiproxy_audit_sink_up", sink="syslog") == 0
    assert site.proxy.sample("xkiproxy_audit_sink_up", sink="file") == 1
    site.rsyslog.start()
    wait_for(lambda: site.proxy.admin("readyz")[0] == 200)
    assert {site.proxy.encrypt(b"x")[0] for _ in range(8)} == {200}
    assert site.proxy.stop() == 0
    wait_for(site.has_all)
    assert sum(site.verify(name) for name in site.chain_names()) > 0


def test_a_killed_server_leaves_two_chains_that_verify(tmp_path: Path) -> None:
    site = Site(tmp_path, 1)
    site.rsyslog.start()
    try:
        for n in range(4):
            site.proxy.start()
            for _ in range(n * 7):
                assert site.proxy.encrypt(b"x")[0] == 200
            site.proxy.stop(signal.SIGKILL)
        site.proxy.start()
        assert site.proxy.encrypt(b"x")[0] == 200
        assert site.proxy.stop() == 0
        wait_for(site.has_all)
        assert site.verify("audit") >= 43
        log = (site.proxy.directory / "audit.jsonl").read_text()
        assert log.count('"event":"audit_restarted"') == 4
    finally:
        site.stop()


def test_any_sink_is_enough_when_that_is_configured(tmp_path: Path) -> None:
    site = Site(tmp_path, 1, '\n[audit]\nrequired = "any"\n')
    refused = site.proxy.run("check", status=1).stderr
    assert f"audit.sink[0]: {site.rsyslog.address}: Connection refused" in refused
    site.proxy.start()  # rsyslog is not there
    try:
        assert site.proxy.encrypt(b"x")[0] == 200
        state = {sink["name"]: sink for sink in site.proxy.status()["audit"]["sinks"]}
        assert state["file"]["up"]
        assert "Connection refused" in state["syslog"]["error"]
        site.rsyslog.start()
        wait_for(lambda: site.proxy.sample("xkiproxy_audit_sink_up", sink="syslog") == 1)
        assert site.proxy.encrypt(b"x")[0] == 200
        assert site.proxy.stop() == 0
        wait_for(site.has_all)
        site.verify("audit")
    finally:
        site.stop()


def test_standard_output_has_the_records(tmp_path: Path) -> None:
    proxy = Workers(tmp_path / "demo", 1)
    with proxy.config.open("a") as file:
        file.write('\n[[audit.sink]]\ntype = "stdout"\n')
    proxy.start()
    try:
        for _ in range(5):
            assert proxy.encrypt(b"x")[0] == 200
        assert proxy.stop() == 0
    finally:
        proxy.stop(signal.SIGKILL)
    printed = [line for line in proxy.output.read_bytes().splitlines(True) if b'"seq":' in line]
    assert b"".join(printed) == (proxy.directory / "audit.jsonl").read_bytes()
    proxy.config.write_text(proxy.config.read_text().replace("workers = 1", "workers = 2"))
    refused = proxy.run("check", status=1)
    assert "use workers = 1" in refused.stderr
