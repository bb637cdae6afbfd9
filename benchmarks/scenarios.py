"""The scenarios of the benchmark: what is measured, in alternating rounds, and what is wanted.

Machines are noisy, so a figure is a ratio within one run: the two sides take turns, and the median
of the rounds' ratios counts. A scenario returns its figures, and what else is worth knowing of it.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.dispatcher import make_token, straight_rate
from benchmarks.hot_path import software_rate
from benchmarks.load.preparation import prepare
from benchmarks.load.processes import Generators, run_load
from benchmarks.load.requests import Workload
from benchmarks.load.results import LoadError, LoadResult
from benchmarks.load.run import Plan
from benchmarks.servers import KEY_ID, BareServer, ChildServer, ProxyServer

_BARE_RATE = 40_000
"""Requests a second to sign ahead for the bare server: more than it answers."""
_TURN_WARM_UP_SECONDS = 0.1
_FLOOD_KINDS = frozenset({"no answer", "never sent", "429", "503"})
"""What a flood may come to: left over in the generator at its end, or refused at once."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long and how often: `seconds` a round, `rounds`, `memory_requests` in all.

    Where two servers are compared they take `turns` of `turn_seconds` each: short ones, since a
    shared machine changes its speed by a third from one second to another, and many.
    """

    seconds: float
    rounds: int
    memory_requests: int
    turn_seconds: float
    turns: int


FULL = Pace(4.0, 5, 1_000_000, turn_seconds=0.5, turns=31)
QUICK = Pace(0.5, 1, 20_000, turn_seconds=0.25, turns=3)


@dataclass
class Figure:
    """One measured figure; `wanted` is such as ">= 0.60", or empty where there is no target."""

    name: str
    rounds: list[float]
    wanted: str = ""
    remark: str = ""

    @property
    def value(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)

    @property
    def is_met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if not self.wanted:
            return None
        sign, _, limit = self.wanted.partition(" ")
        return self.value >= float(limit) if sign == ">=" else self.value <= float(limit)

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "name": self.name,
            "value": self.value,
            "rounds": self.rounds,
            "wanted": self.wanted,
            "met": self.is_met,
            "remark": self.remark,
        }


@dataclass
class Outcome:
    """What a scenario came to.

    `curves` are points for plots, `failures` wrong answers and errors, `loads` every load's result.
    """

    figures: list[Figure] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    loads: list[dict[str, Any]] = field(default_factory=list)

    def count(self, result: LoadResult, *, flood: bool = False) -> LoadResult:
        """Keep a result and note what failed; in a flood a refusal is no failure."""
        self.loads.append(result.to_json())
        for kind, number in {**result.errors, "wrong plaintext": result.wrong}.items():
            if number and not (flood and _is_of_flood(kind)):
                self.failures[kind] = self.failures.get(kind, 0) + number
        return result


def _is_of_flood(kind: str) -> bool:
    """Errors are named by their status and code, as in "429 TooManyRequests"."""
    return kind in _FLOOD_KINDS or kind.partition(" ")[0] in _FLOOD_KINDS


Scenario = Callable[[Pace], Awaitable[Outcome]]


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


async def _load(
    server: ChildServer, workload: Workload, seconds: float, *, connections: int = 64, **more: Any
) -> LoadResult:
    more.setdefault("warm_up", min(1.0, seconds / 2))
    plan = _plan(server, workload, seconds, connections=connections, **more)
    return await run_load(plan, probe=server.cpu_seconds)


def _plan(
    server: ChildServer, workload: Workload, seconds: float, *, connections: int = 64, **more: Any
) -> Plan:
    if isinstance(server, BareServer):
        more.setdefault("ahead", int(_BARE_RATE * (seconds + more["warm_up"])))
    return Plan(server.target, workload, connections, seconds, **more)


def _server_us(result: LoadResult) -> float:
    """CPU microseconds of the server's own process for a request, without lanes."""
    costs = result.cpu_us_per_request()
    return sum(cost for name, cost in costs.items() if name != "generator" and "lane" not in name)


async def _compare(
    pace: Pace, outcome: Outcome, *sides: tuple[ChildServer, Workload]
) -> list[tuple[LoadResult, ...]]:
    """The sides in turns."""
    rounds = []
    materials = [await prepare(server.target, workload) for server, workload in sides]
    async with Generators(progress=False) as generators:
        for number in range(pace.turns):
            results = []
            for (server, workload), material in zip(sides, materials, strict=True):
                plan = _plan(server, workload, pace.turn_seconds, warm_up=_TURN_WARM_UP_SECONDS)
                result = await generators.run(plan, material, server.cpu_seconds)
                results.append(outcome.count(result))
            rounds.append(tuple(results))
            rates = " and ".join(f"{result.rate:,.0f}/s" for result in results)
            _say(f"turn {number + 1}: {rates}")
    return rounds


