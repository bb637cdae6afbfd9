"""Which keys a key store may use: several may share a KMI, and not each other's keys.

The same patterns say which keys are disabled by the configuration.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

_MAX_REMEMBERED = 4096


class KeyPatterns:
    """A list of key IDs: a `*` stands for any characters or none, all else for itself."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """`patterns` hold no other sign that fnmatch knows: the configuration refuses those."""
        self._pattern = re.compile("|".join(map(fnmatch.translate, patterns)))
        self._verdicts: dict[str, bool] = {}

    def admit(self, key_id: str) -> bool:
        """Whether a key ID matches one of them, as a whole and in the same case."""
        verdict = self._verdicts.get(key_id)
        if verdict is None:
            if len(self._verdicts) >= _MAX_REMEMBERED:
                self._verdicts.clear()
            verdict = self._verdicts[key_id] = self._pattern.match(key_id) is not None
        return verdict
