"""The supervisor of several worker processes: it starts them, replaces them, speaks for them.

Workers share the public port; the kernel spreads connections over them. A worker that ends, or does
not answer for ten seconds, is replaced, at once the first time and then with pauses that grow. What
it had counted is kept, so that counters never fall. On SIGTERM all finish what they have begun.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import orjson
from prometheus_client import generate_latest

from xkiproxy import __version__
from xkiproxy.config import Config
from xkiproxy.config.models import split_address
from xkiproxy.keystores.quotas import make_quota_table
from xkiproxy.keystores.shared_replay import make_replay_table
from xkiproxy.observability.metrics import Metrics
from xkiproxy.observability.series import Snapshot, from_json
from xkiproxy.server.admin import admin_listener
from xkiproxy.server.listener import bind
from xkiproxy.server.notify import notify_ready, notify_reload, notify_stopping
from xkiproxy.server.reload import History
from xkiproxy.server.runtime import STOPPING, Tables

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


class _Worker:
    """One place for a worker process, and the process that fills it now."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.process: subprocess.Popen[bytes] | None = None
        self.report: dict[str, Any] | None = None
        """What it said last; None until it serves."""
        self.asking = asyncio.Lock()
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    @property
    def name(self) -> str:
        return f"worker {self.index + 1}"


async def supervise(config: Config, stop: asyncio.Event) -> None:
    """Run the workers until `stop` is set; raises OSError, or WorkerError if one cannot start."""
    supervisor = Supervisor(config)
    async with admin_listener(config.server.admin_listen, supervisor):
        await supervisor.run(stop)


class Supervisor:
    """See the module; it is also the overview that the admin listener shows."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._workers = [_Worker(index) for index in range(config.server.workers)]
        self._metrics = Metrics()
        self._restarts = self._metrics.worker_restarts.labels()
        self._ended: Snapshot = {}
        self._started = datetime.now(UTC)
        self._address = ""
        self._tables = Tables(-1, -1)
        self._history = History()
        self._reloading = asyncio.Lock()
        self._stopping = False

    async def run(self, stop: asyncio.Event) -> None:
        """See `supervise`."""
        # Bound, not listening: it keeps the port for the workers, whichever they are.
        place = bind(self._config.server.listen, shares_port=True)
        host, _ = split_address(self._config.server.listen)
        port = place.getsockname()[1]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        replay = make_replay_table(self._config.server.replay_capacity)
        self._tables = Tables(replay, make_quota_table())
        keepers: list[asyncio.Task[None]] = []
        try:
            await asyncio.gather(*(self._start(worker) for worker in self._workers))
            scheme = "https" if self._config.server.tls else "http"
            count = len(self._workers)
            _log.info("xkiproxy %s serves %s://%s:%d with %d workers",
                      __version__, scheme, host, port, count)  # fmt: skip
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.create_task(self.reload()))
            keepers = [asyncio.create_task(self._keep(worker)) for worker in self._workers]
            notify_ready()
            await stop.wait()
            self._stopping = True
            settings = self._config.server
            grace = settings.shutdown_timeout_seconds + 2 * _KILL_SECONDS
            await notify_stopping(stop, settings.shutdown_delay_seconds, grace)
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
        reader, writer = await asyncio.open_connection(sock=ours, limit=_REPORT_LIMIT)
        try:
            with theirs:
                worker.process = self._spawn(worker.index, theirs.fileno())
            async with asyncio.timeout(_START_SECONDS):
                worker.report = orjson.loads(await reader.readline())
        except (TimeoutError, ValueError, ConnectionError):
            # No line, or one that was cut off: what is wrong it has said in its log.
            status = await _stop(worker.process)
            raise WorkerError(
                f"{worker.name} did not start (status {status}): see its log above"
            ) from None
        finally:
            if worker.report is None:
                writer.close()
        # Only now may others ask it: before, they would take its first report for their answer.
        worker.reader, worker.writer = reader, writer

    def _spawn(self, index: int, channel: int) -> subprocess.Popen[bytes]:
        descriptors = (channel, *self._tables)
        arguments = (str(self._config.path), str(index), self._address, *map(str, descriptors))
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
        report = await _say(worker, b"report")
        if report is None:
            return False
        worker.report = report
        return True

    async def reload(self) -> None:
        """Let all workers take over a changed configuration, or none of them.

        Each opens and checks it first. What could still go wrong afterwards is a worker that ends:
        the one that replaces it reads the new configuration.
        """
        async with self._reloading:
            with notify_reload():
                await self._reload()

    async def _reload(self) -> None:
        prepared = await self._tell_all(b"prepare")
        problems = prepared or await self._tell_all(b"apply")
        changes: list[str] = []
        if not problems:
            await asyncio.gather(*(self._ask(worker) for worker in self._workers))
            reports = list(self._reports())
            changes = reports[0]["status"]["reload"]["changes"] if reports else []
        self._history.add(problems, changes)
        self._metrics.count_reload(succeeded=not problems)

    async def _tell_all(self, command: bytes) -> list[str]:
        """The problems that workers have with a command, each once."""
        answers = await asyncio.gather(*(_say(worker, command) for worker in self._workers))
        found: dict[str, None] = {}
        for worker, answer in zip(self._workers, answers, strict=True):
            problems = [f"{worker.name} does not answer"] if answer is None else answer
            found.update(dict.fromkeys(problems))
        return list(found)

    def _bury(self, worker: _Worker) -> None:
        """Keep what an ended worker had counted."""
        if worker.writer is not None:
            worker.writer.close()
        collection = self._metrics.collection
        if worker.report is not None:
            counted = collection.lasting(from_json(worker.report["metrics"]))
            self._ended = collection.merge([self._ended, counted])
        worker.report = worker.reader = worker.writer = worker.process = None

    async def _end(self, worker: _Worker) -> None:
        process = worker.process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            grace = self._config.server.shutdown_timeout_seconds + _KILL_SECONDS
            if await _wait(process, grace) is None:
                _log.warning("%s did not end in time and is killed", worker.name)
                process.kill()
                await _wait(process, _KILL_SECONDS)
        if worker.writer is not None:
            worker.writer.close()

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


async def _say(worker: _Worker, command: bytes) -> Any:
    """What a worker answers; None if it does not."""
    async with worker.asking:
        if worker.reader is None or worker.writer is None or worker.writer.is_closing():
            # uvloop closes a channel at its end, and raises a RuntimeError when it is written to.
            return None
        try:
            worker.writer.write(command + b"\n")
            async with asyncio.timeout(_ANSWER_SECONDS):
                line = await worker.reader.readline()
            return orjson.loads(line) if line else None
        except (OSError, TimeoutError, ValueError):
            # What comes after this could not be told from the answer to something else: without
            # its channel the worker ends, and is replaced.
            worker.writer.close()
            return None


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
