"""What `xkiproxy check` says of key managers with several addresses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_end_to_end import free_ports
from transit import TransitSite


@pytest.fixture
def site(tmp_path: Path) -> Iterator[TransitSite]:
    made = TransitSite(tmp_path / "transit")
    yield made
    made.server.close()


def xkiproxy(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("xkiproxy")
    command = [program, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_a_key_store_without_credentials_is_told_the_command(tmp_path: Path) -> None:
    assert xkiproxy("init", tmp_path / "proxy").returncode == 0
    config = tmp_path / "proxy" / "xkiproxy.toml"
    store = """
[[keystore]]
name = "second"
protocol = "xki"
path_prefix = "/second"
kmi = ["local"]
credentials = "credentials/second.toml"
"""
    config.write_text(config.read_text() + store)
    done = xkiproxy("check", "--config", config)
    assert done.returncode == 1
    assert "xkiproxy credentials add --keystore second" in done.stdout + done.stderr
    added = xkiproxy("credentials", "add", "--keystore", "second", "--config", config)
    assert added.returncode == 0
    assert xkiproxy("check", "--config", config).returncode == 0


@pytest.mark.parametrize("lanes", [1, 4])
def test_each_address_is_tried(tmp_path: Path, site: TransitSite, lanes: int) -> None:
    """However few lanes there are, and though the proxy would serve with the others."""
    assert xkiproxy("init", tmp_path / "proxy").returncode == 0
    config = tmp_path / "proxy" / "xkiproxy.toml"
    base = config.read_text()
    good, away = site.server.address, f"https://localhost:{free_ports(1)[0]}"
    for addresses, named in (([good, good], ""), ([away, good], away), ([good, away], away)):
        table = site.toml("bao").replace(
            f'address = "{good}"', f"address = {json.dumps(addresses)}\nlanes = {lanes}"
        )
        config.write_text(base + table)
        done = xkiproxy("check", "--config", config, "--json")
        problems = [problem["what"] for problem in json.loads(done.stdout)]
        assert len(problems) == bool(named)
        assert all(
            text.startswith(f"kmi bao, a lane: {named}: cannot be reached") for text in problems
        )
        assert (done.returncode != 0) == bool(named)
