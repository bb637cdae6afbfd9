"""What an operation went through."""

from __future__ import annotations

from xkiproxy.crypto.caller import Caller

_NOBODY = Caller()


class Trail:
    """What is known of a request once it is to be performed, and what then came to it.

    `access_key_id`, `caller` and `source` (the client's address) say who asks; the key store fills
    in the rest, for the audit record.
    """

    __slots__ = (
        "access_key_id", "caller", "key_id", "kmi", "policy", "quota", "retry_after", "source",
        "version",
    )  # fmt: skip

    def __init__(self, source: str = "") -> None:
        self.access_key_id = ""
        self.caller = _NOBODY
        self.source = source
        self.key_id = ""
        self.kmi = ""
        self.version = 0
        self.policy = ""
        """Which policy has denied it."""
        self.quota = ""
        """Over which quota it is, and when to come again, in seconds."""
        self.retry_after = 1
