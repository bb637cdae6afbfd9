"""A real Prometheus scrapes two proxies under a load with planted failures; all is asked of it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloud
import pytest
from boards import BOARDS, Expression, board, of_panels, of_rules, panels, rules
from cloud import Cloud
from hsm import Hsm, children, make_hsm, ready_lanes
from matplotlib import image
from prometheus_client.parser import text_string_to_metric_families
from test_end_to_end import BASE, Installation, wait_for

from grafana.draw import KINDS, Span, draw, save
from grafana.prometheus import Prometheus, PrometheusError

pytestmark = pytest.mark.timeout(180)

MAY_BE_EMPTY = {
    # There is data only while there is no proxy; test_alerts.py shows it.
    "XkiproxyAbsent",
}
ROUNDS = 8
CONNECTIONS = 4

_POLICY = """\
permit(principal, action, resource)
unless { principal == Principal::"acs:ram::1:user/intruder" };
"""

_MORE = """
hedge_after_ms = 1
deadline_ms = 2000
policies = "policies"

[[kmi]]
name = "second"
type = "pkcs11"
module = "{module}"
token = "{token}"
pin = {{ file = "{pin}" }}
lanes = 1

[[keystore]]
name = "narrow"
protocol = "xki"
path_prefix = "/narrow"
kmi = ["local"]
credentials = "credentials/demo.toml"
quota.all = {{ rate = 0.001, burst = 1 }}

