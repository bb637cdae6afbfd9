"""Tokens for tests, and the processes of their lanes as the kernel shows them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from Cryptodome.Cipher import AES
from Cryptodome.Util.Padding import pad

from xkiproxy.config.models import Pkcs11Settings
from xkiproxy.config.secrets import write_secret_file
from xkiproxy.crypto.algorithms import GCM_MODES, IV_SIZES, Algorithm, Padding
from xkiproxy.crypto.envelope import authenticated_data
from xkiproxy.crypto.operations import (
    CiphertextFormat,
    Decrypt,
    Decrypted,
    Encrypt,
    Encrypted,
    Operation,
    Result,
)
from xkiproxy.kmi.contract import Kmi
from xkiproxy.kmi.queued import QueuedKmi

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")
PIN = "a-user-pin-1234"
DEADLINE = 5.0

_TITLE = re.compile(r"xkiproxy: lane (\d+) of KMI [a-z0-9_-]+")
_ELSEWHERE = Path(__file__).parent / "kmi" / "pkcs11" / "elsewhere.py"


@dataclass
class Hsm:
    """A token behind a module."""

    directory: Path
    module: Path = SOFTHSM
    token: str = "t1"
    pin: str = PIN
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def pin_file(self) -> Path:
        return self.directory / "pin"

    def settings(self, **changes: Any) -> Pkcs11Settings:
        fields: dict[str, Any] = {
            "name": "hsm",
            "type": "pkcs11",
            "module": self.module,
            "token": self.token,
            "pin": self.pin_file,
            "lanes": 1,
            **self.changes,
            **changes,
        }
        return Pkcs11Settings(**fields)

    def add_token(self, label: str) -> Path:
        """Make another SoftHSM token; returns its folder."""
        folder = self.directory / "tokens"
        before = set(folder.iterdir())
        run(
            "softhsm2-util", "--init-token", "--free", "--label", label, "--pin", self.pin,
            "--so-pin", "an-so-pin-1234",
        )  # fmt: skip
        (made,) = set(folder.iterdir()) - before
        return made

    def elsewhere(self, *calls: tuple[str, dict[str, Any]], token: str = "") -> list[Any]:
        """Have a stranger's program make these calls on the token."""
        asked = {
            "module": str(self.module), "token": token or self.token, "pin": self.pin,
            "calls": calls,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, str(_ELSEWHERE)],
            input=json.dumps(asked), capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        results: list[Any] = json.loads(done.stdout)
        return results

    def plant(self, label: str, value: bytes, key_id: str = "00000001", **more: Any) -> None:
        """Import a key whose value the test knows."""
        token = more.pop("token", "")
        self.elsewhere(
            ("create", {"label": label, "key_id": key_id, "value": value.hex(), **more}),
            token=token,
        )

    def tool(self, *arguments: str) -> str:
        """OpenSC's pkcs11-tool, logged in; returns what it says."""
        return run(
            "pkcs11-tool", "--module", str(self.module), "--token-label", self.token,
            "--login", "--pin", self.pin, *arguments,
        )  # fmt: skip


