"""Runs the cases of a protocol, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from xkiproxy.conformance import common, xki, xks
from xkiproxy.conformance.case import Case, CaseResult, Outcome
from xkiproxy.conformance.probe import Probe, Subject, connect
from xkiproxy.conformance.wire import Skipped, Unmet, Wire

_SUITES: dict[str, tuple[Callable[[], Wire], tuple[Case, ...]]] = {
    "xki": (xki.XkiWire, (*common.CASES.of("xki"), *xki.CASES.of("xki"))),
    "xks": (xks.XksWire, (*common.CASES.of("xks"), *xks.CASES.of("xks"))),
}


def wires() -> list[Wire]:
    """The protocols that there is a suite for."""
    return [make() for make, _ in _SUITES.values()]


def select(wire: Wire, patterns: Sequence[str] = ()) -> list[Case]:
    """The cases whose name matches a pattern such as `signature.*`; all without patterns."""
    _, cases = _SUITES[wire.name]
    return [
        case
        for case in cases
        if not patterns or any(fnmatchcase(case.name, pattern) for pattern in patterns)
    ]


async def greet(subject: Subject, wire: Wire) -> None:
    """Whether anybody answers at all; raises Unmet, which says why not."""
    async with connect(subject, wire) as probe:
        await probe.call("health")


async def run(
    subject: Subject,
    wire: Wire,
    cases: Sequence[Case],
    progress: Callable[[CaseResult], None] = lambda _: None,
) -> list[CaseResult]:
    """Run the cases; `progress` is told of each when it is done.

    A proxy that does not answer fails cases, it raises nothing.
    """
    results = []
    async with connect(subject, wire) as probe:
        for case in cases:
            result = await _try(case, probe)
            progress(result)
            results.append(result)
    return results


async def _try(case: Case, probe: Probe) -> CaseResult:
    began = time.perf_counter()
    try:
        outcome, detail = Outcome.PASS, await case.attempt(probe) or ""
    except Unmet as error:
        outcome, detail = Outcome.FAIL, str(error)
    except Skipped as error:
        outcome, detail = Outcome.SKIP, str(error)
    except OSError as error:
        outcome, detail = Outcome.FAIL, f"no connection: {error.strerror or type(error).__name__}"
    return CaseResult(case, outcome, detail, time.perf_counter() - began)
