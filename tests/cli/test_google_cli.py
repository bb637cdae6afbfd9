"""The commands beside a key store of Google: there is no credential, and no signature to make."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from cli_site import Run, Site
from google_cloud import ACCOUNT, keystore_table


@pytest.fixture
def google_site(site: Site) -> Site:
    """The site, whose only key store speaks EKM."""
    text = site.config.read_text()
    kept = text[: text.index("[[keystore]]")]
    site.config.write_text(kept + keystore_table(keys="google.json"))
    return site


def test_what_google_cloud_is_told(run: Run, google_site: Site) -> None:
    values = run("kms-config", "--config", google_site.config, "--json").json()
    assert values == {
        "Key URI": "https://localhost/gcp/kms/ekm/v0/keys/EXTERNAL_KEY",
        "Key path": "gcp/kms/ekm/v0/keys/EXTERNAL_KEY",
        "Audience of tokens": "https://localhost",
        "Service accounts": ACCOUNT,
    }
    people = run("kms-config", "--config", google_site.config).out
    assert all(value in people for value in values.values())
    commands = [shlex.split(line) for line in people.splitlines() if "gcloud" in line]
    assert [words[:4] for words in commands] == [
        ["gcloud", "kms", "keys", "create"],
        ["gcloud", "kms", "keys", "versions"],
    ] * 2
    uri = commands[1][commands[1].index("--external-key-uri") + 1]
    path = commands[3][commands[3].index("--ekm-connection-key-path") + 1]
    assert [uri, path] == [values["Key URI"], values["Key path"]]


@pytest.mark.parametrize("extra", [("--output", "kms.json"), ("--access-key-id", "XKI")])
def test_there_is_no_credential_to_ask_for(
    run: Run, google_site: Site, extra: tuple[str, ...]
) -> None:
    refused = run("kms-config", "--config", google_site.config, *extra)
    assert refused.status == 2
    assert "ekm has no credentials" in refused.err


@pytest.mark.parametrize(
    "command",
    [("credentials", "add"), ("credentials", "list"), ("credentials", "revoke", "X"),
     ("conformance", "--key", "k")],
)  # fmt: skip
def test_commands_of_credentials_say_that_there_are_none(
    run: Run, google_site: Site, command: tuple[str, ...]
) -> None:
    refused = run(*command, "--config", google_site.config)
    assert refused.status == 1
    assert "key store gcp has no credentials: over ekm" in refused.err
    assert "xkiproxy kms-config" in refused.err


def test_only_google_can_call_it(run: Run, google_site: Site) -> None:
    refused = run("call", "encrypt", "k", "--plaintext", "x", "--config", google_site.config)
    assert refused.status == 1
    assert "only the cloud can make its tokens" in refused.err
    assert "docs/protocols/ekm.md" in refused.err
    assert (Path(__file__).parents[2] / "docs/protocols/ekm.md").exists()


def test_init_makes_no_key_store_of_google(run: Run, tmp_path: Path) -> None:
    refused = run("init", tmp_path / "new", "--protocol", "ekm")
    assert refused.status == 2
    assert "known are: xki, xks" in refused.err
