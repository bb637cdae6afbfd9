"""The systemd unit: it verifies, is as tight as its head says, and the proxy lives under it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsm import SOFTHSM, children, make_hsm
from ports import free_ports
from sandbox import allowed_calls, settings

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "systemd" / "xkiproxy.service"
SANDBOX = Path(__file__).with_name("sandbox.py")


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_unit_verifies(tmp_path: Path) -> None:
    """With a command in the place of the installed one, which verify wants to see."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/bin/xkiproxy", "/bin/true"))
    done = analyze("verify", "--man=no", str(unit))
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_a_mistake_in_a_unit_is_seen(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/bin/xkiproxy", "/bin/true") + "Wrong=1\n")
    assert "Wrong" in analyze("verify", "--man=no", str(unit)).stderr


def test_exposure_is_what_the_head_says() -> None:
    done = analyze("security", "--offline=true", "--no-pager", str(UNIT))
    assert done.returncode == 0, done.stderr
    measured = re.search(
        r"Overall exposure level for xkiproxy.service: ([\d.]+ [A-Z]+)", done.stdout
    )
    said = re.search(r"\(systemd (\d+)\): overall exposure ([\d.]+ [A-Z]+)", UNIT.read_text())
    assert measured is not None
    assert said is not None
    version = analyze("--version").stdout.split()[1]
    if version == said[1]:
        assert measured[1] == said[2]
    assert float(measured[1].split()[0]) < 2.0


def test_secrets_come_as_credentials_and_a_missing_one_is_no_guess() -> None:
    loaded = [value.partition(":") for value in settings(UNIT, "LoadCredential")]
    assert {name for name, _, _ in loaded} >= {"master-key", "hsm-pin", "tls-key", "keystore"}
    for name, _, path in loaded:
        assert path == f"/etc/xkiproxy/credentials/{name}"
    defaults = dict(value.split(":", 1) for value in settings(UNIT, "SetCredential"))
    assert defaults == {name: r"\n" for name, _, _ in loaded}
    assert "Environment=" not in UNIT.read_text().replace("Environment=XKIPROXY_CONFIG=", "")


def test_filter_lacks_what_is_dangerous() -> None:
    calls = allowed_calls(UNIT)
    assert {"read", "write", "socket", "memfd_create", "clone3", "fdatasync"} <= calls
    assert calls.isdisjoint({"mount", "ptrace", "bpf", "setuid", "chown", "reboot", "kexec_load"})


@pytest.mark.parametrize(
    ("program", "seen"),
    [
        ("import mmap; mmap.mmap(-1, 4096, prot=7)", "PermissionError"),
        ("import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "Address family"),
    ],
)
def test_sandbox_refuses(program: str, seen: str) -> None:
    done = sandboxed(sys.executable, "-c", program)
    assert done.returncode == 1
    assert seen in done.stderr


def test_sandbox_kills_at_a_forbidden_call() -> None:
    mount = "import ctypes; ctypes.CDLL(None).mount(b'a', b'/nowhere', b'tmpfs', 0, 0)"
    assert sandboxed(sys.executable, "-c", mount).returncode == -signal.SIGSYS


def sandboxed(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SANDBOX), str(UNIT), *command],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


class Service:
    """The proxy started as the unit starts it, under its filters, told apart by its messages."""

    def __init__(self, directory: Path, *init: str, workers: int = 1) -> None:
        self.config = directory / "etc" / "xkiproxy.toml"
        self.log = directory / "log"
        program = [sys.executable, "-m", "xkiproxy"]
        subprocess.run([*program, "init", str(self.config.parent), *init], check=True, timeout=60)
        self.port, self.admin_port = free_ports(2)
        text = self.config.read_text()
        text = text.replace("0.0.0.0:8443", f"127.0.0.1:{self.port}")
        text = text.replace("127.0.0.1:9464", f"127.0.0.1:{self.admin_port}")
        self.config.write_text(text.replace("workers = 1", f"workers = {workers}"))
        self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notices.settimeout(60)
        address = directory / "notify"
        self.notices.bind(str(address))
        (command,) = settings(UNIT, "ExecStart")
        serve = [*program, *shlex.split(command)[1:]]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SANDBOX), str(UNIT), *serve],
                stdout=log, stderr=log,
                env={
                    **os.environ,
                    "XKIPROXY_CONFIG": str(self.config),
                    "NOTIFY_SOCKET": str(address),
                },
            )  # fmt: skip

    def notice(self) -> dict[str, str]:
        try:
            text = self.notices.recv(4096).decode()
        except TimeoutError:
            pytest.fail(self.log.read_text())
        return dict(line.split("=", 1) for line in text.splitlines())

    def await_ready(self) -> None:
        """A KMI may be connected a moment after the server serves."""
        answer = ""
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}/readyz").close()
                return
            except urllib.error.HTTPError as error:
                answer = error.read().decode()
                time.sleep(0.1)
        pytest.fail(answer + self.log.read_text())

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "xkiproxy", *arguments, "--config", str(self.config)],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=30)
        self.notices.close()


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Service]:
    hsm = make_hsm(tmp_path / "hsm", monkeypatch)
    made = Service(
        tmp_path, "--kmi", "pkcs11", "--module", str(SOFTHSM), "--token", hsm.token,
        "--pin-file", str(hsm.pin_file), workers=request.param,
    )  # fmt: skip
    yield made
    made.close()


def test_proxy_with_an_hsm_lives_under_the_filters(service: Service) -> None:
    assert service.notice() == {"READY": "1"}
    service.await_ready()
    called = service.run("call", "encrypt", "demo-key", "--plaintext", "hello")
    assert called.returncode == 0, called.stdout + called.stderr + service.log.read_text()
    processes = [service.process.pid, *descendants(service.process.pid)]
    assert len(processes) >= 3
    for pid in processes:
        assert "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()

    added = service.run("credentials", "add")
    assert added.returncode == 0, added.stderr
    reloaded = service.run("reload")
    assert reloaded.returncode == 0, reloaded.stderr
    before = time.monotonic_ns() // 1000
    notice = service.notice()
    assert notice.pop("RELOADING") == "1"
    assert 0 < int(notice.pop("MONOTONIC_USEC")) <= before
    assert service.notice() == {"READY": "1"}

    service.process.send_signal(signal.SIGTERM)
    notice = service.notice()
    assert notice.pop("STOPPING") == "1"
    assert 15e6 <= int(notice.pop("EXTEND_TIMEOUT_USEC")) <= 40e6
    assert notice == {}
    assert service.process.wait(timeout=60) == 0, service.log.read_text()


def test_failed_reload_ends_too_and_is_told_by_the_command(service: Service) -> None:
    assert service.notice() == {"READY": "1"}
    (command,) = settings(UNIT, "ExecReload")
    certificate = service.config.parent / "tls" / "server.crt"
    certificate.write_text("no certificate")
    reloaded = service.run(*shlex.split(command)[1:])
    assert reloaded.returncode == 1
    assert "nothing was changed" in reloaded.stderr
    assert service.notice()["RELOADING"] == "1"
    assert service.notice() == {"READY": "1"}
    assert service.process.poll() is None


def descendants(pid: int) -> list[int]:
    direct = list(children(pid))
    return direct + [grandchild for child in direct for grandchild in descendants(child)]