[[keystore]]
name = "elsewhere"
protocol = "xki"
path_prefix = "/elsewhere"
kmi = ["local"]
credentials = "credentials/demo.toml"
source_networks = ["192.0.2.0/24"]
"""


class Clouded(Installation):
    """Two KMIs on a token, three key stores, and all that can go wrong with a request."""

    def __init__(self, directory: Path, hsm: Hsm) -> None:
        self._hsm = hsm
        super().__init__(directory)
        text = self.config.read_text().replace('kmi = ["local"]', 'kmi = ["local", "second"]')
        text = text.replace("[server]", f"[server]\nmax_connections = {CONNECTIONS}", 1)
        more = _MORE.format(module=hsm.module, token=hsm.token, pin=hsm.pin_file)
        # A lane that is made to hang must not be replaced before a request has waited in vain.
        hanging = 'type = "pkcs11"\noperation_timeout_ms = 10000'
        self.config.write_text((text + more).replace('type = "pkcs11"', hanging))
        (directory / "policies").mkdir()
        (directory / "policies" / "demo.cedar").write_text(_POLICY)
        self.run("keys", "enable", "demo-key", "--kmi", "second")
        self.run("keys", "create", "old-key", "--kmi", "second")
        self.run("keys", "delete", "old-key", "--days", "7", "--kmi", "second")

    def run(
        self, *arguments: str, status: int = 0, config: bool = True, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        if arguments[0] == "init":
            arguments += (
                "--kmi", "pkcs11", "--module", str(self._hsm.module),
                "--token", self._hsm.token, "--pin-file", str(self._hsm.pin_file),
            )  # fmt: skip
        return super().run(*arguments, status=status, config=config, stdin=stdin)

    def codes_of_a_round(self) -> list[int]:
        """One request of each kind, right and wrong; their statuses."""
        path, body = f"{BASE}/keys/demo-key/encrypt", self.cloud.body(Plaintext="aGVsbG8=")
        stranger = Cloud("XKISTRANGER0000000001", "a-secret-of-nobody-0123456789", self.cloud.host)
        liar = Cloud(self.cloud.access_key_id, "not-the-secret-0123456789", self.cloud.host)
        signed = self.cloud.headers(path, body)
        metadata = {**cloud.METADATA, "PrincipalArn": "acs:ram::1:user/intruder"}
        denied = json.dumps({"RequestMetadata": metadata, "Plaintext": "aGVsbG8="}).encode()
        status, made = self.encrypt(b"hello")
        if status == 200:
            assert self.decrypt(made) == b"hello"
        narrow, elsewhere = (path.replace("/demo", name, 1) for name in ("/narrow", "/elsewhere"))
        return [
            status,
            self.call("health")[0],
            self.call("random", Length=16)[0],
            self.call("meta", "demo-key")[0],
            self.call("encrypt", "no-such-key", Plaintext="aGVsbG8=")[0],
            self.call("decrypt", "demo-key", CiphertextBlob="AAAAAAA=", Iv="AAAA")[0],
            self.send(path, body, signed)[0],
            self.send(path, body, signed)[0],  # a replay
            self.send(path, body, liar.headers(path, body))[0],
            self.send(path, body, stranger.headers(path, body))[0],
            self.send(path, denied, self.cloud.headers(path, denied))[0],
            self.send(narrow, body, self.cloud.headers(narrow, body))[0],
            self.send(elsewhere, body, self.cloud.headers(elsewhere, body))[0],
            self.send("/nowhere", body, self.cloud.headers("/nowhere", body))[0],
        ]

    def connect_too_often(self) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(CONNECTIONS + 2):
                plain = socket.create_connection(("127.0.0.1", self.port), timeout=10)
                tls = self.trust.wrap_socket(plain, server_hostname="localhost")
                stack.enter_context(tls)
            wait_for(lambda: 'reason="connections"' in self.admin("metrics")[1])
        wait_for(self._answers_again)

    def _answers_again(self) -> bool:
        try:
            return self.call("health")[0] == 200
        except OSError:
            return False

    def lanes_of(self, kmi: str) -> list[int]:
        assert self.process is not None
        titles = children(self.process.pid).items()
        return [pid for pid, title in titles if title.endswith(f" of KMI {kmi}")]

    def reloads(self) -> None:
        """One that succeeds and one that fails."""
        assert self.process is not None
        text = self.config.read_text()
        for content, outcome in ((text, "ok"), ("nonsense", "failed")):
            self.config.write_text(content)
            self.process.send_signal(signal.SIGHUP)
            sample = f'xkiproxy_reloads_total{{outcome="{outcome}"}} 1.0'
            wait_for(lambda sample=sample: sample in self.admin("metrics")[1])
        self.config.write_text(text)

    def fail_over(self) -> None:
        """A request that the second KMI serves, since the first has lost its lanes."""
        before = self._failovers()

        def happened() -> bool:
            for lane in self.lanes_of("local"):
                os.kill(lane, signal.SIGKILL)
            self.encrypt(b"hello")
            return self._failovers() > before

        wait_for(happened)

    def stall(self) -> None:
        """A request that no KMI answers in time."""

        def happened() -> bool:
            lanes = [pid for kmi in ("local", "second") for pid in self.lanes_of(kmi)]
            for lane in lanes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(lane, signal.SIGSTOP)
            try:
                return self.encrypt(b"hello")[0] == 504
            finally:
                for lane in lanes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(lane, signal.SIGCONT)

        wait_for(happened)

    def break_lanes(self) -> None:
        """Lanes of the first KMI, again and again, each once it is up."""
        assert self.process is not None
        pid = self.process.pid

        def happened() -> bool:
            for lane in set(self.lanes_of("local")) & set(ready_lanes(pid).values()):
                os.kill(lane, signal.SIGKILL)
            return self._sum("xkiproxy_kmi_lane_restarts_total", kmi="local", reason="exit") > 20

        wait_for(happened)

    def _failovers(self) -> float:
        return self._sum("xkiproxy_kmi_failovers_total")

    def _sum(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(self.admin("metrics")[1])
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def lose_token(self) -> None:
        """The KMIs are away: no lane, and none can be started."""
        assert self.process is not None
        (self._hsm.directory / "tokens").rename(self._hsm.directory / "away")
        pid = self.process.pid

        def is_away() -> bool:
            for lane in children(pid) and ready_lanes(pid).values():
                os.kill(lane, signal.SIGKILL)
            for kmi in ("local", "second"):
                for lane in self.lanes_of(kmi):
                    os.kill(lane, signal.SIGKILL)
            text = self.admin("metrics")[1]
            return all(
                f'xkiproxy_kmi_state{{kmi="{kmi}",state="disconnected"}} 1.0' in text
                for kmi in ("local", "second")
            )

        wait_for(is_away)


class Balanced(Installation):
    """Two workers that expect a load balancer's PROXY header."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        text = self.config.read_text().replace("workers = 1 ", "workers = 2 ")
        balancer = '[server.proxy_protocol]\ntrusted = ["127.0.0.0/8"]\n'
        self.config.write_text(text + balancer)

    def refuse_a_connection(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""

    def lose_a_worker(self) -> None:
        assert self.process is not None
        (worker, *_) = children(self.process.pid)
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: "xkiproxy_worker_restarts_total 1.0" in self.admin("metrics")[1])
        wait_for(lambda: self.admin("readyz")[0] == 200)


class Asked(Prometheus):
    """Debian's server, asked whether it has data."""

    def has_data(self, expression: str) -> bool:
        """Whether an expression has a value; fails where Prometheus does not understand it."""
        data = self.ask("query", query=expression)
        if data["resultType"] == "scalar":
            return True
        return any(not math.isnan(float(sample["value"][1])) for sample in data["result"])


@pytest.fixture
def prometheus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """After all of the load."""
    first = Clouded(tmp_path / "first" / "demo", make_hsm(tmp_path / "hsm", monkeypatch))
    second = Balanced(tmp_path / "second" / "demo")
    server = None
    try:
        first.start()
        second.start()
        made = {"first": first, "second": second}
        targets = {name: f"127.0.0.1:{one.admin_port}" for name, one in made.items()}
        server = Asked(tmp_path / "prometheus", targets)
        wait_for(lambda: _scraped(server) == 2)
        plant(first, second)
        yield server
    finally:
        if server is not None:
            server.stop()
        for made in (first, second):
            made.stop()


