"""The status page: what it shows, from canned states, and in a real browser."""

from __future__ import annotations

import asyncio
import math
import shutil
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from matplotlib import image
from test_end_to_end import wait_for
from test_workers import Workers

from xkiproxy.observability.metrics import REQUEST_BUCKETS
from xkiproxy.server import admin
from xkiproxy.server.page import POLICY, render
from xkiproxy.server.trend import STEPS, Point, Trend, quantile

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
_WITHOUT_SCRIPTS = '{"profile": {"default_content_setting_values": {"javascript": 2}}}'
_CHROMIUM = shutil.which("chromium")


def store(availability: str = "ACTIVE", **changes: Any) -> dict[str, Any]:
    return {
        "name": "demo", "protocol": "xki", "path": "/demo/kms/xki/v1",
        "availability": availability, "kmis": ["hsm"],
        "credentials": [{"access_key_id": "XKIAAAAAAAAA", "created": "2026-01-02T03:04:05Z"}],
        **changes,
    }  # fmt: skip


def manager(state: str = "connected", error: str = "", **changes: Any) -> dict[str, Any]:
    return {
        "name": "hsm", "type": "pkcs11", "state": state, "error": error,
        "last_error": None, "lanes": ["idle", "busy"], **changes,
    }  # fmt: skip


def process(*stores: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "version": "1.2.3", "pid": 7, "started": "2026-03-01T00:00:00+00:00", "ready": True,
        "problems": [], "keystores": list(stores) or [store()], "kmis": [manager()],
        "reload": {"number": 0, "time": "", "problems": [], "changes": []},
        "audit": {"required": "all", "sinks": [{"name": "file", "up": True, "error": ""}]},
        **changes,
    }  # fmt: skip


SNAPSHOT = {
    "xkiproxy_kmi_lanes": {
        ("hsm", "idle"): [1.0], ("hsm", "busy"): [3.0], ("hsm", "failed"): [0.0],
    },
    "xkiproxy_kmi_queue_depth": {("hsm",): [12.0]},
    "xkiproxy_tls_certificate_expiry_timestamp_seconds": {
        ("public",): [(NOW + timedelta(days=5, hours=1)).timestamp()]
    },
}  # fmt: skip