def make_hsm(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Hsm:
    """A SoftHSM token, `t1`, in a folder of its own."""
    (directory / "tokens").mkdir(parents=True)
    config = directory / "softhsm2.conf"
    config.write_text(f"directories.tokendir = {directory}/tokens\nlog.level = ERROR\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(config))
    made = Hsm(directory)
    write_secret_file(made.pin_file, PIN + "\n")
    made.add_token("t1")
    return made


def run(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def submit(kmi: Kmi, operation: Operation, seconds: float = DEADLINE) -> Result:
    return await kmi.submit(operation, time.monotonic() + seconds)


async def encrypt(kmi: Kmi, operation: Encrypt, seconds: float = DEADLINE) -> Encrypted:
    result = await submit(kmi, operation, seconds)
    assert isinstance(result, Encrypted)
    return result


async def decrypt(kmi: Kmi, operation: Decrypt, seconds: float = DEADLINE) -> Decrypted:
    result = await submit(kmi, operation, seconds)
    assert isinstance(result, Decrypted)
    return result


def opening(operation: Encrypt, made: Encrypted) -> Decrypt:
    """The Decrypt of what an Encrypt made."""
    raw = operation.format is CiphertextFormat.RAW
    return Decrypt(
        operation.key_id,
        made.ciphertext,
        made.iv,
        None if raw else made.version,
        made.algorithm,
        made.padding,
        operation.aad,
        operation.format,
    )


def every_way(key_id: str, sizes: tuple[int, ...] = (0, 1, 15, 16, 17, 1000)) -> list[Encrypt]:
    """Every algorithm, padding and format of AES, on plaintexts of these sizes."""
    ways: list[Encrypt] = []
    for size in sizes:
        text = os.urandom(size)
        for form in CiphertextFormat:
            ways.append(Encrypt(key_id, text, format=form))
            ways.append(Encrypt(key_id, text, Algorithm.AES_GCM, aad=b"an aad", format=form))
            for algorithm in (Algorithm.AES_CBC, Algorithm.AES_ECB):
                ways.append(Encrypt(key_id, text, algorithm, format=form))
                ways.append(Encrypt(key_id, text, algorithm, Padding.PKCS7, format=form))
                if size % 16 == 0:
                    ways.append(Encrypt(key_id, text, algorithm, Padding.NONE, format=form))
    return ways


def bound(operation: Encrypt, version: int) -> bytes:
    """What GCM authenticates."""
    raw = operation.format is CiphertextFormat.RAW
    return operation.aad if raw else authenticated_data(operation.aad, version)


def by_cryptodome(key: bytes, operation: Encrypt, made: Encrypted) -> bytes:
    """The ciphertext as PyCryptodome makes it, under the same IV."""
    assert len(made.iv) == IV_SIZES[made.algorithm]
    if made.algorithm in GCM_MODES:
        cipher = AES.new(key, AES.MODE_GCM, nonce=made.iv)
        cipher.update(bound(operation, made.version))
        return b"".join(cipher.encrypt_and_digest(operation.plaintext))
    text = operation.plaintext
    if made.padding is Padding.PKCS7:
        text = pad(text, 16)
    if made.algorithm is Algorithm.AES_ECB:
        return AES.new(key, AES.MODE_ECB).encrypt(text)
    return AES.new(key, AES.MODE_CBC, made.iv).encrypt(text)


def straight(operation: Encrypt, made: Encrypted) -> tuple[tuple[str, dict[str, Any]], str] | None:
    """The call with which a stranger decrypts, and its result; None where there are no blocks."""
    if not made.ciphertext:
        return None
    gcm = made.algorithm in GCM_MODES
    padded = made.algorithm is Algorithm.AES_CBC and made.padding is Padding.PKCS7
    call: dict[str, Any] = {
        "label": operation.key_id,
        "key_id": made.version.to_bytes(4, "big").hex(),
        "mechanism": "AES_CBC_PAD" if padded else str(made.algorithm),
        "data": made.ciphertext.hex(),
        "iv": made.iv.hex(),
    }
    if gcm:
        call["aad"] = bound(operation, made.version).hex()
    text = operation.plaintext
    if made.algorithm is Algorithm.AES_ECB and made.padding is Padding.PKCS7:
        text = pad(text, 16)
    return ("decrypt", call), text.hex()


def ready_lanes(parent: int) -> dict[int, int]:
    """The process IDs of the lanes that have logged in, by their index."""
    found = {}
    for pid, title in children(parent).items():
        match = _TITLE.fullmatch(title)
        if match:
            found[int(match[1])] = pid
    return found


def children(parent: int) -> dict[int, str]:
    """The titles of a process's children, by their process ID; the dead have none."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(status[1]) == parent and status[0] != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_text().rstrip("\0 ")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


async def eventually(condition: Callable[[], object], seconds: float = 20.0) -> float:
    """Wait until a condition holds; returns how long it took."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            pytest.fail(f"it did not come within {seconds:g} s")
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def restarts(kmi: QueuedKmi) -> float:
    """How many lanes were replaced, whatever the reason."""
    return sum(value for (value,) in kmi._metrics._metrics.kmi_lane_restarts.values().values())
