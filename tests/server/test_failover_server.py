"""A key store on two KMIs of real lanes: under load the first is stopped, killed and returns."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from hsm import Hsm, children, make_hsm
from test_end_to_end import wait_for
from test_hsm_server import HsmInstallation, Load

ROUNDS = 6
CLIENTS = 4

_SECOND = """
[[kmi]]
name = "second"
type = "pkcs11"
module = "{module}"
token = "{token}"
pin = {{ file = "{pin}" }}
lanes = 1
"""


class TwoKmis(HsmInstallation):
    """`local` and `second` are KMIs of their own on one token, so both hold the key."""

    def __init__(self, directory: Path, hsm: Hsm) -> None:
        super().__init__(directory, hsm)
        text = self.config.read_text().replace("deadline_ms = 2000", "deadline_ms = 1000")
        text = re.sub(r'kmi = \["local"\]', 'kmi = ["local", "second"]', text)
        second = _SECOND.format(module=hsm.module, token=hsm.token, pin=hsm.pin_file)
        self.config.write_text(text + second)
        self.run("keys", "enable", "demo-key", "--kmi", "second")

    def lanes_of(self, name: str) -> list[int]:
        return [
            pid for pid, title in children(self.pid).items() if title.endswith(f" of KMI {name}")
        ]

    def counted(self, metric: str, **labels: str) -> float:
        wanted = [f'{name}="{value}"' for name, value in labels.items()]
        return sum(
            float(line.rpartition(" ")[2])
            for line in self.admin("metrics")[1].splitlines()
            if line.startswith(metric) and all(label in line for label in wanted)
        )

    def served(self, kmi: str) -> float:
        return self.counted(
            "xkiproxy_kmi_operations_total", kmi=kmi, operation="encrypt", outcome="ok"
        )


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoKmis]:
    made = TwoKmis(tmp_path / "demo", make_hsm(tmp_path / "hsm", monkeypatch))
    made.start()
    yield made
    made.stop()


def stopped(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def killed(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


async def test_the_first_kmi_fails_in_every_way_and_no_client_sees_it(running: TwoKmis) -> None:
    trust = ssl.create_default_context(cafile=str(running.directory / "tls" / "server.crt"))
    connector = aiohttp.TCPConnector(ssl=trust)
    async with aiohttp.ClientSession(connector=connector) as session:
        load = Load(running, session)
        clients = [asyncio.create_task(load.client()) for _ in range(CLIENTS)]
        try:
            for number in range(ROUNDS):
                await back_on_the_first(running)
                hurt = stopped if number % 2 == 0 else killed
                # Again and again, since its supervisor starts new ones.
                for _ in range(5):
                    hurt(await asyncio.to_thread(running.lanes_of, "local"))
                    await asyncio.sleep(0.1)
                killed(await asyncio.to_thread(running.lanes_of, "local"))
            await back_on_the_first(running)
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
    assert load.wrong == []
    assert max(load.seconds) < 1.0
    moved = await asyncio.to_thread(
        running.counted, "xkiproxy_kmi_failovers_total", **{"from": "local", "to": "second"}
    )
    assert moved > 0
    assert moved == await asyncio.to_thread(running.served, "second")


async def test_a_kmi_that_failed_is_shown_as_left_alone(running: TwoKmis) -> None:
    def left_alone(kmi: str) -> float:
        return running.counted("xkiproxy_kmi_left_alone", kmi=kmi)

    await back_on_the_first(running)
    assert (left_alone("local"), left_alone("second")) == (0, 0)

    def is_left_alone() -> bool:
        stopped(running.lanes_of("local"))
        running.encrypt(b"x")
        return left_alone("local") == 1

    await asyncio.to_thread(wait_for, is_left_alone)
    assert left_alone("second") == 0
    killed(running.lanes_of("local"))
    await back_on_the_first(running)
    assert left_alone("local") == 0


async def back_on_the_first(running: TwoKmis) -> None:
    """Within ten seconds all that comes is served by the preferred KMI."""

    def is_back() -> bool:
        before = running.served("local"), running.served("second")
        for _ in range(3):
            assert running.encrypt(b"x")[0] == 200
        after = running.served("local"), running.served("second")
        return after[0] - before[0] >= 3 and after[1] == before[1]

    await asyncio.to_thread(wait_for, is_back, 10.0)
