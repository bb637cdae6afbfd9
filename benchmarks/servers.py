"""The servers that a load is put on, as child processes on free ports of 127.0.0.1.

with ProxyServer(kmi="pkcs11", lanes=2) as proxy:
    await run_load(Plan(proxy.target, proxy.workload("xki")), probe=proxy.cpu_seconds)
"""

from __future__ import annotations

import base64
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

import tomli_w

from benchmarks.load.client import Target
from benchmarks.load.requests import Call, Workload
from benchmarks.load.results import LoadError
from xkiproxy.cli.certificate import CertificateKey, self_signed
from xkiproxy.config.secrets import write_secret_file
from xkiproxy.keystores.credentials import Credential, parse_credentials
from xkiproxy.keystores.credentials_file import format_credentials

ProtocolName = Literal["xki", "xks"]

KEY_ID = "demo-key"

_START_SECONDS = 30.0
_STOP_SECONDS = 20.0
_HOST = "127.0.0.1"
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_ROOT = Path(__file__).parents[1]
_POLICIES = """
permit(principal, action, resource);
forbid(principal, action == Action::"decrypt", resource)
when { context has source_vpc && context.source_vpc == "vpc-other" };
"""

_PIN = "123456"
_TITLE = re.compile(r"xkiproxy: ([a-z]+ \d+)")
_MODULES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
)


class ChildServer:
    """A server process in a temporary directory: `with` starts and stops it."""

    name = ""

    def __init__(self, *, tls: bool) -> None:
        self.tls = tls
        self.port = 0
        self._folder = tempfile.TemporaryDirectory(prefix="xkiproxy-bench-")
        self.directory = Path(self._folder.name)
        self._process: subprocess.Popen[str] | None = None
        self._environment: dict[str, str] = {}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def workload(
        self, protocol: ProtocolName = "xki", call: Call = "encrypt", size: int = 32
    ) -> Workload:
        """Requests that this server can answer; `size` is that of a plaintext, in bytes."""
        raise NotImplementedError

    def _start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that does not help; the directory goes too."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._folder.cleanup()

    def _launch(self, arguments: Sequence[str], stdout: int | IO[str]) -> subprocess.Popen[str]:
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdout=stdout, stderr=log, text=True, env=self._full_environment(),
            )  # fmt: skip
        return self._process

    def _full_environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        return {**os.environ, "PYTHONPATH": path, **self._environment}

    @property
    def log(self) -> Path:
        """What the server says."""
        return self.directory / "server.log"

    @property
    def pid(self) -> int:
        """The process that was started."""
        assert self._process is not None
        return self._process.pid

    @property
    def certificate(self) -> Path | None:
        """What a client must trust; None without TLS."""
        return self._certificate_file if self.tls else None

    @property
    def _certificate_file(self) -> Path:
        return self.directory / "tls" / "server.crt"

    @property
    def url(self) -> str:
        """Such as https://127.0.0.1:41234."""
        return f"{'https' if self.tls else 'http'}://{_HOST}:{self.port}"

    @property
    def target(self) -> Target:
        """For the load generator."""
        return Target(_HOST, self.port, str(self.certificate) if self.certificate else None)

    def pids(self) -> dict[str, int]:
        """The process ID of each process: "server", and its children ("lane 0", ...)."""
        found = {"server": self.pid}
        for pid in _descendants(self.pid):
            match = _TITLE.match(_title(pid))
            found[match[1] if match else f"child {pid}"] = pid
        return found

    def cpu_seconds(self) -> dict[str, float]:
        """Time on the CPU so far, in user and kernel mode, of each process; to 10 ms."""
        times = {name: _stat(pid) for name, pid in self.pids().items()}
        return {name: (int(s[11]) + int(s[12])) / _TICKS for name, s in times.items() if s}

    def rss_bytes(self) -> dict[str, int]:
        """The resident memory of each process, pages that several share counted in each."""
        sizes = {name: _stat(pid) for name, pid in self.pids().items()}
        return {name: int(s[21]) * _PAGE for name, s in sizes.items() if s}


