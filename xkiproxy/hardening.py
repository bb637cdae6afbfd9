"""What a process that holds secrets does first."""

from __future__ import annotations

import ctypes
import resource

_PR_SET_DUMPABLE = 4


def forbid_core_dumps() -> None:
    """Keep this process's memory from disks and from debuggers of the same user.

    Its core file may have no size (getrlimit(2)), and it is not dumpable (prctl(2)), which holds
    for a core that is piped to a program too, and lets only root look at it through ptrace(2).
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
