"""All workers of a server serve what was accepted last, whatever is in the files meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from test_end_to_end import wait_for
from test_reload import everywhere, refused, reload
from test_workers import Workers

from xkiproxy.config import load_config
from xkiproxy.server import supervisor as module
from xkiproxy.server.contents import Handout, read_handout
from xkiproxy.server.signals import Signals
from xkiproxy.server.supervisor import Supervisor

NOBODY = "credential = []\n"


@pytest.fixture
def site(tmp_path: Path) -> Workers:
    return Workers(tmp_path / "demo")


@pytest.fixture
def credentials(site: Workers) -> Path:
    return site.directory / "credentials" / "demo.toml"


def replace(server: Workers, worker: int) -> None:
    """Kill a worker and wait until another has taken its place."""
    before = server.pids()[worker]
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: server.pids().get(worker) not in {None, before})
    wait_for(lambda: server.admin("readyz")[0] == 200)


def test_a_worker_is_replaced_by_one_that_has_what_was_accepted(
    site: Workers, credentials: Path
) -> None:
    config, granted = site.config.read_text(), credentials.read_text()
    site.start()
    try:
        # Nobody has reloaded it.
        credentials.write_text(NOBODY)
        replace(site, 1)
        assert everywhere(site, site.cloud) == {200}
        # A reload has refused it.
        site.config.write_text(config + '[log]\nlevel = "debug"\n')
        assert "log: cannot change" in refused(site)
        replace(site, 2)
        assert everywhere(site, site.cloud) == {200}
        # Half of it is written, and the rest is away.
        site.config.write_text(config + "[[keysto")
        for folder in ("tls", "credentials"):
            shutil.move(site.directory / folder, site.directory / f"{folder}.away")
        (site.directory / "master.key").rename(site.directory / "master.away")
        replace(site, 1)
        assert everywhere(site, site.cloud) == {200}
        # A reload has taken it, and nobody has reloaded it since.
        site.config.write_text(config)
        for folder in ("tls", "credentials"):
            shutil.move(site.directory / f"{folder}.away", site.directory / folder)
        (change,) = reload(site)
        assert "no more" in change
        assert everywhere(site, site.cloud) == {401}
        credentials.write_text(granted)
        replace(site, 2)
        assert everywhere(site, site.cloud) == {401}
        assert site.sample("xkiproxy_worker_restarts_total") == 4
    finally:
        site.stop()
    assert "Traceback" not in site.output.read_text()


@asynccontextmanager
async def supervised(site: Workers) -> AsyncIterator[Supervisor]:
    """A supervisor in this process, with its workers."""
    signals = Signals()
    made = Supervisor(read_handout(site.config))
    running = asyncio.create_task(made.run(signals))
    await until(made)
    try:
        yield made
    finally:
        signals.stop.set()
        await running


async def until(supervisor: Supervisor, holds: Callable[[], bool] = lambda: True) -> None:
    """Wait until this holds, and all workers serve."""
    async with asyncio.timeout(60):
        while not holds() or await supervisor.obstacles():
            await asyncio.sleep(0.05)


def restarts(supervisor: Supervisor) -> float | None:
    return supervisor._metrics.registry.get_sample_value("xkiproxy_worker_restarts_total")


def events(site: Workers, worker: int) -> list[dict[str, Any]]:
    lines = (site.directory / f"audit-{worker}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if record.get("event", "").startswith("reload")]


async def answers(site: Workers) -> set[int]:
    return await asyncio.to_thread(everywhere, site, site.cloud)


def before_saying(monkeypatch: pytest.MonkeyPatch, command: bytes, act: Callable[[], None]) -> None:
    """Do something just before all workers are told a command."""
    tell = Supervisor._tell

    async def tell_later(self: Supervisor, workers: Any, line: bytes) -> Any:
        if line.startswith(command):
            act()
        return await tell(self, workers, line)

    monkeypatch.setattr(Supervisor, "_tell", tell_later)


def limit_files(supervisor: Supervisor, index: int, files: int) -> None:
    """Let a worker open no file any more, or as many as before."""
    process = supervisor._workers[index].process
    assert process is not None
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (files, 4096))


async def test_all_workers_get_what_was_read_once(
    site: Workers, credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that change while workers prepare change nothing for any of them."""
    granted = credentials.read_text()
    async with supervised(site) as supervisor:
        credentials.write_text(NOBODY)
        before_saying(monkeypatch, b"prepare", lambda: credentials.write_text(granted))
        await supervisor.reload()
        assert supervisor._history.problems == []
        assert await answers(site) == {401}


