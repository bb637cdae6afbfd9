"""A virtual environment that could not be made is not taken for one at the next try."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FAILING = """#!/bin/sh
mkdir -p "$3/bin" && touch "$3/bin/python"
exit 1
"""
"""What `python3 -m venv` does on a Debian without python3-venv."""


def make(python: Path, venv: Path) -> int:
    arguments = [f"PYTHON={python}", f"VENV={venv}", f"{venv}/bin/pip"]
    command = ["make", "--silent", "--directory", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, check=False).returncode


@pytest.mark.parametrize("there_before", [False, True])
def test_a_failed_environment_fails_each_time(tmp_path: Path, there_before: bool) -> None:
    python, venv = tmp_path / "python3", tmp_path / "venv"
    python.write_text(FAILING)
    python.chmod(0o755)
    if there_before:
        venv.mkdir()
        (venv / "kept").touch()
    for _ in range(2):
        assert make(python, venv) != 0
        assert venv.exists() == there_before
    assert (venv / "kept").exists() == there_before
