"""The Debian package: built, looked into; on a clean Debian 12 installed, started, removed.

One test, since each step stands on the one before, and building takes half of its time.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from container import Container, ContainerUnavailable, begin_root, remove_root, unavailable

from xkiproxy import __version__

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "systemd" / "xkiproxy.service"
VENV = Path("usr/lib/xkiproxy")
CONFIG = "/etc/xkiproxy/xkiproxy.toml"
NEXT = "0.1.0+next"
BASE = ["systemd-sysv", "dbus", "python3.11", "softhsm2"]
HSM = """
[[kmi]]
name = "hsm"
type = "pkcs11"
module = "/usr/lib/softhsm/libsofthsm2.so"
token = "production"
pin = { credential = "hsm-pin" }
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder outside of pytest's own, which is searched for secrets in the end."""
    made = Path(tempfile.mkdtemp(prefix="xkiproxy-deb-test-", dir="/var/tmp"))
    yield made
    remove_root(made)


@pytest.mark.timeout(900)
def test_package_from_build_to_purge(place: Path) -> None:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    bootstrap = begin_root(place / "root", BASE)
    try:
        package = build(place)
    finally:
        _, errors = bootstrap.communicate(timeout=600)
    assert bootstrap.returncode == 0, errors.decode()
    check_control(package)
    check_content(package, place)
    check_lintian(package)

    shutil.copy(package, place / "root" / "xkiproxy.deb")
    upgrade = other_version(package, place)
    shutil.copy(upgrade, place / "root" / "next.deb")
    try:  # nothing of ours is in it yet: where it does not start, that is the machine's doing
        container = Container(place / "root", place / "log")
    except ContainerUnavailable as error:
        pytest.skip(f"built and looked into, but not installed: {error}")
    try:
        before = named_after_us(container.root)
        check_install(container)
        encrypted = check_first_configuration(container)
        check_credential(container, encrypted)
        check_hsm(container)
        check_upgrade(container, encrypted)
        check_removal(container)
        check_purge(container, before)
    finally:
        container.close()


