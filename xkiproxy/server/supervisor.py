"""The supervisor of several worker processes: it starts them, replaces them, speaks for them.

Workers share the public port; the kernel spreads connections over them. A worker that ends, or does
not answer for ten seconds, is replaced, at once the first time and then with pauses that grow. What
it had counted is kept, so that counters never fall. On SIGTERM all finish what they have begun.

Files are read here alone, at the start and at a reload, and handed to the workers. One that is
started later gets what was accepted last: what is in the files by then was perhaps refused, or
nobody wants it yet.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from prometheus_client import generate_latest

from xkiproxy import __version__
from xkiproxy.config import ConfigError, Problem
from xkiproxy.config.models import split_address
from xkiproxy.keystores.quotas import make_quota_table
from xkiproxy.keystores.shared_replay import make_replay_table
from xkiproxy.observability.metrics import Metrics
from xkiproxy.observability.series import Snapshot, from_json
from xkiproxy.server.admin import admin_listener
from xkiproxy.server.contents import Handout, read_handout, read_secrets
from xkiproxy.server.listener import bind
from xkiproxy.server.notify import notify_ready, notify_reload, notify_stopping
from xkiproxy.server.reload import History, config_path, refusing, texts
from xkiproxy.server.runtime import STOPPING, Tables
from xkiproxy.server.signals import Signals, hangups_held

_log = logging.getLogger(__name__)

_REPORT_LIMIT = 16 << 20
_ASK_SECONDS = 2.0
_ANSWER_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 0.1
_LAST_PAUSE_SECONDS = 5.0
_STEADY_SECONDS = 10.0
_KILL_SECONDS = 5.0
_START_SECONDS = 120.0


class WorkerError(Exception):
    """A worker process could not be started; it has said why."""


class _Channel:
    """The lines that are said to a worker process, each answered by one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._asking = asyncio.Lock()

    async def say(self, line: bytes, seconds: float = _ANSWER_SECONDS) -> Any:
        """What the worker answers; None if it does not."""
        async with self._asking:
            if self._writer.is_closing():
                # uvloop closes it at its end, and raises a RuntimeError when it is written to.
                return None
            try:
                self._writer.write(line + b"\n")
                async with asyncio.timeout(seconds):
                    answer = await self._reader.readline()
                return orjson.loads(answer) if answer else None
            except (OSError, TimeoutError, ValueError):
                # What comes after this could not be told from the answer to something else: without
                # its channel the worker ends, and is replaced.
                self.close()
                return None

    def close(self) -> None:
        """Say no more: the worker finishes what it has begun, and ends."""
        self._writer.close()


