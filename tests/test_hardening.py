"""No process that holds secrets leaves its memory behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hsm import children, make_hsm
from test_end_to_end import Installation

_PROGRAM = """
import ctypes, os, resource, sys
sys.argv = ["xkiproxy", "--version"]
from xkiproxy.cli import main
try:
    main()
except SystemExit:
    pass
print("dumpable", ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE))
sys.stdout.flush()
os.abort()
"""


def test_a_command_that_crashes_leaves_no_core(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status = os.waitpid(process.pid, 0)
    process.returncode = 0
    assert "dumpable 0 (0, 0)" in said
    assert os.WIFSIGNALED(status)
    assert not os.WCOREDUMP(status)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_server_workers_and_lanes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    hsm = make_hsm(tmp_path / "hsm", monkeypatch)

    class OnHsm(Installation):
        def run(self, *arguments, **options):
            if arguments[0] == "init":
                arguments += (
                    "--kmi", "pkcs11", "--module", str(hsm.module), "--token", hsm.token,
                    "--pin-file", str(hsm.pin_file),
                )  # fmt: skip
            return super().run(*arguments, **options)

    server = OnHsm(tmp_path / "demo")
    text = server.config.read_text()
    server.config.write_text(text.replace("workers = 1 ", f"workers = {workers} "))
    server.start()
    try:
        assert server.process is not None
        found = {server.process.pid: "server", **descendants(server.process.pid)}
        assert sum("lane" in title for title in found.values()) >= workers
        for pid, title in found.items():
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE), title
    finally:
        server.stop()


def descendants(pid: int) -> dict[int, str]:
    """Processes below one, with their titles."""
    found = {}
    for child, title in children(pid).items():
        found[child] = title
        found.update(descendants(child))
    return found
