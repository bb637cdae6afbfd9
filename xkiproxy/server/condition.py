"""Why the proxy must not serve at the moment, if there is a reason."""

from __future__ import annotations

import logging

from xkiproxy.observability.logging import utf8

_log = logging.getLogger(__name__)


class Condition:
    """Reasons not to serve, by the part that has them (`audit`, `catalog`).

    While there is one, requests get a 503 and `/readyz` is red: the proxy fails closed.
    """

    __slots__ = ("reasons",)

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def fail(self, part: str, reason: str) -> None:
        """A part cannot do what every request needs of it."""
        reason = utf8(reason)  # it may name a file
        if self.reasons.get(part) != reason:
            _log.error("requests are refused: %s: %s", part, reason)
        self.reasons[part] = reason

    def recover(self, part: str) -> None:
        """It can again."""
        if self.reasons.pop(part, None) is not None:
            _log.warning("%s is well again", part)