def _rates(rounds: list[tuple[LoadResult, ...]]) -> list[float]:
    return [first.rate / second.rate for first, second in rounds if second.rate]


async def software_vs_bare(pace: Pace) -> Outcome:
    """Everything on, plain HTTP, 64 connections, against a server that does nothing.

    A third server has policies, quotas, source networks and HMACs of audit logs too.
    """
    outcome = Outcome()
    with (
        BareServer(tls=False) as bare,
        ProxyServer(tls=False) as proxy,
        ProxyServer(tls=False, guarded=True) as guarded,
    ):
        sides = [(server, server.workload("xki")) for server in (proxy, guarded, bare)]
        rounds = await _compare(pace, outcome, *sides)
    costs = [statistics.median(map(_server_us, side)) for side in zip(*rounds, strict=True)]
    remark = "CPU of the server {:.0f} us a request, guarded {:.0f}, bare {:.0f}".format(*costs)
    ratio = [one.rate / nothing.rate for one, _, nothing in rounds]
    lost = [(with_all.rate - one.rate) / nothing.rate for one, with_all, nothing in rounds]
    outcome.figures += [
        Figure("software KMI against bare, requests a second", ratio, ">= 0.60", remark),
        Figure("the same with policies and quotas: change of that ratio", lost, ">= -0.03"),
    ]
    return outcome


async def hsm_vs_software(pace: Pace) -> Outcome:
    """SoftHSM by a lane against the software KMI: CPU of the server's process."""
    outcome = Outcome()
    with ProxyServer(tls=False) as software, ProxyServer(kmi="pkcs11", tls=False, lanes=1) as hsm:
        sides = (hsm, hsm.workload("xki")), (software, software.workload("xki"))
        rounds = await _compare(pace, outcome, *sides)
    ratios = [_server_us(first) / _server_us(second) for first, second in rounds]
    outcome.figures.append(
        Figure("SoftHSM against software KMI, server CPU a request", ratios, "<= 1.25")
    )
    outcome.figures.append(
        Figure("SoftHSM against software KMI, requests a second", _rates(rounds))
    )
    return outcome


async def xks_vs_xki(pace: Pace) -> Outcome:
    """The two protocols, on one server."""
    outcome = Outcome()
    with ProxyServer(tls=False) as proxy:
        sides = (proxy, proxy.workload("xks")), (proxy, proxy.workload("xki"))
        rounds = await _compare(pace, outcome, *sides)
    outcome.figures.append(Figure("XKS against XKI, requests a second", _rates(rounds), ">= 0.90"))
    return outcome


async def tls_vs_plain(pace: Pace) -> Outcome:
    """Connections kept alive, with TLS and without."""
    outcome = Outcome()
    with ProxyServer(tls=True) as secure, ProxyServer(tls=False) as plain:
        sides = (secure, secure.workload("xki")), (plain, plain.workload("xki"))
        rounds = await _compare(pace, outcome, *sides)
    outcome.figures.append(
        Figure("TLS against plain, requests a second", _rates(rounds), ">= 0.80")
    )
    return outcome


async def open_loop(pace: Pace) -> Outcome:
    """AWS's quota for a key store, over TLS, on SoftHSM; latency from the intended time."""
    outcome = Outcome()
    p99, p999 = [], []
    with ProxyServer(kmi="pkcs11", lanes=1) as proxy:
        for _ in range(max(1, pace.rounds - 2)):
            load = _load(proxy, proxy.workload("xki", "mixed"), 3 * pace.seconds, rate=1800)
            result = outcome.count(await load)
            p99.append(result.latency_us(99) / 1000)
            p999.append(result.latency_us(99.9) / 1000)
            _say(f"p99 {p99[-1]:.2f} ms, p99.9 {p999[-1]:.2f} ms")
    outcome.figures.append(Figure("1,800 a second, TLS, SoftHSM: p99, ms", p99, "<= 5"))
    outcome.figures.append(Figure("1,800 a second, TLS, SoftHSM: p99.9, ms", p999, "<= 25"))
    return outcome


