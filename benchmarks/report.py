"""Results as tables of plain text."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.load import LoadResult

_ROW = "{:<{width}} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7} {:>7}"


def table(results: Mapping[str, LoadResult]) -> str:
    """A line for each result: right answers a second, latencies in milliseconds, failures."""
    width = max(len(name) for name in results)
    head = ("", "ok/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms", "wrong", "errors")
    lines = [_ROW.format(*head, width=width)]
    for name, result in results.items():
        latencies = [f"{micros / 1000:.2f}" for micros in result.latencies_us().values()]
        counts = (f"{result.wrong:,}", f"{result.error_count:,}")
        lines.append(_ROW.format(name, f"{result.rate:,.0f}", *latencies, *counts, width=width))
    return "\n".join(lines)


def cpu_table(results: Mapping[str, LoadResult]) -> str:
    """A line for each result: microseconds on the CPU for a request, by process."""
    width = max(len(name) for name in results)
    lines = ["CPU microseconds a request:"]
    for name, result in results.items():
        parts = [f"{process} {cost:.0f}" for process, cost in result.cpu_us_per_request().items()]
        lines.append(f"{name:<{width}}  {', '.join(parts)}")
    return "\n".join(lines)


def remarks(results: Mapping[str, LoadResult]) -> str:
    """What else must be known of each result: its errors by kind, what the generator could not."""
    lines = []
    for name, result in results.items():
        said = [f"{count:,} x {kind}" for kind, count in sorted(result.errors.items())]
        if result.wrong:
            said.append(f"{result.wrong:,} x wrong plaintext")
        if result.waited:
            said.append(f"{result.waited:,} waited for a connection")
        if result.signed_late:
            said.append(f"{result.signed_late:,} were signed during the load")
        if result.reconnects:
            said.append(f"{result.reconnects:,} connections opened again")
        said.append(f"{result.checked:,} encrypt answers decrypted afterwards")
        lines.append(f"{name}: {'; '.join(said)}")
    return "\n".join(lines)
