"""Cases: a requirement, and the attempt that shows whether it holds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from xkiproxy.conformance.probe import Probe

Attempt = Callable[[Probe], Awaitable[str | None]]
"""Raises Unmet or Skipped; may return a remark, such as what was measured."""


class Outcome(StrEnum):
    """What became of a case."""

    PASS = "PASS"  # noqa: S105 - an outcome, not a password
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True, slots=True)
class Case:
    """One requirement; `mark` says where it is from (docs/protocols)."""

    name: str
    mark: str
    requirement: str
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What became of a case; `detail` is what came instead, why it was skipped, or a remark."""

    case: Case
    outcome: Outcome
    detail: str
    seconds: float


class Cases:
    """The cases of a module, in their order."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, str, Mapping[str, str], Attempt]] = []

    def add(self, name: str, requirement: str, **marks: str) -> Callable[[Attempt], Attempt]:
        """Register an attempt, with the mark that the requirement has in each protocol.

        A protocol that is not named has no such requirement.
        """

        def register(attempt: Attempt) -> Attempt:
            self._entries.append((name, requirement, marks, attempt))
            return attempt

        return register

    def of(self, protocol: str) -> list[Case]:
        """The cases of one protocol."""
        return [
            Case(name, marks[protocol], requirement, attempt)
            for name, requirement, marks, attempt in self._entries
            if protocol in marks
        ]