def _scraped(server: Asked) -> int:
    try:
        return len(server.ask("query", query="xkiproxy_build_info")["result"])
    except PrometheusError:
        return 0


def plant(first: Clouded, second: Balanced) -> None:
    """A mixed load over some seconds, in which everything that is measured happens."""
    seen = []
    for number in range(ROUNDS):
        seen.append(first.codes_of_a_round())
        first.connect_too_often()
        second.refuse_a_connection()
        if number == 2:
            first.reloads()
            second.lose_a_worker()
        if number in {3, 5}:
            first.fail_over()
        if number == 4:
            first.stall()
            first.break_lanes()
        time.sleep(0.5)
    good = [200, 200, 200, 200, 404, 400, 200, 401, 401, 401, 403]
    assert seen[0] == [*good, 200, 403, 404]
    assert seen[1] == [*good, 429, 403, 404]
    first.lose_token()
    for _ in range(3):
        assert first.codes_of_a_round()[0] == 503
        time.sleep(1.1)


def test_panels_rules_and_alerts(prometheus: Asked, tmp_path: Path) -> None:
    """One test, so that the load is made once, however many processes run tests."""
    every_expression_has_data(prometheus)
    every_recorded_series_is_there(prometheus)
    every_rule_is_evaluated_without_an_error(prometheus)
    what_was_planted_raises_alerts_whose_texts_are_whole(prometheus)
    every_panel_is_drawn(prometheus, tmp_path)


def every_expression_has_data(prometheus: Asked) -> None:
    wanted = [*of_panels(), *of_rules()]
    assert len(wanted) > 100
    missing: list[Expression] = wanted
    deadline = time.monotonic() + 30
    while missing and time.monotonic() < deadline:
        missing = [
            one for one in missing if one.where in MAY_BE_EMPTY or not prometheus.has_data(one.text)
        ]
        if {one.where for one in missing} <= MAY_BE_EMPTY:
            break
        time.sleep(1)
    assert {one.where for one in missing} == MAY_BE_EMPTY


def every_recorded_series_is_there(prometheus: Asked) -> None:
    for rule in rules("record"):
        wait_for(lambda name=rule["record"]: prometheus.has_data(name))


def every_rule_is_evaluated_without_an_error(prometheus: Asked) -> None:
    found = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert len(found) == len(rules("record")) + len(rules("alert"))
    assert [rule["name"] for rule in found if rule["health"] != "ok"] == []


def what_was_planted_raises_alerts_whose_texts_are_whole(prometheus: Asked) -> None:
    def active() -> dict[str, Any]:
        return {alert["labels"]["alertname"]: alert for alert in prometheus.ask("alerts")["alerts"]}

    planted = {"XkiproxyKmiDisconnected", "XkiproxyLanesFlapping"}
    wait_for(lambda: planted <= set(active()))
    for name, alert in active().items():
        texts = " ".join(alert["annotations"].values())
        assert "<no value>" not in texts, name
        assert "<error" not in texts, name
    assert "KMI local is away" in {
        alert["annotations"]["summary"] for alert in prometheus.ask("alerts")["alerts"]
    }


def every_panel_is_drawn(prometheus: Asked, folder: Path) -> None:
    span = Span(prometheus.url, time.time() - 60, time.time(), 1)
    for path in BOARDS:
        figure = draw(board(path), span)
        texts = [text.get_text() for text in figure.texts]
        assert {panel["title"] for panel in panels(path)} <= set(texts)
        assert "No data" not in texts, path
        save(figure, folder / "drawn.png")
        picture = image.imread(folder / "drawn.png")
        assert picture.shape[1] == 1440
        assert picture.std() > 0.05  # there is something on it
    what_cannot_be_drawn_is_named(span)


def what_cannot_be_drawn_is_named(span: Span) -> None:
    whole = board(BOARDS[0])
    panel = {**panels(BOARDS[0])[1], "gridPos": {"h": 8, "w": 12}}
    assert panel["type"] in KINDS
    unit = {"defaults": {**panel["fieldConfig"]["defaults"], "unit": "furlongs"}}
    for changed, named in ({"type": "piechart"}, "piechart"), ({"fieldConfig": unit}, "furlongs"):
        with pytest.raises(ValueError, match=f"panel '{panel['title']}': .*'{named}'"):
            draw({**whole, "panels": [{**panel, **changed}]}, span)
    panel["targets"] = [{**panel["targets"][0], "expr": "rate("}]
    with pytest.raises(PrometheusError, match=r"rate\(: .*parse error"):
        draw({**whole, "panels": [panel]}, span)
