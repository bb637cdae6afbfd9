"""The program of one generator process: JSON, a line at a time, on standard input and output.

For each load it reads {"plan", "material", "phase"}, signs and connects, writes {"ready"}, reads
{"begin"} (when to start), writes {"done", "failed"} as it goes, {"ended"} when the load is over,
and {"result"}.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import suppress
from typing import Any

import uvloop

from benchmarks.load.requests import Material
from benchmarks.load.run import Generator, Plan

_REPORT_SECONDS = 0.1


def _say(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


async def _report(generator: Generator) -> None:
    while True:
        await asyncio.sleep(_REPORT_SECONDS)
        tally = generator.loop.tally
        _say(done=tally.done, failed=tally.failed)


async def _read() -> dict[str, Any] | None:
    """The next line; None once whoever started us is gone."""
    line = await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    return json.loads(line) if line else None


async def _main() -> None:
    while task := await _read():
        await _run(task)


async def _run(task: dict[str, Any]) -> None:
    started = time.perf_counter()
    material = Material(tuple(task["material"]["decrypts"]), tuple(task["material"]["sizes"]))
    generator = Generator(Plan.from_json(task["plan"]), material, task["phase"])
    signing_seconds = time.perf_counter() - started
    try:
        await generator.open()
    except OSError as error:
        _say(error=f"cannot connect: {error}")
        return
    _say(ready=True, signing_seconds=signing_seconds)
    start = await _read()
    if start is None:
        return
    reporter = asyncio.create_task(_report(generator))
    result = await generator.run(start["begin"])
    _say(ended=True)
    reporter.cancel()
    with suppress(asyncio.CancelledError):
        await reporter
    await generator.check(result)
    _say(result=result.to_json())


if __name__ == "__main__":
    uvloop.run(_main())
