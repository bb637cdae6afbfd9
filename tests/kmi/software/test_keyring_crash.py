"""The keyring when its process is killed or its disk ends: what was acknowledged is there."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from xkiproxy.kmi.software import Keyring

_WRITER = """
import itertools, os, sys
from pathlib import Path
from xkiproxy.crypto.algorithms import KeySpec
from xkiproxy.kmi.software import Keyring

keyring = Keyring(Path(sys.argv[1]), os.environ["MASTER_KEY"])
for number in itertools.count():
    name = f"{sys.argv[2]}-{number}"
    print(name, keyring.create(name, KeySpec.AES_256).version, flush=True)
    if number % 2:
        print(name, keyring.rotate(name).version, flush=True)
"""

_FULL = """
import os, resource, sys
from pathlib import Path
from xkiproxy.crypto.algorithms import KeySpec
from xkiproxy.kmi.base import KeyManagerError
from xkiproxy.kmi.software import Keyring

keyring = Keyring(Path(sys.argv[1]), os.environ["MASTER_KEY"])
keyring.create("first", KeySpec.AES_256)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    for number in range(1000):
        keyring.create(f"full-{number}", KeySpec.AES_256)
        print(f"full-{number}", 1, flush=True)
except KeyManagerError as error:
    print(error, file=sys.stderr)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
keyring.create("after", KeySpec.AES_256)
print("after", 1, flush=True)
os.kill(os.getpid(), 9)
"""


def start(script: str, path: Path, master_key: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(path), *args],
        env={**os.environ, "MASTER_KEY": master_key},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def acknowledged(lines: list[str]) -> dict[str, int]:
    """The newest version of each key that the child said is there; a cut line says nothing."""
    return {
        name: int(version)
        for name, version in (line.split() for line in lines if line.endswith("\n"))
    }


def check(path: Path, master_key: str, promised: dict[str, int]) -> None:
    keyring = Keyring(path, master_key)
    found = {info.key_id: info for info in keyring.list()}
    keyring.close()
    for name, version in promised.items():
        assert found[name].version >= version
    for info in found.values():
        assert info.problem == ""
        assert info.versions == tuple(range(1, info.version + 1))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_kill_at_any_moment(path: Path, master_key: str) -> None:
    promised: dict[str, int] = {}
    chance = random.Random()
    for turn in range(20):
        child = start(_WRITER, path, master_key, f"turn{turn}")
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(chance.randint(1, 30))]
        child.send_signal(signal.SIGKILL)
        output, errors = child.communicate()
        assert child.returncode == -signal.SIGKILL, errors
        promised |= acknowledged(lines + output.splitlines(keepends=True))
        check(path, master_key, promised)
    assert len(promised) >= 20


def test_a_full_disk(path: Path, master_key: str) -> None:
    child = start(_FULL, path, master_key)
    output, errors = child.communicate()
    assert child.returncode == -signal.SIGKILL, errors
    promised = acknowledged(output.splitlines(keepends=True))
    assert "the disk" in errors
    assert str(path) in errors
    assert "after" in promised
    assert 1 < len(promised) < 1000
    check(path, master_key, {"first": 1, **promised})
