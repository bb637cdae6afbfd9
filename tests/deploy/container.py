"""A small Debian of its own, started by its systemd: what a package is installed into in a test.

mmdebstrap makes its files from the mirror that this machine's apt is set to; systemd-nspawn starts
it with namespaces of its own, so nothing outside of its folder and its cgroup is touched, and it
reaches no network. Both need root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_BOOT_SECONDS = 60
_CGROUPS = Path("/sys/fs/cgroup")
_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}


def unavailable() -> str | None:
    """Why there can be no such thing here, or None."""
    if os.geteuid() != 0:
        return "a container with a systemd of its own needs root"
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if line
    )
    if (release.get("ID"), release.get("VERSION_CODENAME")) != ("debian", "bookworm"):
        return "the package is for Debian 12, and is built on it"
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        return "this machine lets no one make namespaces"
    return None


def begin_root(root: Path, packages: Sequence[str]) -> subprocess.Popen[bytes]:
    """Begin to make a minimal Debian 12 with these packages in a folder that is not there yet."""
    return subprocess.Popen(
        [
            "mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}",
            "bookworm", str(root), _mirror(),
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def _mirror() -> str:
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    for line in listed.splitlines():
        if line.startswith("bookworm main "):
            return line.split()[2]
    raise LookupError("apt knows no mirror of Debian 12 (bookworm main)")


class ContainerUnavailable(Exception):
    """This machine does not let one start; says why."""


class Container:
    """A running one; `close` ends it. Raises ContainerUnavailable where none can be started."""

    def __init__(self, root: Path, log: Path) -> None:
        self.root = root
        (root / "etc" / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        self._log = log
        self._cgroups: list[Path] = []
        name = f"xkiproxy-test-{os.getpid()}"
        command = [
            "systemd-nspawn",
            "--quiet",
            "--boot",
            f"--directory={root}",
            f"--machine={name}",
        ]
        command += ["--private-network", "--console=pipe", "--settings=no", "--resolv-conf=off"]
        if not Path("/run/systemd/system").exists():  # nobody here to give it a cgroup
            command += ["--register=no", "--keep-unit"]
            self._cgroups = _make_cgroups(name)
        enter = "".join(f"echo $$ > {group}/cgroup.procs; " for group in self._cgroups)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["sh", "-c", f'{enter}exec "$@"', "sh", *command],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        try:
            self._leader = self._await_boot()
        except BaseException:
            self.close()
            raise

    def run(
        self, *command: str, given: str = "", check: bool = True, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as root; raises AssertionError with what it said if it fails."""
        done = subprocess.run(
            ["nsenter", f"--target={self._leader}", "-m", "-u", "-i", "-n", "-p", *command],
            env=_ENVIRONMENT,
            input=given, capture_output=True, text=True, check=False, timeout=timeout,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done

    def close(self) -> None:
        """Take it down: it has nothing worth an orderly end."""
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=30)
        for group in self._cgroups:
            _remove_cgroup(group)

    def _await_boot(self) -> int:
        end = time.monotonic() + _BOOT_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            listed = Path(
                f"/proc/{self._process.pid}/task/{self._process.pid}/children"
            ).read_text()
            if listed:
                self._leader = int(listed.split()[0])
                state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
                if state in {"running", "degraded"}:
                    return self._leader
            time.sleep(0.2)
        raise ContainerUnavailable(f"no systemd came up:\n{self._log.read_text(errors='replace')}")


def _make_cgroups(name: str) -> list[Path]:
    """A group below ours in systemd's hierarchies: its v1 one, v2 beside that, or v2 alone."""
    made = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if controllers == "name=systemd":
            base = _CGROUPS / "systemd"
        elif number == "0":
            base = _CGROUPS / "unified" if (_CGROUPS / "unified").is_dir() else _CGROUPS
        else:
            continue
        group = base / path.lstrip("/") / name
        try:
            group.mkdir()
        except OSError as error:
            raise ContainerUnavailable(f"no cgroup can be made: {error}") from None
        made.append(group)
    return made


def _remove_cgroup(group: Path) -> None:
    for directory, _, _ in os.walk(group, topdown=False):
        for _ in range(100):
            try:
                Path(directory).rmdir()
                break
            except OSError:  # its processes are about to be gone
                time.sleep(0.1)
        else:
            print(f"{directory} could not be removed", file=sys.stderr)


def remove_root(root: Path) -> None:
    """Delete the files of one that has ended."""
    shutil.rmtree(root, ignore_errors=True)
