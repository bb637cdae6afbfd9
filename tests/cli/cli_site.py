"""What the tests of the command line share; the fixtures stand in conftest.py."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ACCESS_KEY_ID = "XKIABCDEFGHIJKLMNOPQRSTU"
ACCESS_KEY_SECRET = "the-secret-of-the-tests-0123456789-abcdefgh"


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.status == 0, self.err
        return json.loads(self.out)


Run = Callable[..., Outcome]
Answer = Callable[[Any], None]


CONFIG = """\
[server]
listen = "127.0.0.1:{port}"
[server.tls]
certificate = "tls/server.crt"
private_key = "tls/server.key"
[[kmi]]
name = "local"
type = "software"
keyring = "keyring.db"
[[keystore]]
name = "demo"
protocol = "{protocol}"
path_prefix = "/demo"
kmi = ["local"]
credentials = "credentials/demo.toml"
"""

SECOND = """\
[[keystore]]
name = "second"
protocol = "xki"
path_prefix = "/second"
kmi = ["local"]
credentials = {credentials}
"""


@dataclass(frozen=True)
class Site:
    """A directory with a configuration, a certificate and a credential; nothing runs on it."""

    directory: Path
    protocol: str = "xki"

    @property
    def config(self) -> Path:
        return self.directory / "xkiproxy.toml"

    @property
    def credentials(self) -> Path:
        return self.directory / "credentials" / "demo.toml"

    @property
    def certificate(self) -> Path:
        return self.directory / "tls" / "server.crt"

    @property
    def private_key(self) -> Path:
        return self.directory / "tls" / "server.key"

    def listen_on(self, port: int) -> None:
        self.config.write_text(CONFIG.format(port=port, protocol=self.protocol))

    def add_keystore(self, credentials: str) -> None:
        """A key store named second; `credentials` is TOML."""
        self.config.write_text(self.config.read_text() + SECOND.format(credentials=credentials))


@dataclass
class Recorded:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(self.body)
        (metadata,) = (name for name in fields if name.lower() == "requestmetadata")
        request_id = {name.lower(): v for name, v in fields.pop(metadata).items()}["kmsrequestid"]
        assert request_id.startswith("req-")
        return fields


@dataclass
class Server:
    """A TLS server; `answer` is what it says next."""

    port: int = 0
    status: int = 200
    answer: bytes = b'{"RequestId": "the-id"}'
    date: str | None = None
    delay: float = 0
    requests: list[Recorded] = field(default_factory=list)

    @property
    def last(self) -> Recorded:
        return self.requests[-1]


def nothing_sent(server: Server, outcome: Outcome, status: int = 1) -> str:
    """The error of a call that must not have sent its request."""
    assert outcome.status == status
    assert server.requests == []
    return outcome.err


def feed(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    """Put a text on standard input."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
