"""What the pages in docs/ print and name is there: configurations load, tests and files exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from ports import free_ports

from xkiproxy.config import load_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *sorted((DOCS / "kmis").glob("*.md")),
    DOCS / "deploy-public-endpoint.md",
    DOCS / "deploy-privatelink.md",
]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```toml\n(.*?)```", page.read_text("utf-8"), re.S))
]

_TLS = '[server.tls]\ncertificate = "server.crt"\nprivate_key = "server.key"\n'
_KMI = '[[kmi]]\nname = "local"\ntype = "software"\nkeyring = "keyring.db"\n'
_KEYSTORE = """
[[keystore]]
name = "demo"
protocol = "xks"
path_prefix = "/demo"
kmi = ["{kmi}"]
credentials = "demo.toml"
"""


@pytest.mark.parametrize("block", BLOCKS)
def test_a_configuration_that_is_printed_loads(block: str, tmp_path: Path) -> None:
    printed = tomllib.loads(block)
    server, kmis = printed.get("server", {}), printed.get("kmi", [{"name": "local"}])
    parts = [
        "" if "listen" in server else "[server]\n",
        block,
        "" if "tls" in server else _TLS,
        "" if "kmi" in printed else _KMI,
        "" if "keystore" in printed else _KEYSTORE.format(kmi=kmis[0]["name"]),
    ]
    file = tmp_path / "xkiproxy.toml"
    file.write_text("\n".join(parts), encoding="utf-8")
    assert [kmi.name for kmi in load_config(file).kmi] == [kmi["name"] for kmi in kmis]


def test_the_use_in_the_readme_runs_as_it_is_printed(tmp_path: Path) -> None:
    """Line by line, on other ports: the machine may have a proxy already."""
    text = (ROOT / "README.md").read_text("utf-8")
    block = text.partition("## Use\n\n```sh\n")[2].partition("```")[0]
    lines = [line for line in block.splitlines() if line]
    assert lines[0].startswith("xkiproxy init")
    public, admin = free_ports(2)
    ports = f"sed -i 's/0.0.0.0:8443/127.0.0.1:{public}/; s/:9464/:{admin}/' proxy/xkiproxy.toml"
    ready = f"until curl -sf http://127.0.0.1:{admin}/readyz; do sleep 0.1; done"
    steps = [lines[0], ports]
    for line in lines[1:]:
        steps += [line, ready] if line == "xkiproxy serve &" else [line]
    assert ready in steps
    script = "\n".join(["set -ex", "trap 'kill $!' EXIT", *steps])
    environment = {name: os.environ[name] for name in ("HOME",)}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**environment, "PATH": path},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^state +PENDING_DELETION$", done.stdout, re.M)


def test_a_copy_is_made_and_put_back_as_it_is_printed(tmp_path: Path) -> None:
    """With the paths of this test, and as the user that runs it."""
    text = (DOCS / "restore.md").read_text("utf-8")
    blocks = [textwrap.dedent(block) for block in re.findall(r"```sh\n(.*?)```", text, re.S)]
    copy, put_back = blocks[0], next(block for block in blocks if "catalog.db-wal" in block)
    steps = [
        "umask 022",
        "xkiproxy init /var/lib/xkiproxy",
        copy,
        "xkiproxy keys disable demo-key",
        "echo left over > /var/lib/xkiproxy/catalog.db-wal",
        put_back,
        "xkiproxy check && xkiproxy keys list",
        "stat -c '%a %n' /var/backups/xkiproxy/*.db",
    ]
    script = "\n".join(["set -ex", *steps]).replace("/var/", f"{tmp_path}/var/")
    script = script.replace("runuser -u xkiproxy -- ", "").replace(" -o xkiproxy -g xkiproxy", "")
    (tmp_path / "var" / "lib").mkdir(parents=True)
    config = tmp_path / "var" / "lib" / "xkiproxy" / "xkiproxy.toml"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"HOME": str(tmp_path), "PATH": path, "XKIPROXY_CONFIG": str(config)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^demo-key .* ENABLED ", done.stdout, re.M)
    assert re.findall(r"^(\d+) \S+/(\w+)\.db$", done.stdout, re.M) == [
        ("600", "catalog"), ("600", "keyring"),
    ]  # fmt: skip


def test_no_page_makes_a_directory_that_the_service_cannot_write() -> None:
    """Under the unit /etc is read-only, and the package has made /etc/xkiproxy/credentials."""
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    assert [page.name for page in pages if "init /etc/" in page.read_text("utf-8")] == []
    assert "/etc/xkiproxy/tls" not in (DOCS / "deploy-public-endpoint.md").read_text("utf-8")


def test_what_the_security_model_names_is_there() -> None:
    text = (DOCS / "security.md").read_text("utf-8")
    written = "".join(file.read_text("utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    known = set(re.findall(r"def (test_\w+)", written))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 20
    assert named - known == set()
    paths = set(re.findall(r"`([a-z]+/[\w./]*)`", text))
    assert len(paths) > 20
    assert [p for p in paths if not ((ROOT / p).exists() or (ROOT / "xkiproxy" / p).exists())] == []