async def overload(pace: Pace) -> Outcome:
    """Three times what can be served, and then a normal load.

    Beyond the capacity an open loop queues in the generator too: what the server takes for an
    answer counts from the moment when its request was written. 900 of a worker's 1,000 connections
    are in use, all of them always busy. The best rate is measured before and after.
    """
    outcome = Outcome()
    useful, late, recovered = [], [], []
    with ProxyServer(tls=False) as proxy:
        workload = proxy.workload("xki")
        for _ in range(2 * pace.rounds):
            before = outcome.count(await _load(proxy, workload, pace.seconds / 4))
            # No warm-up: what is due in it would never be caught up with. One generator: with two
            # the server had to share its core.
            flood = await _load(
                proxy, workload, pace.seconds / 2, connections=900, rate=3 * before.rate,
                grace=0.2, warm_up=0,
            )  # fmt: skip
            # No warm-up here either: it is the first second after the flood that is asked about.
            half = _load(proxy, workload, 1.0, rate=before.rate / 2, warm_up=0)
            recovery = outcome.count(await half)
            after = outcome.count(await _load(proxy, workload, pace.seconds / 4))
            outcome.count(flood, flood=True)
            best = (before.rate + after.rate) / 2
            useful.append(flood.rate / best)
            late.append(float(flood.late))
            recovered.append(recovery.latency_us(99) / 1000)
            _say(f"best {best:,.0f}/s, useful under the flood {flood.rate:,.0f}/s")
            _say(f"longest answer under the flood {flood.longest_us / 1000:.0f} ms")
    outcome.figures += [
        Figure("useful answers at three times the capacity, of the best rate", useful, ">= 0.90"),
        Figure("answers over 250 ms after their request, under the flood", late, "<= 0"),
        Figure("p99 of half the best rate in the second after the flood, ms", recovered, "<= 50"),
    ]
    return outcome


async def memory(pace: Pace) -> Outcome:
    """Memory after many requests against after ten thousand.

    With XKS, since XKI's replay window keeps 90 bytes of each request of 15 minutes by design.
    """
    outcome = Outcome()
    with ProxyServer(tls=False) as proxy:
        sizes: dict[str, list[tuple[int, int]]] = {}
        for protocol in ("xks", "xki"):
            workload = proxy.workload("xks" if protocol == "xks" else "xki")
            first = outcome.count(await _load(proxy, workload, 0.5, warm_up=0.15))  # ten thousand
            before = sum(proxy.rss_bytes().values())
            seconds = pace.memory_requests / (first.rate or 1)
            ahead = min(300_000, pace.memory_requests)
            rest = outcome.count(await _load(proxy, workload, seconds, ahead=ahead))
            sizes[protocol] = [(first.total, before), (rest.total, sum(proxy.rss_bytes().values()))]
            _say(
                f"{protocol}: {before >> 20} MB, after {rest.total:,} {sizes[protocol][1][1] >> 20}"
            )
    (_, small), (_, large) = sizes["xks"]
    (_, xki_small), (count, xki_large) = sizes["xki"]
    remark = f"XKI: {(xki_large - xki_small) / max(count, 1):.0f} bytes a request, replay window"
    outcome.figures.append(
        Figure(
            "memory after many requests against ten thousand", [large / small], "<= 1.05", remark
        )
    )
    return outcome


async def stall(pace: Pace) -> Outcome:
    """The longest answer to a trivial request while keys change and the server reloads.

    A prober asks every 2 ms for what is refused at once. It shows how long the loop was held up,
    and also how long the prober and the server waited for a CPU, which the changes need too: the
    same load without any changes is measured beside it.
    """
    outcome = Outcome()
    longest, without = [], []
    with ProxyServer(tls=False) as proxy:
        for number in range(max(1, pace.rounds - 2)):
            control = await _probe_under_load(proxy, pace, outcome)
            stop = asyncio.Event()
            changes = asyncio.create_task(_change_keys(proxy, f"round-{number}", stop))
            times = await _probe_under_load(proxy, pace, outcome)
            stop.set()
            await changes
            longest.append(1000 * max(times))
            without.append(1000 * max(control))
            _say(f"longest {longest[-1]:.1f} ms, without changes {without[-1]:.1f} ms")
    remark = f"without changes {statistics.median(without):.1f} ms"
    name = "longest stall under load with key changes and reloads, ms"
    outcome.figures.append(Figure(name, longest, "<= 20", remark))
    return outcome