class BareServer(ChildServer):
    """HTTP and nothing else: see `benchmarks.bare`. `size` is that of a plaintext, in bytes."""

    name = "bare"

    def __init__(self, *, tls: bool = False, size: int = 32) -> None:
        super().__init__(tls=tls)
        self._size = size

    def workload(
        self, protocol: ProtocolName = "xki", call: Call = "encrypt", size: int = 32
    ) -> Workload:
        """One plaintext only, for the answer is always the same; any credential will do."""
        if size != self._size:
            raise ValueError("the bare server was started for plaintexts of another size")
        return Workload(
            protocol, "/demo", KEY_ID, "BETWEENABCDEFGHIJKLM", "a-secret-of-the-benchmark",
            f"{_HOST}:{self.port}", call, self._size, plaintexts=1,
        )  # fmt: skip

    def _start(self) -> None:
        arguments = ["benchmarks.bare", "--size", str(self._size)]
        if self.tls:
            (self.directory / "tls").mkdir()
            key = self.directory / "tls" / "server.key"
            certificate, private_key = self_signed([_HOST], CertificateKey.EC, datetime.now(UTC))
            self._certificate_file.write_text(certificate)
            write_secret_file(key, private_key)
            arguments += ["--certificate", str(self._certificate_file), "--private-key", str(key)]
        process = self._launch(arguments, subprocess.PIPE)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise LoadError(f"the bare server does not start: {self.log.read_text()}")
        self.port = int(line)


