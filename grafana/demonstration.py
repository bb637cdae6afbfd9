"""The pictures of README and docs/monitoring.md: a proxy under load, with failures planted.

Two KMIs (SoftHSM), two key stores, a real Prometheus. It takes five minutes, and ends by itself.

Example: `python -m grafana.demonstration docs/images`
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import tomllib
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import tomli_w
import typer

from benchmarks.load.preparation import prepare
from benchmarks.load.processes import run_load
from benchmarks.load.requests import Workload
from benchmarks.load.run import Plan
from benchmarks.servers import KEY_ID, ProtocolName, ProxyServer
from grafana.draw import Span, draw, save
from grafana.prometheus import Prometheus, PrometheusError
from xkiproxy.cli.certificate import VALID_DAYS, CertificateKey, self_signed
from xkiproxy.config.secrets import write_secret_file

SCRAPE_SECONDS = 2
PAUSE = 40.0
"""Seconds of each phase."""
RATES: dict[ProtocolName, int] = {"xki": 80, "xks": 40}
FLOOD_RATE = 150
DAYS_LEFT = 5
PICTURES = {
    "overview": ("At a glance", "Traffic", "Errors", "Latency", "Key managers and processes"),
    "kmi": ("State", "Operations", "Failover"),
    "security": ("At a glance", "Signatures", "Certificates and credentials"),
}
"""The rows of each dashboard that are shown."""

_BOARDS = Path(__file__).parent / "dashboards"


class Proxy(ProxyServer):
    """With a second KMI, `standby`: a copy of the first one's token."""

    def __init__(self) -> None:
        super().__init__(kmi="pkcs11", lanes=2)

    def _configure(self) -> None:
        super()._configure()
        settings = tomllib.loads(self.config.read_text())
        first = settings["kmi"][0]
        self._token = self._copy_token(first["token"], "spare")
        settings["kmi"].append({**first, "name": "standby", "token": "spare"})
        for store in settings["keystore"]:
            store["kmi"] = ["local", "standby"]
        self.config.write_text(tomli_w.dumps(settings))
        self._xkiproxy("keys", "enable", KEY_ID, "--kmi", "standby")

    def _copy_token(self, label: str, new_label: str) -> Path:
        """As from a backup; a label and a serial number of its own go into SoftHSM's file."""
        (token,) = (self.directory / "tokens").iterdir()
        copy = shutil.copytree(token, token.with_name("copy"))
        content = (copy / "token.object").read_bytes()
        content = content.replace(label.encode().ljust(32), new_label.encode().ljust(32))
        content = re.sub(rb"[0-9a-f]{16}", secrets.token_hex(8).encode(), content)
        (copy / "token.object").write_bytes(content)
        return token

    def _xkiproxy(self, *arguments: str) -> None:
        self._run(["xkiproxy", *arguments, "--config", str(self.config)])

    @property
    def admin(self) -> str:
        """The address of the admin listener."""
        return self._admin

    def kill_lanes(self, kmi: str, number: int = signal.SIGKILL) -> None:
        """Those that are ready: one that logs in might take the token with it."""
        for name in Path("/proc").iterdir():
            with suppress(OSError):
                title = (name / "cmdline").read_text().rstrip("\0 ")
                parent = (name / "stat").read_text().rpartition(")")[2].split()[1]
                if parent == str(self.pid) and title.endswith(f" of KMI {kmi}"):
                    os.kill(int(name.name), number)

    def lose_token(self) -> None:
        """The first KMI has no lane, and none can be started."""
        # Stopped first: a lane would find the token there, and empty.
        self.kill_lanes("local", signal.SIGSTOP)
        self._token.rename(self.directory / "away")
        self.kill_lanes("local")

    def find_token(self) -> None:
        """What `lose_token` has taken away is there again."""
        (self.directory / "away").rename(self._token)

    def renew_certificate(self, days_left: int) -> None:
        """By one that is nearly over."""
        made = datetime.now(UTC) - timedelta(days=VALID_DAYS - days_left)
        certificate, key = self_signed(["127.0.0.1"], CertificateKey.EC, made)
        (self.site / "tls" / "server.crt").write_text(certificate)
        private_key = self.site / "tls" / "server.key"
        private_key.unlink()
        write_secret_file(private_key, key)
        self._xkiproxy("reload")


