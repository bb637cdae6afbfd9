"""Operations a second through the dispatcher to SoftHSM, beside one thread that calls it straight.

`python -m benchmarks.dispatcher [--seconds 1] [--output FOLDER]`: 32-byte AES-GCM encrypts for 1, 2
and 4 lanes, concurrency 1, 16, 64 and 256, batches of 1 and of up to 64. Every round measures the
straight rate again, right before the lanes: what counts is the ratio. Prints a table, and with
--output writes it as JSON and a plot.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop

from xkiproxy.config.models import Pkcs11Settings
from xkiproxy.crypto.algorithms import KeySpec
from xkiproxy.crypto.operations import Encrypt
from xkiproxy.kmi.metrics import KmiMetrics
from xkiproxy.kmi.pkcs11.lane import Pkcs11Launcher
from xkiproxy.kmi.pkcs11.manager import Pkcs11KeyManager
from xkiproxy.kmi.queued import QueuedKmi
from xkiproxy.observability.metrics import Metrics

_MODULES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
)
_LANES = (1, 2, 4)
_CONCURRENCY = (1, 16, 64, 256)
_BATCHES = (1, 64)
_PIN = "123456"
_STRAIGHT = """
import os, sys, time
import pkcs11
from pkcs11 import Attribute, GCMParams, Mechanism
module, label, pin, seconds = sys.argv[1:]
session = pkcs11.lib(module).get_token(token_label=label).open(user_pin=pin)
key = next(iter(session.get_objects({Attribute.LABEL: "bench"})))
data, aad, count = bytes(32), bytes(8), 0
end = time.perf_counter() + float(seconds)
start = time.perf_counter()
while time.perf_counter() < end:
    for _ in range(100):
        params = GCMParams(os.urandom(12), aad, 128)
        key.encrypt(data, mechanism=Mechanism.AES_GCM, mechanism_param=params)
    count += 100
print(count / (time.perf_counter() - start))
"""


@dataclass(frozen=True)
class Row:
    """One measurement; rates in operations a second, latencies in milliseconds."""

    lanes: int
    concurrency: int
    max_batch: int
    rate: float
    straight: float
    p50_ms: float
    p99_ms: float

    @property
    def ratio(self) -> float:
        """Of the straight rate."""
        return self.rate / self.straight


def make_token(folder: Path) -> Pkcs11Settings:
    """A SoftHSM token with a key in a folder; also sets SOFTHSM2_CONF."""
    module = next(path for path in _MODULES if Path(path).exists())
    (folder / "tokens").mkdir()
    conf = folder / "softhsm2.conf"
    conf.write_text(f"directories.tokendir = {folder}/tokens\nlog.level = ERROR\n")
    os.environ["SOFTHSM2_CONF"] = str(conf)
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", "bench",
         "--so-pin", _PIN, "--pin", _PIN],
        check=True, capture_output=True,
    )  # fmt: skip
    pin = folder / "pin"
    pin.write_text(_PIN)
    pin.chmod(0o600)
    settings = Pkcs11Settings.model_validate(
        {"name": "bench", "type": "pkcs11", "module": module, "token": "bench", "pin": str(pin)}
    )
    manager = Pkcs11KeyManager(settings)
    manager.create("bench", KeySpec.AES_256)
    manager.close()
    return settings


def straight_rate(settings: Pkcs11Settings, seconds: float) -> float:
    """Encrypts a second of one thread that calls the module straight."""
    arguments = [str(settings.module), "bench", _PIN, str(seconds)]
    done = subprocess.run(
        [sys.executable, "-c", _STRAIGHT, *arguments], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


async def _measure(
    settings: Pkcs11Settings, lanes: int, concurrency: int, max_batch: int, seconds: float
) -> tuple[float, list[float]]:
    kmi = QueuedKmi(
        "bench", "pkcs11", Pkcs11Launcher(settings, _PIN), KmiMetrics(Metrics(), "bench"),
        lanes=lanes, queue_size=4096, max_batch=max_batch,
    )  # fmt: skip
    kmi.start()
    await kmi.check()
    operation = Encrypt("bench", bytes(32))
    latencies: list[float] = []
    end = 0.0

    async def client() -> None:
        while (now := time.perf_counter()) < end:
            await kmi.submit(operation, time.monotonic() + 10)
            latencies.append(time.perf_counter() - now)

    end = time.perf_counter() + 0.2
    await asyncio.gather(*(client() for _ in range(concurrency)))
    latencies.clear()
    start = time.perf_counter()
    end = start + seconds
    await asyncio.gather(*(client() for _ in range(concurrency)))
    rate = len(latencies) / (time.perf_counter() - start)
    await kmi.close()
    return rate, latencies


def _run(settings: Pkcs11Settings, seconds: float, quick: bool) -> list[Row]:
    rows = []
    for lanes in (1,) if quick else _LANES:
        for concurrency in (64,) if quick else _CONCURRENCY:
            straight = straight_rate(settings, seconds)
            for max_batch in _BATCHES:
                rate, latencies = uvloop.run(
                    _measure(settings, lanes, concurrency, max_batch, seconds)
                )
                cuts = statistics.quantiles(latencies, n=100)
                row = Row(
                    lanes, concurrency, max_batch, rate, straight, cuts[49] * 1e3, cuts[98] * 1e3
                )
                rows.append(row)
                _print_row(row)
    return rows


def _print_header() -> None:
    print(
        f"{'lanes':>5} {'conc.':>6} {'batch':>6} {'ops/s':>9} {'straight':>9} {'ratio':>6}"
        f" {'p50 ms':>8} {'p99 ms':>8}"
    )


def _print_row(r: Row) -> None:
    print(
        f"{r.lanes:>5} {r.concurrency:>6} {r.max_batch:>6} {r.rate:>9,.0f} {r.straight:>9,.0f}"
        f" {r.ratio:>6.2f} {r.p50_ms:>8.2f} {r.p99_ms:>8.2f}",
        flush=True,
    )


def _print_targets(rows: list[Row]) -> None:
    at = {(r.lanes, r.concurrency, r.max_batch): r for r in rows}
    ratio = at[1, 64, 64].ratio
    gain = at[1, 64, 64].ratio / at[1, 64, 1].ratio
    print(f"\none lane at concurrency 64, of the straight rate: {ratio:.2f} (target 0.70)")
    print(f"what batching is worth there: {gain:.1f} times (target 4)")


def _plot(rows: list[Row], file: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415 - only for --output

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for lanes in _LANES:
        for max_batch, style in zip(_BATCHES, ("--", "-"), strict=True):
            line = [r for r in rows if (r.lanes, r.max_batch) == (lanes, max_batch)]
            axes.plot(
                [r.concurrency for r in line], [r.ratio for r in line], style, marker="o",
                label=f"{lanes} lane(s), batches up to {max_batch}",
            )  # fmt: skip
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("concurrency")
    axes.set_ylabel("throughput, of one thread calling the module straight")
    axes.set_title("AES-256-GCM, 32 bytes, SoftHSM, through the dispatcher")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run all measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--quick", action="store_true", help="only what has a target")
    parser.add_argument("--output", type=Path, help="a folder for dispatcher.json and .png")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = make_token(Path(folder))
        _print_header()
        rows = _run(settings, arguments.seconds, arguments.quick)
    _print_targets(rows)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        data = [{**asdict(row), "ratio": row.ratio} for row in rows]
        (arguments.output / "dispatcher.json").write_text(json.dumps(data, indent=2))
        _plot(rows, arguments.output / "dispatcher.png")


if __name__ == "__main__":
    main()
