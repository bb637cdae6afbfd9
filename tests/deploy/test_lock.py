"""The dependencies of image and package: all by their hashes, and as pyproject.toml admits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
_PIN = re.compile(r"([\w.-]+)==([\w.]+)(?: ; .+)?((?: --hash=sha256:[0-9a-f]{64})+)")


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    text = (ROOT / "deploy" / "requirements.txt").read_text("ascii")
    lines = re.sub(r" \\\n +", " ", text).splitlines()
    found = [_PIN.fullmatch(line) for line in lines if not line.startswith("#")]
    assert all(found), "a line names no index, no folder, and nothing without its hashes"
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def test_it_has_what_the_project_asks_for(pins: dict[str, str]) -> None:
    """Run `make lock` after a change of the dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["tracing"]
    for requirement in map(Requirement, wanted):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.timeout(300)
def test_the_bill_of_materials_has_the_same(pins: dict[str, str]) -> None:
    venv = Path(sys.executable).parent.parent
    file = ROOT / "dist" / "xkiproxy.cdx.json"
    command = ["make", "--silent", f"PYTHON={sys.executable}", f"VENV={venv}", "sbom"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=280)
    bill = json.loads(file.read_text("utf-8"))
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["version"]
    listed = {canonicalize_name(part["name"]): part["version"] for part in bill["components"]}
    assert listed.items() <= pins.items()
    missing = pins.keys() - listed.keys()
    assert missing <= {"async-timeout", "colorama", "tzdata"}  # of other systems and versions