@asynccontextmanager
async def beside(*loads: Awaitable[object]) -> AsyncIterator[None]:
    """These loads go on meanwhile; they have an end of their own."""
    tasks = [asyncio.ensure_future(load) for load in loads]
    try:
        yield
    finally:
        await asyncio.gather(*tasks)


async def demonstrate(proxy: Proxy, prometheus: Prometheus, page: Path) -> None:
    """All phases, one after the other; `page` is the picture of the status page."""
    # Connections that break may be made again under either certificate.
    trust = proxy.directory / "trust.crt"
    shutil.copy(proxy.site / "tls" / "server.crt", trust)
    target = replace(proxy.target, ca=str(trust))
    workloads = {name: proxy.workload(name, "mixed") for name in RATES}
    material = {name: await prepare(target, workloads[name]) for name in RATES}

    async def steady(name: ProtocolName, factor: float, seconds: float) -> None:
        plan = Plan(target, workloads[name], 8, seconds, factor * RATES[name], warm_up=0)
        await run_load(plan, material=material[name], progress=False)

    async def flood(workload: Workload, rate: float) -> None:
        plan = Plan(target, workload, 8, PAUSE, rate, warm_up=0, sample_every=10**9)
        await run_load(plan, material=material["xki"], progress=False)

    def say(what: str) -> None:
        print(f"{datetime.now(UTC):%H:%M:%S} {what}; alerts: {active(prometheus)}", flush=True)

    whole = 7 * PAUSE + 10
    async with beside(*(steady(name, 1, whole) for name in RATES)):
        say("a quiet load")
        await asyncio.sleep(PAUSE)
        say("twice the load")
        async with beside(*(steady(name, 1, PAUSE) for name in RATES)):
            pass
        say("a flood of bad signatures")
        liar = replace(workloads["xki"], secret="not-the-secret-0123456789")
        stranger = replace(liar, access_key_id="XKISTRANGER0000000001")
        async with beside(flood(liar, FLOOD_RATE), flood(stranger, FLOOD_RATE / 3)):
            pass
        say("the lanes of a KMI are killed in a loop")
        until = time.monotonic() + PAUSE
        while time.monotonic() < until:
            proxy.kill_lanes("local")
            await asyncio.sleep(1.5)
        say(f"a certificate with {DAYS_LEFT} days left")
        proxy.renew_certificate(DAYS_LEFT)
        await asyncio.sleep(10)
        say("a KMI is gone")
        proxy.lose_token()
        await asyncio.sleep(PAUSE)
        await asyncio.to_thread(photograph, f"http://{proxy.admin}/", page)
        await asyncio.sleep(PAUSE)
        say("it is back")
        proxy.find_token()
    say("the end")


def active(prometheus: Prometheus) -> str:
    """The alerts that fire or are about to."""
    with suppress(PrometheusError):
        found = prometheus.ask("alerts")["alerts"]
        return ", ".join(sorted({f"{a['labels']['alertname']} ({a['state']})" for a in found}))
    return "none yet"


def photograph(url: str, picture: Path) -> None:
    """A page as Chromium (Debian's package) shows it."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             f"--user-data-dir={profile}", "--window-size=900,1250", f"--screenshot={picture}",
             url],
            check=True, capture_output=True, timeout=90,
        )  # fmt: skip


def main(folder: Annotated[Path, typer.Argument(help="Where the pictures go.")]) -> None:
    """Run a proxy in which things are broken, and draw what the dashboards show of it."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        Proxy() as proxy,
        Prometheus(Path(scratch) / "p", {"proxy-1": proxy.admin}, SCRAPE_SECONDS) as prometheus,
    ):
        began = time.time()
        asyncio.run(demonstrate(proxy, prometheus, folder / "status-failing.png"))
        span = Span(prometheus.url, began, time.time(), SCRAPE_SECONDS)
        for name, rows in PICTURES.items():
            board = json.loads((_BOARDS / f"xkiproxy-{name}.json").read_text())
            save(draw(board, span, rows), folder / f"dashboard-{name}.png")


if __name__ == "__main__":
    typer.run(main)