class Text(HTMLParser):
    """The words of a page, and its tags, which must close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert name not in {"src", "href"}, (tag, value)  # it needs nothing else
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    def __contains__(self, words: str) -> bool:
        return words in " ".join(" ".join(self.words).split())


def shown(status: dict[str, Any], points: list[Point] | None = None) -> Text:
    return Text(render(status, SNAPSHOT, points or [], NOW))


def test_a_server_that_is_well() -> None:
    text = shown(process(), [Point(120.5, 0.5, 0.001, 0.0042)])
    for words in (
        "xkiproxy is ready", "version 1.2.3", "demo active xki /demo/kms/xki/v1 hsm",
        "hsm connected pkcs11 1 idle, 3 busy 12 none", "120.5 requests a second, 0.5 of them",
        "1.0 ms (median), 4.2 ms (99 in 100)", "expires 2026-03-06, in 5 days",
        "credential XKIAAAAAAAAA of demo created 2026-01-02", "file takes records",
        "None since the start.", "2026-03-01 12:00:00 UTC",
    ):  # fmt: skip
        assert words in text, words
    assert "What is wrong" not in text


def test_what_is_wrong_is_first_and_harmless() -> None:
    evil = '<img src=x onerror="alert(1)">'
    kmi = manager("disconnected", evil)
    sinks = [{"name": "syslog", "up": False, "error": "Connection refused"}]
    status = process(
        store("UNAVAILABLE"), ready=False, problems=[f"kmi hsm is disconnected: {evil}"],
        kmis=[kmi], audit={"required": "all", "sinks": sinks},
        reload={"number": 3, "time": "2026-03-01T11:00:00", "problems": [evil], "changes": []},
    )  # fmt: skip
    text = shown(status)
    assert "img" not in text.tags
    for words in (
        "xkiproxy is not ready", f"What is wrong kmi hsm is disconnected: {evil}",
        "demo unavailable", "syslog Connection refused", "failed and changed nothing",
    ):  # fmt: skip
        assert words in text, words


def test_of_several_workers_the_one_that_is_worst_off_counts() -> None:
    well, ill = process(), process(store("DEGRADED"))
    status = {**process(), "workers": [well, None, ill, well]}
    text = shown(status)
    assert "4 workers" in text
    assert "demo degraded" in text
    lanes_of_two_more = 2
    assert text.tags.count("tr") == shown(process()).tags.count("tr") + lanes_of_two_more


def test_every_lane_is_shown() -> None:
    text = shown(process(kmis=[manager("degraded", "no session", lanes=["idle", "failed"])]))
    assert "Lanes KMI lanes hsm lane 0 idle , lane 1 failed" in text
    two = {**process(), "workers": [process(), None, process()]}
    for worker in (1, 3):
        assert f"hsm of worker {worker} lane 0 idle , lane 1 busy" in shown(two)
    assert "worker 2" not in shown(two)


def test_an_error_that_is_over_is_shown_with_its_time() -> None:
    older, newer = (
        manager(last_error={"error": f"error {n}", "time": f"2026-03-01T11:0{n}:00+00:00"})
        for n in (1, 2)
    )
    two = {**process(), "workers": [process(kmis=[newer]), process(kmis=[older])]}
    assert "12 2026-03-01T11:02:00+00:00: error 2" in shown(two)
    assert "error 1" not in shown(two)


def test_plots_have_gaps_and_the_deadline() -> None:
    nothing = Point(0.0, 0.0, math.nan, math.nan)
    slow = Point(10.0, 1.0, 0.1, 0.4)
    page = render(process(), SNAPSHOT, [slow, nothing, slow], NOW)
    assert page.count("<polyline") == 4  # requests, failures, and a latency with a gap
    assert page.count("<line ") == 1
    assert "<line " not in render(process(), SNAPSHOT, [Point(1, 0, 0.01, 0.02)], NOW)
    assert "nan" not in page


# ---- what is plotted ---------------------------------------------------------------------------


def counted(good: int, bad: int, bucket: int) -> dict[str, Any]:
    counts = [0.0] * (len(REQUEST_BUCKETS) + 1)
    counts[bucket] = good + bad
    labels = ("demo", "xki", "encrypt")
    return {
        "xkiproxy_requests": {(*labels, "OK"): [good], (*labels, "InternalError"): [bad]},
        "xkiproxy_request_duration_seconds": {labels: [*counts, 1.0]},
    }


def test_a_trend_has_rates_and_quantiles() -> None:
    trend = Trend(REQUEST_BUCKETS)
    assert trend.points() == []
    trend.add(0.0, {})
    trend.add(5.0, counted(90, 10, 2))
    trend.add(10.0, counted(90, 10, 2))
    busy, idle = trend.points()
    assert (busy.rate, busy.failures) == (20.0, 2.0)
    assert REQUEST_BUCKETS[1] < busy.p50 < busy.p99 <= REQUEST_BUCKETS[2]
    assert (idle.rate, math.isnan(idle.p50), math.isnan(idle.p99)) == (0.0, True, True)
    trend.add(15.0, {})  # counted anew
    assert trend.points() == []
    for number in range(1000):
        trend.add(20.0 + number, {})
    assert len(trend.points()) == STEPS


@pytest.mark.parametrize(
    ("counts", "share", "value"),
    [
        ([10, 0, 0], 0.5, 0.5), ([0, 10, 0], 0.5, 1.5), ([5, 5, 0], 0.5, 1.0),
        ([0, 0, 7], 0.99, 2.0), ([99, 1, 0], 0.99, 1.0),
    ],
)  # fmt: skip
def test_quantiles_are_linear_within_a_bucket(
    counts: list[float], share: float, value: float
) -> None:
    assert quantile([1.0, 2.0], counts, share) == pytest.approx(value)


async def test_a_sample_that_fails_does_not_end_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samples = iter([counted(1, 0, 2), ValueError("planted")] + [counted(2, 0, 2)] * 1000)

    class Failing:
        async def snapshot(self) -> dict[str, Any]:
            sample = next(samples)
            if isinstance(sample, ValueError):
                raise sample
            return sample

    monkeypatch.setattr(admin, "STEP_SECONDS", 0.01)
    trend = Trend(REQUEST_BUCKETS)
    sampling = asyncio.create_task(admin._sample(Failing(), trend))
    while not trend.points():
        assert not sampling.done()
        await asyncio.sleep(0.01)
    sampling.cancel()
    assert "planted" in caplog.text


# ---- in a browser ------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path / "demo", request.param)
    made.start()
    yield made
    made.stop()


def browser(server: Workers, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Chromium on the page, with what its console says; it ends by itself."""
    assert _CHROMIUM, "chromium is missing: run tests/system-packages.sh"
    return subprocess.run(
        [
            _CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--enable-logging=stderr", f"--user-data-dir={profile}", *options,
            f"http://127.0.0.1:{server.admin_port}/",
        ],
        capture_output=True, text=True, check=True, timeout=90,
    )  # fmt: skip


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("runs_scripts", [True, False])
def test_in_a_browser(server: Workers, tmp_path: Path, runs_scripts: bool) -> None:
    for _ in range(5):
        assert server.encrypt(b"x")[0] == 200
    profile = tmp_path / "profile"
    if not runs_scripts:
        (profile / "Default").mkdir(parents=True)
        (profile / "Default" / "Preferences").write_text(_WITHOUT_SCRIPTS)
    done = browser(server, profile, "--dump-dom")
    assert console(done) == []
    text = Text(done.stdout.removeprefix("<!DOCTYPE html>"))
    for words in ("xkiproxy is ready", "demo active", "local connected", "takes records"):
        assert words in text, words
    assert server.cloud.access_key_id in text
    assert server.cloud.secret not in done.stdout