async def _probe_under_load(proxy: ProxyServer, pace: Pace, outcome: Outcome) -> list[float]:
    """Seconds that each answer to a probe took."""
    seconds = 1.5 * pace.seconds
    load = asyncio.create_task(_load(proxy, proxy.workload("xki"), seconds, rate=3000))
    times = await _probe(proxy.port, f"{proxy.prefix('xki')}/kms/xki/v1/health", seconds)
    outcome.count(await load)
    return times


async def _probe(port: int, path: str, seconds: float) -> list[float]:
    """Seconds that each answer took."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        times.append(time.perf_counter() - began)
        await asyncio.sleep(0.002)
    writer.close()
    return times


async def _change_keys(proxy: ProxyServer, name: str, stop: asyncio.Event) -> None:
    """Keys made, disabled, enabled and rotated, and reloads, one after the other."""
    number = 0
    while not stop.is_set():
        number += 1
        key = f"{name}-{number}"
        for words in (["keys", "create", key], ["keys", "disable", key],
                      ["keys", "rotate", KEY_ID], ["reload"]):  # fmt: skip
            command = [sys.executable, "-m", "xkiproxy", *words, "--config", str(proxy.config)]
            process = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
            )
            _, said = await process.communicate()
            if process.returncode:
                raise LoadError(f"{' '.join(words)}: {said.decode()}")
            if stop.is_set():
                return


async def kmi_alone(pace: Pace) -> Outcome:
    """What of a KMI's own rate, called straight in a loop, the proxy passes on."""
    outcome = Outcome()
    software: list[float] = []
    hsm: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ProxyServer(tls=False) as by_software,
        ProxyServer(kmi="pkcs11", tls=False, lanes=1) as by_hsm,
    ):
        settings = make_token(Path(folder))
        for _ in range(pace.rounds):
            alone = (software_rate(pace.seconds / 4), straight_rate(settings, pace.seconds / 4))
            for rates, proxy, rate in zip(
                (software, hsm), (by_software, by_hsm), alone, strict=True
            ):
                load = _load(proxy, proxy.workload("xki"), pace.seconds)
                result = outcome.count(await load)
                rates.append(result.rate / rate)
                _say(f"{rate:,.0f}/s alone, {result.rate:,.0f}/s through the proxy")
    outcome.figures.append(Figure("the proxy against the software KMI alone", software))
    outcome.figures.append(Figure("the proxy against SoftHSM alone, one thread", hsm))
    return outcome


async def curves(pace: Pace) -> Outcome:
    """Throughput against concurrency; latency against the offered rate (TLS, SoftHSM)."""
    outcome = Outcome()
    seconds = pace.seconds / 2
    servers: Mapping[str, ChildServer] = {
        "bare": BareServer(tls=True),
        "software KMI": ProxyServer(),
        "SoftHSM": ProxyServer(kmi="pkcs11", lanes=1),
    }
    best = 0.0
    for name, server in servers.items():
        with server:
            workload = server.workload("xki")
            points = []
            for connections in (1, 4, 16, 64, 256):
                load = _load(server, workload, seconds, connections=connections)
                result = outcome.count(await load)
                points.append((float(connections), result.rate))
                _say(f"{name}, {connections} connections: {result.rate:,.0f}/s")
            outcome.curves[f"throughput: {name}"] = points
            if name == "SoftHSM":
                best = max(rate for _, rate in points)
                await _latency_curve(server, workload, seconds, best, outcome)
    return outcome


async def _latency_curve(
    server: ChildServer, workload: Workload, seconds: float, best: float, outcome: Outcome
) -> None:
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        result = outcome.count(await _load(server, workload, seconds, rate=best * share))
        for percentile in (50.0, 99.0, 99.9):
            points = outcome.curves.setdefault(f"latency: p{percentile:g}", [])
            points.append((best * share, result.latency_us(percentile) / 1000))
        _say(f"{best * share:,.0f} offered: p99 {result.latency_us(99) / 1000:.2f} ms")


SCENARIOS: dict[str, Scenario] = {
    "software-vs-bare": software_vs_bare,
    "hsm-vs-software": hsm_vs_software,
    "xks-vs-xki": xks_vs_xki,
    "tls-vs-plain": tls_vs_plain,
    "open-loop": open_loop,
    "overload": overload,
    "memory": memory,
    "stall": stall,
    "kmi-alone": kmi_alone,
    "curves": curves,
}
"""By the name to ask for it."""
