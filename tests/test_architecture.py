"""Imports point one way, and no wire name or KMI leaks over its border (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import xkiproxy

ROOT = Path(xkiproxy.__file__).parent

MAY_IMPORT = {
    "crypto": set(),
    "files": set(),
    "storage": {"files"},
    "hardening": set(),
    "config": {"crypto"},
    "observability": {"files"},
    "kmi": {"crypto", "config", "files", "hardening", "observability", "storage"},
    "protocols": {"crypto", "config"},
    "keystores": {"crypto", "config", "files", "kmi", "observability", "storage"},
    "conformance": set(),  # it shares no code with what it judges
    "server": {
        "crypto",
        "config",
        "hardening",
        "kmi",
        "keystores",
        "protocols",
        "observability",
    },
    "cli": {
        "crypto",
        "config",
        "hardening",
        "kmi",
        "keystores",
        "protocols",
        "observability",
        "server",
        "conformance",
    },
}


def imported_packages(path: Path) -> set[str]:
    """The packages of xkiproxy that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("xkiproxy.")}
    return found


def test_imports_point_one_way() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        package = path.relative_to(ROOT).parts[0].removesuffix(".py")
        allowed = MAY_IMPORT.get(package)
        if allowed is not None:
            extra = imported_packages(path) - allowed - {package}
            wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(extra)]
    assert wrong == []


def test_every_package_has_its_rule() -> None:
    packages = {path.name.removesuffix(".py") for path in ROOT.iterdir()}
    known = set(MAY_IMPORT) | {"__init__", "__main__", "__pycache__", "py.typed"}
    assert packages - known == set()


def test_the_page_names_every_module_and_no_other() -> None:
    """docs/architecture.md: by its path, or by its name in the row of its folder."""
    found = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
    modules = {path for path in found if not path.endswith("__init__.py")}
    page = ROOT.parent / "docs" / "architecture.md"
    named, short = set(), set()
    for line in page.read_text().splitlines():
        row = re.match(r"\| `(\w+/[\w/]*)` \|", line)
        for name in re.findall(r"`([\w/]+\.py)`", line):
            path = row[1] + name if row else name
            (named if path in modules or "/" in path else short).add(path)
    assert sorted(modules - named) == []
    elsewhere = {path for path in named if (ROOT.parent / path).is_file()}  # website/, grafana/
    assert sorted(named - modules - elsewhere) == []
    assert sorted(short - {path.rpartition("/")[2] for path in modules}) == []


def test_nothing_above_the_protocols_knows_the_name_of_one() -> None:
    """Only the tables of protocols, their folders, the configuration and the suite may say it."""
    allowed = {"protocols", "config", "conformance"}
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Constant) and node.value in {"xki", "xks", "ekm"}), (
                path
            )


def test_a_lane_process_loads_nothing_of_the_server() -> None:
    """There may be many, each is to start fast, and somebody else's module runs in them."""
    loaded = "import sys, xkiproxy.kmi.pkcs11.program; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True
    )
    heavy = {
        "aiohttp",
        "asyncio",
        "cryptography",
        "gmssl",
        "pydantic",
        "sqlite3",
        "xkiproxy.config",
    }
    assert heavy.isdisjoint(done.stdout.split())
