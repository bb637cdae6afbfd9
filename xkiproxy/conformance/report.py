"""The results of a run for programs: JSON, and the XML that CI servers read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

from xkiproxy import __version__
from xkiproxy.conformance.case import CaseResult, Outcome


def counts(results: Sequence[CaseResult]) -> dict[str, int]:
    """How many cases had each outcome, in lower case."""
    found = Counter(result.outcome for result in results)
    return {outcome.lower(): found[outcome] for outcome in Outcome}


def as_json(url: str, protocol: str, results: Sequence[CaseResult]) -> dict[str, Any]:
    """A run as a JSON object; seconds are rounded to milliseconds."""
    return {
        "url": url,
        "protocol": protocol,
        "suite": f"xkiproxy {__version__}",
        **counts(results),
        "cases": [
            {
                "name": result.case.name,
                "mark": result.case.mark,
                "requirement": result.case.requirement,
                "outcome": result.outcome,
                "detail": result.detail,
                "seconds": round(result.seconds, 3),
            }
            for result in results
        ],
    }


def as_junit(protocol: str, results: Sequence[CaseResult]) -> bytes:
    """A run as JUnit XML, UTF-8; every case is a testcase of the class of its group."""
    total = counts(results)
    suite = Element(
        "testsuite",
        name=f"{protocol} conformance",
        tests=str(len(results)),
        failures=str(total["fail"]),
        errors="0",
        skipped=str(total["skip"]),
        time=f"{sum(result.seconds for result in results):.3f}",
    )
    for result in results:
        group, _, name = result.case.name.partition(".")
        seconds = f"{result.seconds:.3f}"
        element = SubElement(
            suite, "testcase", classname=f"{protocol}.{group}", name=name, time=seconds
        )
        text = f"[{result.case.mark}] {result.case.requirement}\n{result.detail}"
        if result.outcome is Outcome.FAIL:
            SubElement(element, "failure", message=_xml(result.detail)).text = _xml(text)
        elif result.outcome is Outcome.SKIP:
            SubElement(element, "skipped", message=_xml(result.detail))
    return bytes(tostring(suite, encoding="utf-8", xml_declaration=True))


def _xml(text: str) -> str:
    """Without what XML 1.0 cannot hold: a proxy's message may have anything in it."""
    return "".join(letter if letter in "\t\n" or letter >= " " else "?" for letter in text)