class Shown:
    """A page that stays open in Chromium, asked over its debugging protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._count = 0

    async def text(self) -> str:
        """The title and what a reader sees."""
        self._count += 1
        # There is no body yet while a page is being loaded.
        expression = "document.title + ' | ' + (document.body?.innerText ?? '')"
        call = {"method": "Runtime.evaluate", "params": {"expression": expression}}
        await self._socket.send_json({"id": self._count, **call})
        while (answer := await self._socket.receive_json()).get("id") != self._count:
            pass
        return str(answer["result"]["result"]["value"])

    async def wait_for(self, words: str, seconds: float = 45) -> str:
        deadline = time.monotonic() + seconds
        while words not in (text := await self.text()):
            assert time.monotonic() < deadline, text
            await asyncio.sleep(0.2)
        return text


@asynccontextmanager
async def opened(url: str, profile: Path) -> AsyncIterator[Shown]:
    assert _CHROMIUM, "chromium is missing: run tests/system-packages.sh"
    process = await asyncio.create_subprocess_exec(
        _CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={profile}", "--remote-debugging-port=0", url,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        port_file = profile / "DevToolsActivePort"
        while not (port_file.exists() and port_file.read_text()):
            await asyncio.sleep(0.05)
        where = f"http://127.0.0.1:{port_file.read_text().split()[0]}/json"
        async with aiohttp.ClientSession() as session:
            while True:
                tabs = await (await session.get(where)).json()
                if pages := [tab for tab in tabs if tab["url"] == url]:
                    break
                await asyncio.sleep(0.05)
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"]) as socket:
                yield Shown(socket)
    finally:
        process.terminate()
        await process.communicate()


async def test_a_page_that_is_out_of_date_says_so(tmp_path: Path) -> None:
    """A proxy that hangs, answers with an error or with something else, and is well again."""
    answers: dict[str, Callable[[], web.Response]] = {
        "well": lambda: web.Response(
            text=render(process(), SNAPSHOT, [], NOW), content_type="text/html",
            headers={"Content-Security-Policy": POLICY},
        ),
        "error": lambda: web.Response(status=500, text="500 Internal Server Error"),
        "other": lambda: web.Response(text="<h1>It works!</h1>", content_type="text/html"),
    }  # fmt: skip
    state = "well"

    async def answer(_: web.Request) -> web.Response:
        if state == "hangs":
            await asyncio.sleep(3600)
        return answers[state]()

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        async with opened(url, tmp_path / "profile") as page:
            await page.wait_for("xkiproxy is ready")
            for failing in ("hangs", "error", "other"):
                state = failing
                text = await page.wait_for("xkiproxy does not answer")
                assert text.startswith("xkiproxy: no answer | ")
                assert "No answer since 2026-03-01 12:00:00 UTC" in text
                assert "demo" in text  # what was known is still there
                state = "well"
                assert "No answer" not in await page.wait_for("xkiproxy is ready")
    finally:
        await runner.cleanup()


def test_both_themes_are_painted(server: Workers, tmp_path: Path) -> None:
    pictures = {}
    for name, number in (("dark", 0), ("light", 1)):
        file = tmp_path / f"{name}.png"
        done = browser(
            server, tmp_path / name, f"--blink-settings=preferredColorScheme={number}",
            "--window-size=390,900", f"--screenshot={file}",
        )  # fmt: skip
        assert console(done) == []
        pictures[name] = 255 * image.imread(file)[..., :3]
    assert pictures["dark"].mean() < 90
    assert pictures["light"].mean() > 200
    assert pictures["light"].std() > 10  # there is something on it


def test_headers_let_nothing_in(server: Workers) -> None:
    url = f"http://127.0.0.1:{server.admin_port}/"
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Cache-Control"] == "no-store"
    wait_for(lambda: "requests a second" in server.admin("")[1])
