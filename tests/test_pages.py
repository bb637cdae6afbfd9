"""What the pages in docs/ print and name is there: configurations load, tests and files exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

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