class ProxyServer(ChildServer):
    """`xkiproxy serve` in a directory made by `xkiproxy init`, with a key store per protocol.

    Both key stores, `/demo` (XKI) and `/demo-xks` (XKS), use one key of one KMI: `software`, or
    `pkcs11`, which is SoftHSM behind so many `lanes`. `changes` are merged into the configuration,
    such as {"server": {"idle_timeout_seconds": 5}}. `guarded`: with policies, quotas, source
    networks and an HMAC of audit logs, which all let the load pass.
    """

    name = "proxy"

    def __init__(
        self,
        *,
        kmi: Literal["software", "pkcs11"] = "software",
        tls: bool = True,
        workers: int = 1,
        lanes: int = 2,
        guarded: bool = False,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(tls=tls)
        self._kmi = kmi
        self._workers = workers
        self._lanes = lanes
        self._guarded = guarded
        self._changes = changes or {}
        self.credentials: dict[str, Credential] = {}

    @property
    def site(self) -> Path:
        """The directory that `xkiproxy init` has made."""
        return self.directory / "site"

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.site / "xkiproxy.toml"

    @property
    def _certificate_file(self) -> Path:
        return self.site / "tls" / "server.crt"

    def credentials_file(self, protocol: ProtocolName) -> Path:
        """The credentials of a protocol's key store, for `--credentials`."""
        return self.site / "credentials" / f"{self.prefix(protocol)[1:]}.toml"

    def prefix(self, protocol: ProtocolName) -> str:
        """Where the key store of a protocol is mounted."""
        return "/demo" if protocol == "xki" else "/demo-xks"

    def workload(
        self, protocol: ProtocolName = "xki", call: Call = "encrypt", size: int = 32
    ) -> Workload:
        """Requests to the key store of a protocol; `size` is that of a plaintext, in bytes."""
        credential = self.credentials[protocol]
        return Workload(
            protocol, self.prefix(protocol), KEY_ID, credential.access_key_id,
            credential.access_key_secret, f"{_HOST}:{self.port}", call, size,
        )  # fmt: skip

    def _start(self) -> None:
        self._init()
        self._configure()
        self._launch(["xkiproxy", "serve", "--config", str(self.config)], subprocess.DEVNULL)
        self._wait_until_ready()

    def _init(self) -> None:
        arguments = ["xkiproxy", "init", str(self.site), "--host", _HOST, "--key", KEY_ID]
        if self._kmi == "pkcs11":
            arguments += self._make_token()
        self._run([sys.executable, "-m", *arguments])

    def _make_token(self) -> list[str]:
        module = next((path for path in _MODULES if Path(path).exists()), None)
        if module is None:
            raise LoadError("SoftHSM is not installed: apt-get install softhsm2")
        tokens = self.directory / "tokens"
        tokens.mkdir()
        conf = self.directory / "softhsm2.conf"
        conf.write_text(f"directories.tokendir = {tokens}\nlog.level = ERROR\n")
        self._environment["SOFTHSM2_CONF"] = str(conf)
        self._run(
            ["softhsm2-util", "--init-token", "--free", "--label", "bench",
             "--so-pin", _PIN, "--pin", _PIN]
        )  # fmt: skip
        pin = self.directory / "pin"
        write_secret_file(pin, _PIN)
        return ["--kmi", "pkcs11", "--module", module, "--token", "bench", "--pin-file", str(pin)]

    def _run(self, command: Sequence[str]) -> None:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=self._full_environment()
        )
        if done.returncode != 0:
            raise LoadError(f"{' '.join(command[:4])} ...: {done.stdout}{done.stderr}")

    def _configure(self) -> None:
        """Change what `init` wrote.

        No limit is raised: the queue of a KMI (1024) is longer than the connections of any load
        here, and the replay window (four million nonces of 15 minutes) than its requests. The
        deadline stays at the 250 ms that KMS waits: an answer that is later is worth nothing.
        """
        self.port, admin_port = _free_ports(2)
        self._admin = f"{_HOST}:{admin_port}"
        settings = tomllib.loads(self.config.read_text())
        server = settings["server"]
        server["listen"] = f"{_HOST}:{self.port}"
        server["admin_listen"] = self._admin
        server["workers"] = self._workers
        if not self.tls:
            del server["tls"]
            server["plaintext"] = True
        if self._kmi == "pkcs11":
            settings["kmi"][0]["lanes"] = self._lanes
        first = settings["keystore"][0]
        file = self.credentials_file("xks")
        write_secret_file(file, format_credentials([_xks_credential()]))
        second = {
            "name": "demo-xks",
            "protocol": "xks",
            "path_prefix": self.prefix("xks"),
            "credentials": f"credentials/{file.name}",
        }
        settings["keystore"].append({**first, **second})
        if self._guarded:
            self._guard(settings)
        for section, values in self._changes.items():
            settings.setdefault(section, {}).update(values)
        self.config.write_text(tomli_w.dumps(settings))
        for protocol in ("xki", "xks"):
            path = self.credentials_file(protocol)
            self.credentials[protocol] = parse_credentials(path.read_text(), str(path))[0]

    def _guard(self, settings: dict[str, Any]) -> None:
        policies = self.site / "policies"
        policies.mkdir()
        (policies / "all.cedar").write_text(_POLICIES)
        write_secret_file(self.site / "audit.key", secrets.token_hex(32))
        settings["audit"] = {"hmac_key": "audit.key"}
        for store in settings["keystore"]:
            store["policies"] = policies.name
            store["source_networks"] = ["127.0.0.0/8", "::1/128"]
            store["quota"] = {
                what: {"rate": 100_000, "burst": 100_000} for what in ("all", "key", "principal")
            }

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"http://{self._admin}/readyz", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        raise LoadError(f"the proxy does not become ready: {self.log.read_text()}")


def _xks_credential() -> Credential:
    """20 of A-Z 2-7, and 44 of Base64: the forms that AWS demands."""
    access_key_id = base64.b32encode(os.urandom(13)).decode("ascii")[:20]
    secret = base64.b64encode(os.urandom(33)).decode("ascii")
    return Credential(access_key_id, secret, "2026-01-01T00:00:00Z")


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind((_HOST, 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on (proc(5)); none if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0 ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _descendants(root: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))):
            parents[int(entry.name)] = int(stat[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]