class _Worker:
    """One place for a worker process, and the process that fills it now."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.process: subprocess.Popen[bytes] | None = None
        self.report: dict[str, Any] | None = None
        """What it said last; None until it serves."""
        self.channel: _Channel | None = None
        """None until it serves, too."""

    @property
    def name(self) -> str:
        return f"worker {self.index + 1}"


async def supervise(path: Path, signals: Signals) -> None:
    """Run the workers until a signal says stop.

    Raises:
        ConfigError: the configuration cannot be used.
        OSError: a listener cannot be opened.
        WorkerError: a worker cannot start.
    """
    supervisor = Supervisor(read_handout(path))
    async with admin_listener(supervisor.config.server.admin_listen, supervisor):
        await supervisor.run(signals)


class Supervisor:
    """See the module; it is also the overview that the admin listener shows."""

    def __init__(self, accepted: Handout) -> None:
        self.config = config = accepted.config()
        self._accepted = accepted
        self._secrets = read_secrets(config)
        self._workers = [_Worker(index) for index in range(config.server.workers)]
        self._metrics = Metrics()
        self._restarts = self._metrics.worker_restarts.labels()
        self._ended: Snapshot = {}
        self._started = datetime.now(UTC)
        self._address = ""
        self._tables = Tables(-1, -1)
        self._history = History()
        self._joining = asyncio.Lock()
        """Held while what is accepted changes, and while one begins to serve what is accepted."""
        self._stopping = False

    async def run(self, signals: Signals) -> None:
        """See `supervise`."""
        # Bound, not listening: it keeps the port for the workers, whichever they are.
        place = bind(self.config.server.listen, shares_port=True)
        host, _ = split_address(self.config.server.listen)
        port = place.getsockname()[1]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        replay = make_replay_table(self.config.server.replay_capacity)
        self._tables = Tables(replay, make_quota_table())
        keepers: list[asyncio.Task[None]] = []
        try:
            await asyncio.gather(*(self._start(worker) for worker in self._workers))
            scheme = "https" if self.config.server.tls else "http"
            count = len(self._workers)
            _log.info("xkiproxy %s serves %s://%s:%d with %d workers",
                      __version__, scheme, host, port, count)  # fmt: skip
            keepers = [asyncio.create_task(self._keep(worker)) for worker in self._workers]
            async with signals.reloading(self.reload):
                signals.serving()
                notify_ready()
                await signals.stop.wait()
                self._stopping = True
                settings = self.config.server
                grace = settings.shutdown_timeout_seconds + 2 * _KILL_SECONDS
                await notify_stopping(signals.stop, settings.shutdown_delay_seconds, grace)
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
            await asyncio.gather(*(self._end(worker) for worker in self._workers))
            place.close()
            for table in self._tables:
                os.close(table)

    # ---- processes ---------------------------------------------------------------------------

    async def _start(self, worker: _Worker) -> None:
        """Start a process and wait until it serves; raises WorkerError or OSError."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        channel = _Channel(*await asyncio.open_connection(sock=ours, limit=_REPORT_LIMIT))
        try:
            with theirs:
                worker.process = self._spawn(worker.index, theirs.fileno())
            await self._let_serve(worker, channel)
        finally:
            if worker.channel is None:
                channel.close()
        if worker.channel is None:
            # What is wrong it has said in its log.
            status = await _stop(worker.process)
            raise WorkerError(f"{worker.name} did not start (status {status}): see its log above")

    async def _let_serve(self, worker: _Worker, channel: _Channel) -> None:
        """Hand it what is accepted, and let it serve as soon as it can, if that is so still."""
        accepted = self._accepted
        handout = accepted.model_copy(update={"secrets": self._secrets})
        if await channel.say(handout.line(), _START_SECONDS) is None:
            return
        async with self._joining:
            if accepted is not self._accepted:
                _log.info("%s has a configuration that is no more: it is ended", worker.name)
                return
            worker.report = await channel.say(b"serve")
            if worker.report is not None:
                worker.channel = channel

    def _spawn(self, index: int, channel: int) -> subprocess.Popen[bytes]:
        descriptors = (channel, *self._tables)
        arguments = (str(index), self._address, *map(str, descriptors))
        with hangups_held():
            return subprocess.Popen(  # noqa: S603 - our own program, no text of others
                [sys.executable, "-m", "xkiproxy.server.worker", *arguments],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for the supervisor, which then stops them
            )

    async def _keep(self, worker: _Worker) -> None:
        """Watch over a worker, and replace it when it has ended or hangs."""
        pause = 0.0
        while True:
            began = time.monotonic()
            await self._watch(worker)
            self._bury(worker)
            if time.monotonic() - began > _STEADY_SECONDS:
                pause = 0.0
            while True:
                await asyncio.sleep(pause)
                pause = min(max(pause * 2, _FIRST_PAUSE_SECONDS), _LAST_PAUSE_SECONDS)
                self._restarts.inc()
                try:
                    await self._start(worker)
                    break
                except (OSError, WorkerError) as error:
                    _log.error("%s", error)

    async def _watch(self, worker: _Worker) -> None:
        """Returns when a worker is no more."""
        answers = True
        while answers:
            await asyncio.sleep(_ASK_SECONDS)
            answers = await self._ask(worker)
        process = worker.process
        if process is None:
            return
        if process.poll() is None:
            _log.error("%s does not answer and is killed", worker.name)
            process.kill()
        status = await _wait(process, _KILL_SECONDS)
        _log.error("%s ended with status %s", worker.name, status)

    async def _ask(self, worker: _Worker) -> bool:
        """Take a new report; False if none came."""
        report = None if worker.channel is None else await worker.channel.say(b"report")
        if report is None:
            return False
        worker.report = report
        return True

    async def reload(self) -> None:
        """Let all workers take over a changed configuration, or none of them."""
        with notify_reload():
            await self._reload()

    async def _reload(self) -> None:
        problems: list[str] = []
        changes: list[str] = []
        try:
            with refusing("", self.config.path):
                handout = await asyncio.to_thread(read_handout, self.config.path)
            async with self._joining:
                changes = await self._offer(handout)
            # Who learns from /status that it is done must find there what is served from now on.
            await asyncio.gather(*(self._ask(worker) for worker in self._workers))
        except ConfigError as error:
            problems = texts(error)
            await self._tell(self._workers, _refusal(problems))
        self._history.add(problems, changes)
        self._metrics.count_reload(succeeded=not problems)

    async def _offer(self, handout: Handout) -> list[str]:
        """Let those that serve take it over: what changes. Raises ConfigError if nothing does.

        Each opens and checks it first. A worker that fails after that is replaced by one that has
        what the others have by then.
        """
        answers = await self._tell(self._workers, b"prepare " + handout.line())
        self._refuse_for({worker: said and said["problems"] for worker, said in answers.items()})
        before, self._accepted = self._accepted, handout
        applied = await self._tell(self._workers, b"apply")
        if all(applied.values()):
            # Each says why it cannot, and has changed nothing.
            self._accepted = before
            self._refuse_for(applied)
        changes: list[str] = next(iter(answers.values()))["changes"]
        failed = {worker: problems for worker, problems in applied.items() if problems != []}
        return changes + [await self._give_up(*item) for item in failed.items()]

    def _refuse_for(self, answers: dict[_Worker, list[str] | None]) -> None:
        """Raise ConfigError if workers have problems, or there is no worker."""
        found = [] if answers else ["no worker is there that could check it"]
        for worker, problems in answers.items():
            found += [f"{worker.name} does not answer"] if problems is None else problems
        if found:
            each_once = dict.fromkeys(found)
            raise ConfigError(self.config.path, [Problem("", text) for text in each_once])

    async def _give_up(self, worker: _Worker, problems: list[str] | None) -> str:
        """End a worker that has not taken over what others have; says so."""
        why = "it did not answer" if problems is None else "; ".join(problems)
        said = f"{worker.name} is replaced, since it could not take this over: {why}"
        await self._tell([worker], _refusal([said]))
        if worker.channel is None or worker.process is None:
            return said  # it has ended already
        if problems is None:
            # It may serve what is no more, whenever it goes on: at once, as `_watch` would.
            worker.process.kill()
        else:
            worker.process.terminate()
        return said

    async def _tell(self, workers: list[_Worker], line: bytes) -> dict[_Worker, Any]:
        """What those of these workers answer that serve; None where one does not."""
        asked = {worker: worker.channel for worker in workers if worker.channel is not None}
        answers = await asyncio.gather(*(channel.say(line) for channel in asked.values()))
        return dict(zip(asked, answers, strict=True))

    def _bury(self, worker: _Worker) -> None:
        """Keep what an ended worker had counted."""
        if worker.channel is not None:
            worker.channel.close()
        collection = self._metrics.collection
        if worker.report is not None:
            counted = collection.lasting(from_json(worker.report["metrics"]))
            self._ended = collection.merge([self._ended, counted])
        worker.report = worker.channel = worker.process = None

    async def _end(self, worker: _Worker) -> None:
        process = worker.process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            grace = self.config.server.shutdown_timeout_seconds + _KILL_SECONDS
            if await _wait(process, grace) is None:
                _log.warning("%s did not end in time and is killed", worker.name)
                process.kill()
                await _wait(process, _KILL_SECONDS)
        if worker.channel is not None:
            worker.channel.close()

    # ---- overview ----------------------------------------------------------------------------

    async def metrics(self) -> bytes:
        """See `Overview`."""
        snapshot = await self.snapshot()
        self._metrics.collection.read = lambda: snapshot
        return generate_latest(self._metrics.registry)

    async def snapshot(self) -> Snapshot:
        """See `Overview`: what all workers have counted, those that ended among them."""
        await asyncio.gather(*(self._ask(worker) for worker in self._workers))
        collection = self._metrics.collection
        snapshots = [from_json(report["metrics"]) for report in self._reports()]
        return _with_one_state(collection.merge([collection.snapshot(), self._ended, *snapshots]))

    async def obstacles(self) -> list[str]:
        """See `Overview`: a server is ready when all of its workers are."""
        return [STOPPING] if self._stopping else self._said("obstacles")

    def _said(self, what: str) -> list[str]:
        """The `problems` or `obstacles` of all workers."""
        found = []
        for worker in self._workers:
            report = worker.report
            texts = ["it is being started"] if report is None else report[what]
            found += [f"{worker.name}: {text}" for text in texts]
        return found

    async def status(self) -> dict[str, Any]:
        """See `Overview`."""
        return {
            "version": __version__,
            "pid": os.getpid(),
            "config": config_path(self.config.path),
            "started": self._started.isoformat(timespec="seconds"),
            "ready": not await self.obstacles(),
            "problems": self._said("problems"),
            "reload": self._history.status(),
            "workers": [
                None if worker.report is None else worker.report["status"]
                for worker in self._workers
            ],
        }

    def _reports(self) -> Iterator[dict[str, Any]]:
        for worker in self._workers:
            if worker.report is not None:
                yield worker.report


def _refusal(problems: list[str]) -> bytes:
    return b"refuse " + orjson.dumps(problems)


def _with_one_state(snapshot: Snapshot) -> Snapshot:
    """A KMI that is in different states at different workers is degraded."""
    states = dict(snapshot.get("xkiproxy_kmi_state", {}))
    for kmi in {kmi for kmi, _ in states}:
        held = [labels for labels, (value,) in states.items() if labels[0] == kmi and value]
        if len(held) > 1:
            for labels in held:
                states[labels] = [0.0]
            states[kmi, "degraded"] = [1.0]
    return {**snapshot, "xkiproxy_kmi_state": states}


async def _stop(process: subprocess.Popen[bytes] | None) -> int | None:
    """The status of a process that is of no use; it may end by itself first."""
    if process is None:
        return None
    status = await _wait(process, _KILL_SECONDS)
    if status is None:
        process.kill()
        status = await _wait(process, _KILL_SECONDS)
    return status


async def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The status of a process that ends within this time."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return process.returncode
