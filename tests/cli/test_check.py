"""What `xkiproxy check` says: of key managers with several addresses, and in its remarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from google_cloud import SigningKey, key_set, keystore_table
from harness import make_certificate
from ports import free_ports
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


SHARED = """
[[keystore]]
name = "second"
protocol = "xki"
path_prefix = "/second"
kmi = ["local"]
credentials = "credentials/demo.toml"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    assert xkiproxy("init", tmp_path / "proxy").returncode == 0
    return tmp_path / "proxy" / "xkiproxy.toml"


def remarks(config: Path, status: int = 0) -> list[str]:
    done = xkiproxy("check", "--config", config)
    assert done.returncode == status, done.stderr
    assert ("no problems" in done.stdout) == (status == 0)
    lines = done.stderr.splitlines()
    return [line.removeprefix("remark: ") for line in lines if line.startswith("remark: ")]


def test_key_stores_that_can_use_each_others_keys(config: Path) -> None:
    base = config.read_text()
    assert remarks(config) == []
    config.write_text(base + SHARED)
    demo, second = remarks(config)
    assert demo.startswith("key store demo shares a KMI with second and has neither keys nor")
    assert second.startswith("key store second shares a KMI with demo")
    config.write_text(base + SHARED + 'keys = ["second-*"]\n')
    (demo,) = remarks(config)
    assert demo.startswith("key store demo ")
    config.write_text(base + 'keys = ["demo-*"]\n' + SHARED + 'keys = ["second-*"]\n')
    assert remarks(config) == []


def test_remarks_on_what_google_would_be_refused(config: Path) -> None:
    keys = config.parent / "keys.json"
    keys.write_text(key_set(SigningKey("google-1")))
    base = config.read_text() + 'keys = ["demo-*"]\n'
    table = keystore_table(keys="keys.json").replace("[keystore.google]", "{}\n[keystore.google]")
    usual = '"CUSTOMER_INITIATED_ACCESS", "GOOGLE_INITIATED_SYSTEM_OPERATION"'
    good = base + table.format('keys = ["gcp-*"]')
    config.write_text(good + f"allowed_reasons = [{usual}]\n")
    assert remarks(config) == []
    config.write_text(good + 'allowed_reasons = ["CUSTOMER_INITIATED_ACESS"]\n')
    unknown, missing = remarks(config)
    assert "CUSTOMER_INITIATED_ACESS is no reason that is known" in unknown
    assert "lacks CUSTOMER_INITIATED_ACCESS, GOOGLE_INITIATED_SYSTEM_OPERATION" in missing
    config.write_text(good.replace("@gcp-sa-ekms", "@gcp-sa-cloudkms"))
    os.utime(keys, (0, time.time() - 8 * 86_400))
    agent, old = remarks(config)
    assert "is no service agent of Cloud EKM" in agent
    assert "keys.json is 8 days old" in old


def test_remarks_come_after_the_problems_and_are_none_of_them(config: Path) -> None:
    config.write_text(config.read_text() + SHARED)
    (config.parent / "tls" / "server.crt").write_text("nonsense")
    done = xkiproxy("check", "--config", config, "--json")
    assert done.returncode == 1
    (problem,) = json.loads(done.stdout)
    assert problem["where"] == "server.tls"
    said = done.stderr
    assert 0 < said.index("1 problem(s)") < said.index("remark: key store demo ")
    assert len(remarks(config, status=1)) == 2
    config.write_text("nonsense")
    assert remarks(config, status=1) == []


@pytest.mark.parametrize(
    ("begins", "ends", "said"),
    [(-9, -1, "expired on 20"), (1, 9, "is not valid before 20")],
)
def test_a_certificate_out_of_its_time(config: Path, begins: int, ends: int, said: str) -> None:
    make_certificate(
        config.parent / "tls", begins=timedelta(days=begins), ends=timedelta(days=ends)
    )
    done = xkiproxy("check", "--config", config, "--json")
    (problem,) = json.loads(done.stdout)
    assert done.returncode == 1
    assert problem["where"] == "server.tls"
    assert f"server.crt: {said}" in problem["what"]


def test_what_is_said_of_a_certificate(config: Path) -> None:
    tls = config.parent / "tls"
    make_certificate(tls, ends=timedelta(days=31, hours=1))
    assert remarks(config) == []
    make_certificate(tls, ends=timedelta(days=3, hours=1))
    (soon,) = remarks(config)
    assert soon.endswith("server.crt: expires within 4 days: renew it")
    config.write_text(config.read_text().replace('"xki"', '"xks"'))
    authority = make_certificate(tls, "ca", common_name="Test CA", dns_names=())
    far = timedelta(days=90)
    make_certificate(tls, issuer=authority, ends=far)
    assert [text for text in remarks(config) if "server.crt" in text] == []
    make_certificate(tls, issuer=authority, ends=far, common_name="")
    assert "server.crt: its subject has no common name" in "".join(remarks(config))
    make_certificate(tls, ends=far)
    assert "server.crt: is self-issued" in "".join(remarks(config))


def test_credentials_that_aws_would_not_take(config: Path) -> None:
    credentials = config.parent / "credentials" / "demo.toml"
    listed = '[[credential]]\naccess_key_id = "{}"\naccess_key_secret = "{}"\ncreated = ""\n'
    good = ("XKSABCDEFGHIJKLMNOPQ", "s" * 43)
    table = [good, ("short234", "s" * 43), (good[0] + "2" * 11, "s" * 43), ("A" * 20, "s" * 42)]
    credentials.write_text("".join(listed.format(*row) for row in table))
    assert remarks(config) == []
    config.write_text(config.read_text().replace('"xki"', '"xks"'))
    said = [text for text in remarks(config) if "credential " in text]
    assert len(said) == 3
    assert said[0] == (
        "key store demo, credential short234: AWS takes an access key ID of 20 to 30 of A-Z 2-7"
    )
    assert "of A-Z 2-7" in said[1]
    assert "credential AAAAAAAAAAAAAAAAAAAA: AWS takes a secret of 43 to 64" in said[2]
    assert "ssss" not in "".join(said)


def test_an_admin_listener_that_others_reach(config: Path) -> None:
    base = config.read_text()
    for address, said in (("0.0.0.0:9464", 1), ("[::1]:9464", 0), ("localhost:9464", 0)):
        config.write_text(base.replace("127.0.0.1:9464", address))
        found = remarks(config)
        assert len(found) == said
        assert all("has no authentication" in text for text in found)
