"""The audit log with more than its file: every line of the chain goes to all sinks.

The chain is at home in the file. What is written there, also the log's own records, is mirrored to
the outlets with number and hash, so that each of them holds the same chain and can be verified by
itself. A sink that was not given some records says so in the chain when it takes records again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from xkiproxy.observability.audit import AuditError, AuditLog, AuditOptions, SinkState
from xkiproxy.observability.chain import SINK_RESUMED, Link, chain, encode_event
from xkiproxy.observability.outlet import Outlet


class Fanout:
    """A `Sink` of several: all of them, or any of them, must take a record."""

    def __init__(
        self, path: Path, options: AuditOptions, outlets: Sequence[Outlet], *, needs_all: bool
    ) -> None:
        """Open the log; raises AuditError."""
        self._outlets = outlets
        self._needs_all = needs_all
        self._log = AuditLog(path, options, self._mirror)

    async def start(self) -> None:
        """Connect what can be connected now; the rest is tried again by `check`."""
        for outlet in self._outlets:
            await outlet.start()

    def append(self, records: Sequence[bytes]) -> None:
        """See `Sink`: with `needs_all` nobody is given what one is known not to take."""
        if self._needs_all:
            self._demand(self._broken_outlets())
            self._log.append(records)
            self._demand(self._broken_outlets())
            return
        try:
            self._log.append(records)
        except AuditError:
            if self._are_all_broken():
                raise
            lines, link = chain(records, self._log.link)
            self._mirror(lines, link)
            self._log.go_on(link)
            if self._are_all_broken():
                raise

    def check(self) -> None:
        """See `Sink`."""
        with suppress(AuditError):  # its state tells
            self._log.check()
        for outlet in self._outlets:
            outlet.check()
            outlet.resume()
            self._tell(outlet)
        broken = [state for state in self.states() if not state.is_up]
        if self._needs_all or len(broken) == len(self.states()):
            self._demand(broken)

    def states(self) -> list[SinkState]:
        """See `Sink`."""
        return [*self._log.states(), *(outlet.state for outlet in self._outlets)]

    def close(self) -> None:
        """See `Sink`: the file first, what it still says is for the others too."""
        self._log.close()
        for outlet in self._outlets:
            outlet.close()

    def _mirror(self, lines: bytes, link: Link) -> None:
        """Give lines to the outlets; what comes of it their states tell."""
        found = [line for line in lines.split(b"\n") if line]
        for outlet in self._outlets:
            outlet.take(found, link.seq)

    def _tell(self, outlet: Outlet) -> None:
        """A record of the time in which an outlet took nothing; if it cannot be written, later."""
        story = outlet.story
        if story:
            write = self._log.append if self._needs_all else self.append
            with suppress(AuditError):
                write([encode_event(SINK_RESUMED, **story)])
                outlet.forget_story()

    def _broken_outlets(self) -> list[SinkState]:
        return [outlet.state for outlet in self._outlets if outlet.error]

    def _are_all_broken(self) -> bool:
        return not self._log.available and all(outlet.error for outlet in self._outlets)

    def _demand(self, broken: Sequence[SinkState]) -> None:
        """Raise AuditError if there is a broken one."""
        if broken:
            raise AuditError("; ".join(f"{state.name}: {state.error}" for state in broken))