def build(place: Path) -> Path:
    """Build it with a temporary folder whose name must not be found inside."""
    (place / "built-here").mkdir()
    done = subprocess.run(
        [ROOT / "deploy" / "debian" / "build", place / "dist"],
        env={
            **os.environ,
            "TMPDIR": str(place / "built-here"),
            # As `make test TREE=...` would leave it: not for the makefile of the package.
            "MAKEFLAGS": f" -- TREE={place}/anothers",
        },
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (package,) = (place / "dist").iterdir()
    assert re.fullmatch(r"xkiproxy_[^_]+_(amd64|arm64)\.deb", package.name)
    assert package.name.split("_")[1] == __version__
    assert not list((place / "built-here").iterdir())
    assert not (place / "anothers").exists()
    return package


def check_control(package: Path) -> None:
    shown = subprocess.run(
        ["dpkg-deb", "--field", package], capture_output=True, text=True, check=True
    ).stdout
    fields = dict(line.split(": ", 1) for line in shown.splitlines() if not line.startswith(" "))
    assert fields["Package"] == "xkiproxy"
    assert fields["Version"] == __version__
    assert fields["Suggests"] == "softhsm2, opensc"
    depends = fields["Depends"].split(", ")
    assert "python3.11" in depends
    assert any(re.fullmatch(r"libc6 \(>= 2\.\d+\)", one) for one in depends)
    assert any("systemd" in one for one in depends)


def check_content(package: Path, place: Path) -> None:
    unpacked = place / "unpacked"
    members = {}
    data = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = {member.name.removeprefix("./"): member for member in archive}
        archive.extractall(unpacked)
    for name, member in members.items():
        assert (member.uid, member.gid) == (0, 0), name
        assert member.issym() or not member.mode & (stat.S_IWGRP | stat.S_IWOTH), name
        assert not member.mode & (stat.S_ISUID | stat.S_ISGID), name
    assert stat.S_IMODE(members["etc/xkiproxy/credentials"].mode) == 0o700
    assert not [name for name in members if name.startswith("etc/") and members[name].isfile()]

    assert (unpacked / "lib/systemd/system/xkiproxy.service").read_bytes() == UNIT.read_bytes()
    documents = unpacked / "usr/share/doc/xkiproxy"
    notice = (documents / "copyright").read_text()
    assert "Apache License" in notice
    for bundled in ("cryptography", "aiohttp", "uvloop", "python-pkcs11"):
        assert re.search(rf"^{bundled} \d.*\n  licence: \S", notice, re.MULTILINE), bundled
    for file in ("CHANGELOG.md", "changelog.gz", "deploy-debian.md", "runbook.md"):
        assert (documents / file).stat().st_size > 0, file
    for kind in ("dashboards", "rules"):
        made = {path.name for path in (ROOT / "grafana" / kind).iterdir() if path.is_file()}
        shipped = {path.name for path in (unpacked / "usr/share/xkiproxy/grafana" / kind).iterdir()}
        assert shipped == made

    names = "\n".join(members)
    for unwanted in (
        "/pip/",
        "/setuptools/",
        "direct_url.json",
        "/RECORD",
        "activate",
        "/benchmarks/",
    ):
        assert unwanted not in names, unwanted
    telling = [b"built-here", str(ROOT).encode(), *registry_hosts()]
    for path in unpacked.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            assert not [one for one in telling if one in content], path


def registry_hosts() -> list[bytes]:
    """The hosts that pip is set to fetch from, where that is not the public one."""
    shown = subprocess.run(
        ["/usr/bin/python3", "-m", "pip", "config", "list"],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    shown += "\n".join(value for name, value in os.environ.items() if name.startswith("PIP_"))
    hosts = set(re.findall(r"https?://(?:[^/@\s]*@)?([^/:\s']+)", shown))
    return [host.encode() for host in hosts - {"pypi.org", "localhost"}]


def check_lintian(package: Path) -> None:
    done = subprocess.run(
        ["lintian", "--fail-on", "error,warning", "--allow-root", package],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def other_version(package: Path, place: Path) -> Path:
    """The same package under a later version, for an upgrade."""
    tree, upgrade = place / "tree", place / "next.deb"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN" / "control"
    text, changed = re.subn(r"^Version: .*$", f"Version: {NEXT}", control.read_text(), flags=re.M)
    assert changed == 1
    control.write_text(text)
    init = tree / VENV / "lib/python3.11/site-packages/xkiproxy/__init__.py"
    assert __version__ in init.read_text()
    subprocess.run(
        ["dpkg-deb", "-Znone", "--build", tree, upgrade], check=True, capture_output=True
    )
    return upgrade


def named_after_us(root: Path) -> set[str]:
    """What is on a disk that has our name, but for what is inside of it."""
    found = set()
    for directory, folders, files in os.walk(root):
        inside = Path(directory).relative_to(root)
        if inside.parts[:1] in {("proc",), ("sys",), ("dev",), ("run",), ("tmp",)}:
            continue
        ours = [name for name in folders if "xkiproxy" in name]
        found |= {f"/{inside / name}" for name in [*ours, *files] if "xkiproxy" in name}
        folders[:] = [name for name in folders if name not in ours]
    return found


def check_install(container: Container) -> None:
    """It is there, it is not started, and what comes next is said."""
    installed = apt(container, "install", "/xkiproxy.deb")
    assert (container.root / "usr/share/xkiproxy/first-steps").read_text() in installed
    assert state(container) == "inactive"
    assert container.run("systemctl", "is-enabled", "xkiproxy", check=False).stdout == "disabled\n"
    assert "xkiproxy:/var/lib/xkiproxy:/usr/sbin/nologin" in re.sub(
        r":[x!*]:\d+:\d+:[^:]*", "", container.run("getent", "passwd", "xkiproxy").stdout
    )
    for folder in ("/var/lib/xkiproxy", "/var/log/xkiproxy"):
        shown = container.run("stat", "--format=%U:%G %a", folder).stdout
        assert shown == "xkiproxy:xkiproxy 700\n"
    shown = container.run("stat", "--format=%U:%G %a", "/etc/xkiproxy").stdout
    assert shown == "root:root 755\n"
    version = container.run("xkiproxy", "--version").stdout
    assert version == f"xkiproxy {__version__}\n"
    assert container.run("systemctl", "start", "xkiproxy", check=False).returncode != 0
    container.run("systemctl", "stop", "xkiproxy")
    container.run("systemctl", "reset-failed", "xkiproxy", check=False)


def apt(container: Container, *arguments: str) -> str:
    """It reaches no mirror: what the package depends on must be there. Returns all it said."""
    done = container.run("apt-get", "-y", "-q", *arguments)
    return done.stdout + done.stderr


def state(container: Container) -> str:
    return container.run("systemctl", "is-active", "xkiproxy", check=False).stdout.strip()


def main_pid(container: Container) -> int:
    return int(container.run("systemctl", "show", "-p", "MainPID", "--value", "xkiproxy").stdout)


def journal(container: Container) -> str:
    return container.run("journalctl", "--no-pager", "-u", "xkiproxy", check=False).stdout


def first_steps(container: Container) -> list[list[str]]:
    """The commands that the package tells its installer to run."""
    text = (container.root / "usr/share/xkiproxy/first-steps").read_text()
    lines = [line.strip() for line in text.splitlines() if line.startswith("  ")]
    return [line.replace("NAME", "localhost").split() for line in lines]


def check_first_configuration(container: Container) -> str:
    """The commands as they are printed lead to a running service; returns what it encrypted."""
    steps = first_steps(container)
    assert [step[0] for step in steps] == ["xkiproxy", "chown", "systemctl"]
    for step in steps:
        done = container.run(*step, check=False)
        assert done.returncode == 0, done.stdout + done.stderr + journal(container)
    assert state(container) == "active"
    pid = main_pid(container)
    status = container.run("cat", f"/proc/{pid}/status").stdout
    user = int(container.run("id", "-u", "xkiproxy").stdout)
    assert re.search(rf"^Uid:\t{user}\t{user}\t{user}\t{user}$", status, re.MULTILINE)
    assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\t2$", status, re.MULTILINE)
    assert container.run("readlink", f"/proc/{pid}/exe").stdout == "/usr/bin/python3.11\n"

    as_user(container, "check")
    as_user(container, "keys", "create", "second-key")
    as_user(container, "credentials", "add")
    container.run("systemctl", "reload", "xkiproxy")
    assert main_pid(container) == pid
    answer = container.run(
        "/usr/lib/xkiproxy/bin/python3", "-c",
        "import ssl, sys, urllib.error, urllib.request as r\n"
        "context = ssl.create_default_context(cafile='/var/lib/xkiproxy/tls/server.crt')\n"
        "try:\n    r.urlopen('https://localhost:8443/', context=context)\n"
        "except urllib.error.HTTPError as error:\n    print(error.code)\n",
    )  # fmt: skip
    assert answer.stdout == "404\n"
    return encrypt(container)


def encrypt(container: Container) -> str:
    """What a signed request over TLS brings back from the running service."""
    return as_user(container, "call", "encrypt", "demo-key", "--plaintext", "hello", "--json")


def decrypts(container: Container, encrypted: str) -> None:
    assert "hello" in as_user(container, "call", "decrypt", "demo-key", given=encrypted)


def as_user(container: Container, *arguments: str, given: str = "") -> str:
    """A command as docs/deploy-debian.md says to run it; returns its output."""
    command = ["runuser", "-u", "xkiproxy", "--", "xkiproxy", *arguments, "--config", CONFIG]
    done = container.run(*command, given=given, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + journal(container)
    return done.stdout


def check_credential(container: Container, encrypted: str) -> None:
    """The master key handed over by systemd, as docs/deploy-debian.md says."""
    config = container.root / CONFIG[1:]
    container.run(
        "install", "-m", "0600", "/var/lib/xkiproxy/master.key",
        "/etc/xkiproxy/credentials/master-key",
    )  # fmt: skip
    container.run("rm", "/var/lib/xkiproxy/master.key")
    text, changed = re.subn(
        r'master_key = "[^"]*"', 'master_key = { credential = "master-key" }', config.read_text()
    )
    assert changed == 1
    config.write_text(text)
    container.run("systemctl", "restart", "xkiproxy")
    decrypts(container, encrypted)
    listed = with_credential(container, "master-key", "keys", "list", "--json")
    assert [key["id"] for key in json.loads(listed)] == ["demo-key", "second-key"]


def with_credential(container: Container, name: str, *arguments: str) -> str:
    """A command that needs a secret which the unit hands over; returns its output."""
    return container.run(
        "systemd-run", "--quiet", "--wait", "--pipe", "--uid=xkiproxy",
        f"--property=LoadCredential={name}:/etc/xkiproxy/credentials/{name}",
        "xkiproxy", *arguments, "--config", CONFIG,
    ).stdout  # fmt: skip


def check_hsm(container: Container) -> None:
    """A token that a group may use: its lanes work under the unit as it stands."""
    container.run("adduser", "xkiproxy", "softhsm")
    drop_in = container.root / "etc/systemd/system/xkiproxy.service.d/hsm.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nReadWritePaths=/var/lib/softhsm/tokens\n")
    container.run(
        "runuser", "-u", "xkiproxy", "--", "softhsm2-util", "--init-token", "--free",
        "--label=production", "--pin=123456", "--so-pin=12345678",
    )  # fmt: skip
    container.run(
        "install", "-m", "0600", "/dev/stdin", "/etc/xkiproxy/credentials/hsm-pin", given="123456\n"
    )
    config = container.root / CONFIG[1:]
    text, changed = re.subn(r'kmi = \["local"\]', 'kmi = ["local", "hsm"]', config.read_text())
    assert changed == 1
    config.write_text(text.replace("\n[[keystore]]", f"{HSM}\n[[keystore]]"))
    with_credential(container, "hsm-pin", "keys", "create", "hsm-key", "--kmi", "hsm")
    container.run("systemctl", "daemon-reload")
    container.run("systemctl", "restart", "xkiproxy")
    encrypted = as_user(container, "call", "encrypt", "hsm-key", "--plaintext", "hi", "--json")
    assert "hi" in as_user(container, "call", "decrypt", "hsm-key", given=encrypted)
    pid = main_pid(container)
    lanes = container.run("cat", f"/proc/{pid}/task/{pid}/children").stdout.split()
    assert len(lanes) >= 2


def check_upgrade(container: Container, encrypted: str) -> None:
    """Configuration and keys stay; a running service is restarted, a stopped one is not started."""
    config = (container.root / CONFIG[1:]).read_bytes()
    before = main_pid(container)
    said = apt(container, "install", "/next.deb")
    assert "not configured" not in said
    assert (container.root / CONFIG[1:]).read_bytes() == config
    assert state(container) == "active"
    assert main_pid(container) not in {0, before}
    assert container.run("systemctl", "is-enabled", "xkiproxy").stdout == "enabled\n"
    decrypts(container, encrypted)
    container.run("systemctl", "stop", "xkiproxy")
    apt(container, "install", "--allow-downgrades", "/xkiproxy.deb")
    assert state(container) == "inactive"
    container.run("systemctl", "start", "xkiproxy")
    decrypts(container, encrypted)


def check_removal(container: Container) -> None:
    """Removed, it runs no more; what is not the package's stays."""
    pid = main_pid(container)
    apt(container, "remove", "xkiproxy")
    assert state(container) == "inactive"
    assert container.run("test", "-e", f"/proc/{pid}", check=False).returncode == 1
    for gone in ("usr/bin/xkiproxy", VENV, "lib/systemd/system/xkiproxy.service"):
        assert not os.path.lexists(container.root / gone), gone
    for kept in (CONFIG, "/var/lib/xkiproxy/keyring.db", "/etc/xkiproxy/credentials/master-key"):
        assert (container.root / kept[1:]).stat().st_size > 0, kept


def check_purge(container: Container, before: set[str]) -> None:
    """The configuration goes; keys, credentials and the audit log stay, and that is said."""
    state_folder = container.root / "var/lib/xkiproxy"
    kept = {path: path.read_bytes() for path in state_folder.rglob("*") if path.is_file()}
    assert {path.name for path in kept} >= {"keyring.db", "catalog.db", "audit.jsonl", "demo.toml"}
    done = apt(container, "purge", "xkiproxy")
    assert not (container.root / CONFIG[1:]).exists()
    assert {path: path.read_bytes() for path in state_folder.rglob("*") if path.is_file()} == kept
    assert (container.root / "etc/xkiproxy/credentials/master-key").stat().st_size > 0
    said = re.findall(r"kept (\S+),", done)
    assert said == ["/etc/xkiproxy/credentials", "/etc/xkiproxy", "/var/lib/xkiproxy"]
    assert named_after_us(container.root) - before == {
        "/etc/systemd/system/xkiproxy.service.d",  # ours, not the package's
        "/etc/xkiproxy",
        "/var/lib/xkiproxy",
    }
    assert "xkiproxy" not in container.run("dpkg", "--list").stdout
