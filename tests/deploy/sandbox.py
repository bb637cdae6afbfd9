"""Run a command under the system call filter that a systemd unit asks for.

    python sandbox.py UNIT COMMAND [ARGUMENT...]

systemd itself is run in test_deb.py alone. This does with libseccomp what it does for
SystemCallFilter=, MemoryDenyWriteExecute=, RestrictAddressFamilies= and NoNewPrivileges=, from the
lines of the unit itself, and it is not root in there; mounts it leaves alone.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000
_EQUAL = 4
_MASKED_EQUAL = 7
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER = 0x10000000
_NOT_ROOT = 1000
_MAX_FAMILY = 46
_UNKNOWN = -1


class _Compare(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def settings(unit: Path, name: str) -> Iterator[str]:
    """The values of every line `name=` of a unit."""
    for line in unit.read_text().splitlines():
        key, separator, value = line.partition("=")
        if separator and key == name:
            yield value


def allowed_calls(unit: Path) -> set[str]:
    """The names of the system calls that a unit allows."""
    allowed: set[str] = set()
    for value in settings(unit, "SystemCallFilter"):
        names = {name for entry in value.lstrip("~").split() for name in _expand(entry)}
        allowed = allowed - names if value.startswith("~") else allowed | names
    return allowed | _expand("@default")  # which systemd always adds


def _expand(entry: str) -> set[str]:
    if not entry.startswith("@"):
        return {entry}
    listed = subprocess.run(
        ["systemd-analyze", "--no-pager", "syscall-filter", entry],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    lines = [line.strip() for line in listed.splitlines()[1:]]
    found: set[str] = set()
    for line in lines:
        if line and not line.startswith("#"):
            found |= _expand(line)
    return found


def leave_root() -> None:
    """Go on under another number, in a user namespace: SQLite gives files away if it is root."""
    user, group = os.geteuid(), os.getegid()
    if user != 0:
        return
    if ctypes.CDLL(None).unshare(_CLONE_NEWUSER) != 0:
        raise OSError("no user namespace is to be had")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{_NOT_ROOT} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{_NOT_ROOT} {group} 1")


def confine(unit: Path) -> None:
    """Put this process and what it starts under the unit's filters; raises OSError."""
    calls = allowed_calls(unit)
    families = {
        int(getattr(socket, name))
        for value in settings(unit, "RestrictAddressFamilies")
        for name in value.split()
    }
    if ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError("no_new_privs was refused")
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    denied = _ERRNO | errno.EPERM
    with_arguments = _Filter(library, _ALLOW)
    for family in set(range(_MAX_FAMILY)) - families:
        with_arguments.rule(_ERRNO | errno.EAFNOSUPPORT, "socket", _Compare(0, _EQUAL, family))
    if "yes" in settings(unit, "MemoryDenyWriteExecute"):
        both = mmap.PROT_WRITE | mmap.PROT_EXEC
        with_arguments.rule(denied, "mmap", _Compare(2, _MASKED_EQUAL, both, both))
        for name in ("mprotect", "pkey_mprotect"):
            executable = _Compare(2, _MASKED_EQUAL, mmap.PROT_EXEC, mmap.PROT_EXEC)
            with_arguments.rule(denied, name, executable)
    by_name = _Filter(library, _KILL_PROCESS)
    for name in calls | {"execve"}:
        by_name.rule(_ALLOW, name)
    with_arguments.load()
    by_name.load()


class _Filter:
    def __init__(self, library: ctypes.CDLL, default: int) -> None:
        self._library = library
        self._context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))

    def rule(self, action: int, name: str, *compares: _Compare) -> None:
        number = self._library.seccomp_syscall_resolve_name(name.encode())
        if number == _UNKNOWN:
            return
        array = (_Compare * len(compares))(*compares)
        self._check(
            self._library.seccomp_rule_add_array(
                self._context, ctypes.c_uint32(action), number, len(compares), array
            ),
            allowed=-errno.EACCES,  # a call that this architecture does not have
        )

    def load(self) -> None:
        self._check(self._library.seccomp_load(self._context))

    @staticmethod
    def _check(status: int, allowed: int = 0) -> None:
        if status not in {0, allowed}:
            raise OSError(-status, os.strerror(-status))


if __name__ == "__main__":
    leave_root()
    confine(Path(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
