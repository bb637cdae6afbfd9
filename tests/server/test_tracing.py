"""Traces of a running proxy, as a collector gets them.

The collector is the tests' own; the messages and their encoding are OpenTelemetry's.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud import Cloud
from collector import Collector, Span
from harness import make_certificate
from hsm import make_hsm, ready_lanes
from test_end_to_end import Installation, wait_for
from test_hsm_server import HsmInstallation
from test_workers import Workers

from xkiproxy.observability.timing import Batch, Timing, Visit

_TOKEN = "a-token-of-the-collector-0123456789"

_TRACING = """
[tracing]
endpoint = "{endpoint}"
sample_ratio = {ratio}
timeout_seconds = 2
headers = {{ Authorization = {{ file = "{tls}/token" }} }}
[tracing.tls]
ca = "{tls}/ca.crt"
certificate = "{tls}/client.crt"
private_key = {{ file = "{tls}/client.key" }}
"""


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    folder = tmp_path / "collector"
    folder.mkdir()
    ca = make_certificate(folder, "ca", common_name="CA", dns_names=())
    make_certificate(folder, "server", issuer=ca)
    make_certificate(folder, "client", common_name="proxy", issuer=ca)
    (folder / "token").write_text(f"Bearer {_TOKEN}")
    (folder / "token").chmod(0o600)
    return folder


@pytest.fixture
def collector(tls: Path) -> Iterator[Collector]:
    made = Collector(tls, _TOKEN)
    yield made
    made.stop()


@pytest.fixture
def proxy(
    tmp_path: Path, tls: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Installation]:
    """On an HSM; every request is traced."""
    hsm = make_hsm(tmp_path / "hsm", monkeypatch)
    made = HsmInstallation(tmp_path / "demo", hsm)
    trace(made, collector, tls, 1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(tls / "nobody.crt"))
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    yield made
    made.stop(signal.SIGKILL)


def trace(proxy: Installation, collector: Collector, tls: Path, ratio: float) -> None:
    more = _TRACING.format(endpoint=collector.endpoint, ratio=ratio, tls=tls)
    proxy.config.write_text(proxy.config.read_text() + more)


def spans_of(collector: Collector, name: str) -> list[Span]:
    """The spans of the first trace whose root has this name."""
    for spans in collector.traces().values():
        if any(span.name == name and not span.parent for span in spans):
            return spans
    return []


def test_a_request_its_stages_and_its_batch(proxy: Installation, collector: Collector) -> None:
    proxy.start()
    before = time.time_ns()
    _, made = proxy.encrypt(b"a plaintext that no span has")
    assert proxy.decrypt(made) == b"a plaintext that no span has"
    liar = Cloud(proxy.cloud.access_key_id, "not-the-secret-0123456789", proxy.cloud.host)
    path, body = "/demo/kms/xki/v1/health", liar.body()
    assert proxy.send(path, body, liar.headers(path, body))[0] == 401
    assert proxy.stop() == 0  # what is left is sent in the end

    spans = spans_of(collector, "xki encrypt")
    stages = ["read", "authenticate", "decode", "perform", "queue", "batch", "encode", "audit"]
    assert [span.name for span in spans] == ["xki encrypt", *stages]
    root, perform, queue, batch = (spans[i] for i in (0, 4, 5, 6))
    assert (root.kind, root.parent, root.status) == (2, "", 0)
    assert {span.parent for span in spans[1:5]} == {root.id}
    assert (queue.parent, batch.parent) == (perform.id, perform.id)
    assert before < root.start <= queue.start <= queue.end == batch.start < batch.end
    assert batch.end <= perform.end <= root.end < time.time_ns()
    assert batch.attributes == {
        "xkiproxy.kmi": "local", "xkiproxy.attempts": 0, "xkiproxy.lane": 0,
        "xkiproxy.batch.size": 1,
    }  # fmt: skip
    assert root.resource["service.name"] == "xkiproxy"

    lines = (proxy.directory / "audit.jsonl").read_text().splitlines()
    record = next(
        found for line in lines if (found := json.loads(line)).get("operation") == "encrypt"
    )
    assert root.attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "xkiproxy.keystore": "demo",
        "xkiproxy.operation": "encrypt",
        "xkiproxy.key": "demo-key",
        "xkiproxy.key_version": 1,
        "xkiproxy.kmi": "local",
        "xkiproxy.code": "OK",
        "xkiproxy.request_id": record["request_id"],
        "xkiproxy.kms_request_id": record["kms_request_id"],
    }
    refused = spans_of(collector, "xki health")
    assert [span.name for span in refused] == ["xki health", "read", "authenticate", "audit"]
    assert refused[0].attributes["http.response.status_code"] == 401
    assert len(collector.traces()) == 3


def test_nothing_secret_in_spans(proxy: Installation, collector: Collector) -> None:
    proxy.start()
    _, made = proxy.encrypt(b"a plaintext that no span has")
    proxy.stop()
    said = repr(collector.spans)
    assert collector.spans
    for secret in (
        proxy.cloud.secret, proxy.cloud.access_key_id, made["CiphertextBlob"], "acs:ram",
        "127.0.0.1", base64.b64encode(b"a plaintext that no span has").decode(),
    ):  # fmt: skip
        assert secret not in said


def test_a_failed_request_is_an_error(proxy: Installation, collector: Collector) -> None:
    proxy.start()
    assert proxy.process is not None
    (proxy.directory.parent / "hsm" / "tokens").rename(proxy.directory.parent / "hsm" / "away")
    for lane in ready_lanes(proxy.process.pid).values():
        os.kill(lane, signal.SIGKILL)
    gone = 'xkiproxy_kmi_state{kmi="local",state="disconnected"} 1.0'
    wait_for(lambda: gone in proxy.admin("metrics")[1])
    assert proxy.encrypt(b"hello")[0] in {503, 504}
    proxy.stop()
    spans = spans_of(collector, "xki encrypt")
    assert spans[0].status == 2
    names = [span.name for span in spans if span.name != "queue"]  # if it came early
    assert names == ["xki encrypt", "read", "authenticate", "decode", "perform", "audit"]


def test_a_sample_over_workers(tmp_path: Path, tls: Path, collector: Collector) -> None:
    proxy = Workers(tmp_path / "demo", 2)
    trace(proxy, collector, tls, 0.1)
    proxy.start()
    try:
        for _ in range(200):
            assert proxy.call("health")[0] == 200
    finally:
        proxy.stop()
    assert 18 <= len(collector.traces()) <= 20


def test_a_collector_that_is_away_changes_nothing(
    proxy: Installation, collector: Collector
) -> None:
    proxy.start()
    collector.answer = 503
    for _ in range(600):
        assert proxy.call("health")[0] == 200
    began = time.monotonic()
    assert proxy.stop() == 0
    assert time.monotonic() - began < 15
    said = proxy.output.read_text()
    assert 1 <= said.count("traces: ") <= 3
    assert "503" in said or "Service Unavailable" in said


def test_check_asks_the_collector(proxy: Installation, collector: Collector, tls: Path) -> None:
    assert "no problems" in proxy.run("check").stdout
    whole = proxy.config.read_text()

    def refused(old: str, new: str) -> str:
        assert old in whole
        proxy.config.write_text(whole.replace(old, new))
        return proxy.run("check", status=1).stderr

    port = collector.endpoint.split(":")[2].split("/")[0]
    said = refused(f"localhost:{port}/v1/traces", "localhost:1/v1/traces")
    assert "tracing.endpoint: https://localhost:1/v1/traces:" in said
    assert "refused" in said
    assert "the collector answers 404" in refused("/v1/traces", "/v1/other")
    assert "CERTIFICATE_VERIFY_FAILED" in refused(f'ca = "{tls}/ca.crt"', "")
    other = refused(f"{tls}/token", str(_other(tls)))
    assert "the collector answers 401" in other
    assert "tracing.tls" in refused(f'certificate = "{tls}/client.crt"', "")
    said = refused("https://localhost", "http://localhost")
    assert "plaintext = true goes with an endpoint of http://" in said
    assert "write it as" in refused("/v1/traces", "")
    assert "sample_ratio" in refused("sample_ratio = 1", "sample_ratio = 0")
    proxy.config.write_text(whole)
    wait_for(lambda: "no problems" in proxy.run("check").stdout)


def _other(tls: Path) -> Path:
    other = tls / "other"
    other.write_text("Bearer nobody")
    other.chmod(0o600)
    return other


def test_the_stages_of_a_timing() -> None:
    timing = Timing()
    timing.marks = [1.0, 2.0]
    assert timing.stages(0.5, 4.0) == [
        ("read", 0.5, 1.0), ("authenticate", 1.0, 2.0), ("audit", 2.0, 4.0),
    ]  # fmt: skip
    for _ in range(9):
        timing.refuse()
    assert [name for name, _, _ in timing.stages(0.5, 1e12)][-2:] == ["encode", "audit"]
    assert Visit("k", 1.0, Batch(0, 2, 1.5), 0, 2.0).batch == Batch(0, 2, 1.5)
