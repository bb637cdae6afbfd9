"""Everything that the servers and commands of a test run have put out, searched for all secrets.

Secrets are found where they are kept: credentials, master keys, PINs, HMAC keys and private keys in
the folders of the tests, and the plaintexts that tests have encrypted. Outputs are what `OUTPUTS`
names: logs, audit logs, what commands printed, what the admin listener said, and the command lines
and environments of processes.
"""

from __future__ import annotations

import base64
import re
import subprocess
from pathlib import Path

OUTPUTS = ("*.log", "audit*.jsonl*")
MIN_SIZE = 12
"""What is shorter may stand there by chance."""

_SECRET_FILES = ("master.key", "pin", "*hmac*", "*token*")
_CREDENTIAL = re.compile(r'access_key_secret = "([^"]+)"')

plaintexts: set[bytes] = set()
"""What tests have encrypted."""


def secrets(folder: Path) -> set[str]:
    """Every secret below a folder, and every plaintext in the forms in which it could be seen."""
    found: set[str] = set()
    for file in folder.rglob("*.toml"):
        found.update(_CREDENTIAL.findall(_text(file)))
    for pattern in _SECRET_FILES:
        for file in folder.rglob(pattern):
            if file.is_file() and not _is_output(file):
                found.update(_text(file).split())
    for file in folder.rglob("*.key"):
        lines = _text(file).splitlines()
        found.update(line for line in lines if len(line) == 64 and not line.startswith("-"))
    for plaintext in plaintexts:
        found.add(plaintext.hex())
        found.add(base64.b64encode(plaintext).decode())
        if plaintext.isascii():
            found.add(plaintext.decode())
    return {secret for secret in found if len(secret) >= MIN_SIZE and secret.isprintable()}


def leaks(folder: Path) -> list[str]:
    """The lines of outputs below a folder in which a secret stands, with their files."""
    outputs = [str(file) for pattern in OUTPUTS for file in folder.rglob(pattern) if file.is_file()]
    searched = secrets(folder)
    if not outputs or not searched:
        return []
    patterns = folder / "secrets-of-the-run"
    patterns.write_text("\n".join(sorted(searched)) + "\n")
    done = subprocess.run(
        ["xargs", "-0", "grep", "--fixed-strings", "--with-filename", "--text", "--line-number",
         f"--file={patterns}", "--"],
        input="\0".join(outputs), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return [line[:400] for line in done.stdout.splitlines()]


def _is_output(file: Path) -> bool:
    """The HMAC of a closed audit log has "hmac" in its name, and is no secret."""
    return any(file.match(pattern) for pattern in OUTPUTS)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
