"""`xkiproxy conformance` against running servers: both protocols, on software and on an HSM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hsm import make_hsm
from pykmip import PyKmip
from test_end_to_end import Installation
from transit import TransitSite

AWS_STORE = """
[[keystore]]
name = "aws"
protocol = "xks"
path_prefix = "/aws"
kmi = ["local"]
credentials = "credentials/aws.toml"
"""


class TwoClouds(Installation):
    """One server, one KMI, an `xki` and an `xks` key store on it, and a key of every kind.

    `kmi` takes the place of the KMI that `init` has made.
    """

    def __init__(self, directory: Path, *init: str, kmi: str = "") -> None:
        self._init = init
        super().__init__(directory)
        with self.config.open("a") as file:
            file.write("deadline_ms = 5000\n" + AWS_STORE + "deadline_ms = 5000\n" + kmi)
        if kmi:
            text = self.config.read_text()
            self.config.write_text(text.replace('kmi = ["local"]', 'kmi = ["keymanager"]'))
            self.run("keys", "create", "demo-key", "--kmi", "keymanager")
        for store in ("aws", "aws", "demo"):
            self.run("credentials", "add", "--keystore", store)
        at = ("--kmi", "keymanager" if kmi else "local")
        self.run("keys", "create", "encrypt-only", "--usage", "encrypt", *at)
        self.run("keys", "create", "decrypt-only", "--usage", "decrypt", *at)
        self.run("keys", "create", "disabled", *at)
        self.run("keys", "disable", "disabled", *at)

    def run(
        self, *arguments: str, status: int = 0, config: bool = True, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        if arguments[0] == "init":
            arguments += self._init
        return super().run(*arguments, status=status, config=config, stdin=stdin)

    def conformance(self, store: str, *more: str, status: int = 0) -> str:
        return self.run(
            "conformance", "--keystore", store, "--key", "demo-key",
            "--encrypt-only-key", "encrypt-only", "--decrypt-only-key", "decrypt-only",
            "--disabled-key", "disabled", "--deadline-ms", "5000", *more, status=status,
        ).stdout  # fmt: skip


@pytest.fixture
def kmip(tmp_path: Path) -> Iterator[str]:
    """The KMI of a PyKMIP server in the configuration's words."""
    server = PyKmip(tmp_path / "kmip")
    server.start()
    yield server.toml("keymanager")
    server.stop()


@pytest.fixture
def transit(tmp_path: Path) -> Iterator[str]:
    """The KMI of a Transit engine in the configuration's words."""
    site = TransitSite(tmp_path / "transit")
    yield site.toml("keymanager")
    site.server.close()


@pytest.fixture(params=["software", "pkcs11", "kmip", "transit"])
def server(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TwoClouds]:
    init: tuple[str, ...] = ()
    kmi = ""
    if request.param in ("kmip", "transit"):
        kmi = request.getfixturevalue(request.param)
    if request.param == "pkcs11":
        hsm = make_hsm(tmp_path / "hsm", monkeypatch)
        init = (
            "--kmi", "pkcs11", "--module", str(hsm.module), "--token", "t1",
            "--pin-file", str(hsm.pin_file),
        )  # fmt: skip
    made = TwoClouds(tmp_path / "site", *init, kmi=kmi)
    made.start()
    yield made
    process = made.process
    try:
        made.stop()
    finally:
        if process is not None:
            process.kill()


def test_both_protocols_are_green(
    server: TwoClouds, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    for store, protocol in (("demo", "xki"), ("aws", "xks")):
        # Transit draws IVs itself, and does neither CBC nor ECB.
        skipped = 4 if (request.node.callspec.params["server"], store) == ("transit", "demo") else 1
        junit, output = tmp_path / f"{store}.xml", tmp_path / f"{store}.json"
        text = server.conformance(store, "--junit", str(junit), "--output", str(output))
        assert f"0 failed, {skipped} skipped" in text
        document = json.loads(output.read_text())
        assert (document["protocol"], document["fail"]) == (protocol, 0)
        assert document["skip"] == skipped
        suite = ElementTree.parse(junit).getroot()
        assert suite.get("tests") == str(len(document["cases"]))
        assert "transport.client-certificate" in text


@pytest.mark.parametrize("server", ["software"], indirect=True)
def test_what_it_says_and_how_it_ends(server: TwoClouds, tmp_path: Path) -> None:
    server.run("keys", "disable", "demo-key")
    document = json.loads(server.conformance("demo", "--only", "gcm.*", "--json", status=1))
    assert document["fail"] == 7
    assert "came HTTP 403 KeyDisabledForbidden" in document["cases"][0]["detail"]
    server.run("keys", "enable", "demo-key")

    url = f"https://localhost:{server.port}/demo/kms/xki/v1"
    credentials = str(server.directory / "credentials" / "demo.toml")
    given = ("conformance", url, "--key", "demo-key", "--credentials", credentials)
    ca = str(server.directory / "tls" / "server.crt")
    answer = server.run(*given, "--ca", ca, "--only", "health.*", config=False)
    assert "1 passed, 0 failed" in answer.stdout
    answer = server.run(*given, config=False, status=1)
    assert "give --ca FILE or --fingerprint" in answer.stderr
    answer = server.run(*given, "--fingerprint", "sha256-00", config=False, status=1)
    assert "its certificate is sha256-" in answer.stderr
    fingerprints = json.loads(server.run("fingerprint", "--json").stdout)
    pin = fingerprints["certificate_sha256"]
    server.run(*given, "--fingerprint", pin, "--only", "transport.*", config=False)
    server.stop(signal.SIGTERM)
    answer = server.run(*given, "--ca", ca, config=False, status=1)
    assert "no answer" in answer.stderr


def test_a_secret_from_the_environment(tmp_path: Path) -> None:
    """Also: misuse is told apart from failure."""
    url = "https://localhost:1/kms/xks/v1"
    environment = {**os.environ, "XKIPROXY_ACCESS_KEY_SECRET": "a-secret-of-the-environment"}

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "xkiproxy", "conformance", *arguments],
            env=environment, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path,
        )  # fmt: skip
        assert "a-secret-of-the-environment" not in done.stdout + done.stderr
        return done.returncode, " ".join(done.stderr.replace("│", " ").split())

    status, text = run(url, "--key", "k", "--access-key-id", "AAAAAAAAAAAAAAAAAAAA")
    assert (status, "no answer" in text) == (1, True)
    for arguments, why in (
        ((url, "--key", "k"), "--access-key-id"),
        ((url,), "a key to test with"),
        (("https://localhost/kms", "--key", "k"), "must end in /kms/xki/v1 or /kms/xks/v1"),
        (("http://example.com/kms/xks/v1", "--key", "k"), "loopback"),
        ((url, "--key", "k", "--only", "nonsense"), "no case is called"),
        ((url, "--key", "k", "--ca", "x", "--fingerprint", "y"), "one of --ca"),
    ):
        status, text = run(*arguments)
        assert (status, why in text) == (2, True), text
    status, _ = run(url, "--list")
    assert status == 0
