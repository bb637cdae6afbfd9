"""The image: built by buildah as its Dockerfile says, and run: a token, a server, a request.

What cannot be had here is the base image from its registry: mmdebstrap makes one with the same
Debian and Python. Containers share this machine's kernel and network, with a root, users and
capabilities of their own (buildah's isolation "chroot").
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from container import begin_root, remove_root, unavailable
from ports import free_ports
from test_containers import COMPOSE, DOCKERFILE, ROOT, health_check

BASE = ["python3", "python3-venv", "ca-certificates", "passwd"]

SERVE = """
set -eu
sh /setup.sh >/dev/null
sed -i 's/0\\.0\\.0\\.0:8443/127.0.0.1:{port}/' "$XKIPROXY_CONFIG"
sed -i 's/0\\.0\\.0\\.0:9464/127.0.0.1:{admin}/' "$XKIPROXY_CONFIG"
xkiproxy serve &
server=$!
for _ in $(seq 100); do
    if python3 -c "$HEALTH" 2>/dev/null; then break; fi
    sleep 0.2
done
xkiproxy check
xkiproxy call encrypt demo-key --plaintext hello --json | xkiproxy call decrypt demo-key
grep -E '^(Uid|CapEff):' /proc/$server/status
! touch /anywhere 2>/dev/null || echo "the root can be written"
kill -TERM $server
wait $server && echo "ended with 0"
! python3 -c "$HEALTH" 2>/dev/null || echo "healthy though it ended"
"""


class Buildah:
    """buildah with a store of its own in a folder."""

    def __init__(self, folder: Path) -> None:
        policy = folder / "policy.json"
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self._command = ["buildah", "--root", folder / "store", "--runroot", folder / "run"]
        self._policy = policy
        self._environment = {
            **os.environ, "STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot",
            "TMPDIR": str(folder),
        }  # fmt: skip

    def __call__(self, *arguments: str | Path, check: bool = True) -> str:
        done = subprocess.run(
            [*self._command, *arguments],
            env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False, timeout=400,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout.strip()

    def build(self, file: Path, context: Path, tag: str, *options: str) -> None:
        policy = f"--signature-policy={self._policy}"
        self("bud", policy, "--network=host", *options, f"--file={file}", f"--tag={tag}", context)

    def runs(self, image: str) -> bool:
        """Whether this machine lets it run anything."""
        name = self.start(image)
        return self("run", name, "--", "echo", "it runs", check=False) == "it runs"

    def start(self, image: str) -> str:
        """A container of an image, by its name."""
        return self("from", f"--signature-policy={self._policy}", "--pull-never", image)


@pytest.fixture
def place() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="xkiproxy-image-test-", dir="/var/tmp"))
    yield made
    remove_root(made)


def as_here(place: Path) -> list[str]:
    """Options with which pip finds its packages within a build as it does here."""
    listed = subprocess.run(
        ["/usr/bin/python3", "-m", "pip", "config", "list"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    found: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        name, value = line.split("=", 1)
        found[name.rpartition(".")[2]] = value.strip("'")  # the environment wins, and comes last
    volumes = [
        f"--volume={value}:{value}:ro"
        for value in found.values()
        if value.startswith("/") and Path(value).exists()
    ]
    lines = [f"{name} = {value}" for name, value in found.items()]
    (place / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    return [f"--volume={place}/pip.conf:/etc/pip.conf:ro", *volumes]


@pytest.mark.timeout(600)
def test_image_from_build_to_stop(place: Path) -> None:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    bootstrap = begin_root(place / "base", BASE)
    _, errors = bootstrap.communicate(timeout=300)
    assert bootstrap.returncode == 0, errors.decode()
    buildah = Buildah(place)
    (place / "Base").write_text("FROM scratch\nADD base /\n")
    buildah.build(place / "Base", place, "localhost/base:1")
    shutil.rmtree(place / "base")
    if not buildah.runs("localhost/base:1"):
        pytest.skip("this machine lets buildah run nothing")
    options = [*as_here(place), "--build-arg=PYTHON=localhost/base:1"]
    buildah.build(DOCKERFILE, ROOT, "localhost/xkiproxy:1", "--target=softhsm", *options)

    container = buildah.start("localhost/xkiproxy:1")
    assert buildah("run", container, "--", "id", "-u") == "10001"
    assert buildah("run", container, "--", "sh", "-c", "command -v gcc pip || echo none") == "none"
    assert "opentelemetry.sdk" in buildah(
        "run", container, "--", "python3", "-c",
        "import opentelemetry.sdk; print(opentelemetry.sdk.__name__)",
    )  # fmt: skip

    buildah("copy", container, COMPOSE / "setup.sh", "/setup.sh")
    buildah("copy", container, COMPOSE / "softhsm2.conf", "/etc/softhsm2.conf")
    port, admin = free_ports(2)
    said = buildah(
        "run",
        "--env=SOFTHSM2_CONF=/etc/softhsm2.conf",
        "--env=XKIPROXY_CONFIG=/var/lib/xkiproxy/conf/xkiproxy.toml",
        f"--env=HEALTH={health_check()[-1].replace(':9464', f':{admin}')}",
        container, "--", "sh", "-c", SERVE.format(port=port, admin=admin),
    )  # fmt: skip
    assert "no problems" in said
    assert "hello" in said
    assert "Uid:\t10001\t10001\t10001\t10001" in said
    assert "CapEff:\t0000000000000000" in said
    assert said.endswith("ended with 0")
    assert "the root can be written" not in said
