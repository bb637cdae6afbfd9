"""What an operation went through."""

from __future__ import annotations

from xkiproxy.crypto.caller import Caller
from xkiproxy.observability.timing import Timing

_NOBODY = Caller()


class Trail:
    """What is known of a request once it is to be performed, and what then came to it.

    `access_key_id`, `caller` and `source` (the client's address) say who asks; the key store fills
    in the rest, for the audit record. `timing` is there where the request's time is followed.
    """

    __slots__ = ("access_key_id", "caller", "key_id", "kmi", "source", "timing", "version")

    def __init__(self, source: str = "", timing: Timing | None = None) -> None:
        self.access_key_id = ""
        self.caller = _NOBODY
        self.source = source
        self.timing = timing
        self.key_id = ""
        self.kmi = ""
        self.version = 0
