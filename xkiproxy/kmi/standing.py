"""Whether a KMI is worth asking, by what came of its last attempts."""

from __future__ import annotations

_FIRST_PAUSE_SECONDS = 0.25
_LAST_PAUSE_SECONDS = 4.0

_MAX_OUTRUN = 5
"""To have been the slower one so many times in a row is a failure."""


class Standing:
    """A circuit breaker for those who have another KMI to ask.

    After a failure nobody asks for a pause, which doubles with each further failure; then one
    request tries, while the others still go elsewhere. A success ends it.
    """

    __slots__ = ("_is_on_trial", "_outrun", "_outrun_at", "_pause", "_until")

    def __init__(self) -> None:
        self._pause = 0.0
        self._until = 0.0
        self._is_on_trial = False
        self._outrun = 0
        self._outrun_at = 0.0

    @property
    def is_good(self) -> bool:
        """Whether the last attempt succeeded."""
        return self._pause == 0.0

    def may_try(self, now: float) -> bool:
        """Whether to ask it; `now` on the clock of `time.monotonic`. A trial is given out once."""
        if self._pause == 0.0:
            return True
        if now < self._until:
            return False
        self._until = now + self._pause
        self._is_on_trial = True
        return True

    def give_back(self) -> None:
        """What was given out as a trial came to nothing: the next may try at once."""
        if self._is_on_trial:
            self._is_on_trial = False
            self._until = 0.0

    def fail(self, now: float) -> None:
        """An attempt failed, or took too long; those that had begun before count for nothing."""
        if self._pause == 0.0:
            self._pause = _FIRST_PAUSE_SECONDS
        elif self._is_on_trial:
            self._pause = min(2 * self._pause, _LAST_PAUSE_SECONDS)
        else:
            return
        self._is_on_trial = False
        self._until = now + self._pause

    def outrun(self, asked: float, now: float) -> None:
        """Another that was asked later has answered first; this one was at `asked`.

        To be slow once is no failure, however many had asked meanwhile; to be slow on trial is one,
        and so is to be slow always.
        """
        if asked >= self._outrun_at:
            self._outrun += 1
            self._outrun_at = now
        if self._is_on_trial or self._outrun >= _MAX_OUTRUN:
            self.fail(now)

    def succeed(self) -> None:
        """It has answered, be it with a refusal: it is there."""
        self._pause = 0.0
        self._is_on_trial = False
        self._outrun = 0