async def test_a_worker_that_misses_a_reload(
    site: Workers, credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reload is refused, and what replaces the worker has what the others have."""
    monkeypatch.setattr(module._Channel.say, "__defaults__", (5.0,))
    async with supervised(site) as supervisor:
        process = supervisor._workers[1].process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        credentials.write_text(NOBODY)
        await supervisor.reload()
        assert supervisor._history.problems == ["worker 2 does not answer"]
        await until(supervisor, lambda: restarts(supervisor) == 1)
        assert await answers(site) == {200}
        assert [event["event"] for event in events(site, 1)] == ["reload_failed"]
        await supervisor.reload()
        assert supervisor._history.problems == []
        assert await answers(site) == {401}


async def test_a_worker_that_cannot_apply_what_it_has_prepared(
    site: Workers, credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is replaced: the others serve what was accepted, so it must not go on."""
    async with supervised(site) as supervisor:
        credentials.write_text(NOBODY)
        with monkeypatch.context() as patch:
            before_saying(patch, b"apply", lambda: limit_files(supervisor, 1, 3))
            await supervisor.reload()
        change, replaced = supervisor._history.changes
        assert "no more" in change
        assert replaced.startswith("worker 2 is replaced, since it could not take this over:")
        assert "Too many open files" in replaced
        await until(supervisor, lambda: restarts(supervisor) == 1)
        assert await answers(site) == {401}
        assert [event["event"] for event in events(site, 1)] == ["reload_ok"]
        (failed,) = events(site, 2)
        assert failed["event"] == "reload_failed"
        assert failed["problems"] == [replaced]


async def test_what_no_worker_can_apply_is_refused(
    site: Workers, credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with supervised(site) as supervisor:
        credentials.write_text(NOBODY)
        with monkeypatch.context() as patch:
            before_saying(patch, b"apply", lambda: [limit_files(supervisor, i, 3) for i in (0, 1)])
            await supervisor.reload()
        assert supervisor._history.problems == ["server.listen: Too many open files"]
        for index in (0, 1):
            limit_files(supervisor, index, 4096)
        assert await answers(site) == {200}
        assert restarts(supervisor) == 0
        await supervisor.reload()
        assert supervisor._history.problems == []
        assert await answers(site) == {401}


async def test_a_reload_while_a_worker_is_being_started(
    site: Workers, credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for it; what the worker was started with is no more by then."""
    async with supervised(site) as supervisor:
        credentials.write_text(NOBODY)
        say = module._Channel.say
        reloads = 0

        async def say_and_reload(channel: Any, line: bytes, *seconds: float) -> Any:
            nonlocal reloads
            answer = await say(channel, line, *seconds)
            if line.startswith(b"{") and not reloads:
                reloads += 1
                await supervisor.reload()
            return answer

        monkeypatch.setattr(module._Channel, "say", say_and_reload)
        process = supervisor._workers[0].process
        assert process is not None
        process.kill()
        await until(supervisor, lambda: restarts(supervisor) == 2)
        assert supervisor._history.problems == []
        assert reloads == 1
        assert await answers(site) == {401}


def test_a_handout_arrives_whole_and_shows_no_secret(site: Workers, credentials: Path) -> None:
    handout = read_handout(site.config)
    secrets = {"the source": site.cloud.secret}
    line = handout.model_copy(update={"secrets": secrets}).line()
    assert b"\n" not in line
    arrived = Handout.model_validate_json(line)
    assert arrived == handout.model_copy(update={"secrets": secrets})
    assert arrived.config() == load_config(site.config)
    assert arrived.contents.of_store("demo").credentials == credentials.read_text().strip()
    assert site.cloud.secret not in repr(arrived)
    assert "PRIVATE KEY" not in repr(arrived)


async def test_without_a_worker_nothing_is_accepted(site: Workers) -> None:
    """Nobody could say whether it can be served."""
    supervisor = Supervisor(read_handout(site.config))
    await supervisor.reload()
    assert supervisor._history.problems == ["no worker is there that could check it"]
