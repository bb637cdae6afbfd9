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


def read(name: str) -> dict[str, str]:
    text = (ROOT / "deploy" / name).read_text("ascii")
    lines = re.sub(r" \\\n +", " ", text).splitlines()
    found = [_PIN.fullmatch(line) for line in lines if not line.startswith("#")]
    assert all(found), "a line names no index, no folder, and nothing without its hashes"
    return {canonicalize_name(match[1]): match[2] for match in found if match}


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    return read("requirements.txt")


def test_it_has_what_the_project_asks_for(pins: dict[str, str]) -> None:
    """Run `make lock` after a change of the dependencies."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (builds,) = map(Requirement, document["build-system"]["requires"])
    (version,) = read("build-requirements.txt").values()
    assert version in builds.specifier
    project = document["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["tracing"]
    for requirement in map(Requirement, wanted):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.timeout(300)
def test_the_bill_of_materials_has_the_same(pins: dict[str, str], tmp_path: Path) -> None:
    venv = Path(sys.executable).parent.parent
    file = tmp_path / "made" / "bill.json"
    command = ["make", "--silent", f"PYTHON={sys.executable}", f"VENV={venv}", f"SBOM={file}"]
    subprocess.run([*command, "sbom"], cwd=ROOT, check=True, timeout=280)
    bill = json.loads(file.read_text("utf-8"))
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["version"]
    listed = {canonicalize_name(part["name"]): part["version"] for part in bill["components"]}
    assert listed.items() <= pins.items()
    missing = pins.keys() - listed.keys()
    assert missing <= {"async-timeout", "colorama", "tzdata"}  # of other systems and versions
