"""What a key store of each protocol must have and must not have, and how it is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from xkiproxy.config import ConfigError, load_config

CONFIG = """\
[server.tls]
certificate = "server.crt"
private_key = "server.key"

[[kmi]]
name = "local"
type = "software"
keyring = "keyring.db"

[[keystore]]
name = "gcp"
protocol = "ekm"
path_prefix = "/gcp"
kmi = ["local"]

[keystore.google]
service_accounts = ["service-123456789012@gcp-sa-ekms.iam.gserviceaccount.com"]
audience = "https://proxy.example.com"
"""
GOOGLE = CONFIG[CONFIG.index("[keystore.google]") :]
TLS = CONFIG[: CONFIG.index("[[kmi]]")]
AUDIENCE = 'audience = "https://proxy.example.com"'


def problems(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "xkiproxy.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    return [str(problem) for problem in caught.value.problems]


def test_a_key_store_of_google(tmp_path: Path) -> None:
    file = tmp_path / "xkiproxy.toml"
    file.write_text(CONFIG)
    (store,) = load_config(file).keystore
    assert store.credentials is None
    assert store.google is not None
    assert store.google.keys is None
    assert store.google.keys_url == "https://www.googleapis.com/oauth2/v3/certs"
    assert store.google.allowed_reasons is None
    file.write_text(CONFIG + 'keys = "google.json"\n')
    (store,) = load_config(file).keystore
    assert store.google is not None
    assert store.google.keys == tmp_path / "google.json"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (GOOGLE, "", "keystore[0].google: is missing: say whose tokens are good"),
        ('kmi = ["local"]', 'kmi = ["local"]\ncredentials = "c.toml"',
         "keystore[0].credentials: is not for ekm"),
        ('"ekm"', '"xks"', "keystore[0].credentials: is missing"),
        ('"ekm"', '"xks"', "keystore[0].google: is not for xks"),
        ('"ekm"', '"xki"', "keystore[0].google: is not for xki"),
        ('"/gcp"', '"/gcp/kms/ekm/v0"', 'keystore[0].path_prefix: /kms/ekm/v0 is added'),
        ('"service-123456789012@gcp-sa-ekms.iam.gserviceaccount.com"', "",
         "keystore[0].google.service_accounts: "),
        ('"service-123456789012@gcp-sa-ekms.iam.gserviceaccount.com"', '"123456789012"',
         'keystore[0].google.service_accounts[0]: write it as "service-'),
        ("https://proxy.example.com", "http://proxy.example.com",
         "keystore[0].google.audience: write it as"),
        ("https://proxy.example.com", "https://proxy.example.com/",
         "keystore[0].google.audience: write it as"),
        ("https://proxy.example.com", "proxy.example.com",
         "keystore[0].google.audience: write it as"),
        ("https://proxy.example.com", "https://Proxy.example.com",
         "keystore[0].google.audience: write it as"),
        ("https://proxy.example.com", "https://..", "keystore[0].google.audience: write it as"),
        (AUDIENCE, f'{AUDIENCE}\nkeys_url = "https://a..b/keys"',
         "keystore[0].google.keys_url: write it as"),
        (AUDIENCE, "", "keystore[0].google.audience: is missing"),
        (AUDIENCE, f'{AUDIENCE}\nkeys_url = "http://keys.example.com/"',
         "keystore[0].google.keys_url: write it as"),
        (AUDIENCE, f'{AUDIENCE}\nkeys_url = "https://keys.example.com/"\nkeys = "k.json"',
         "keystore[0].google: keys goes without keys_url"),
        (AUDIENCE, f'{AUDIENCE}\ntls.server_name = "keys"',
         "keystore[0].google: tls.server_name is not possible"),
        (AUDIENCE, f"{AUDIENCE}\nallowed_reasons = []",
         "keystore[0].google.allowed_reasons: admits no reason"),
        (AUDIENCE, f'{AUDIENCE}\nallowed_reasons = ["customer"]',
         "keystore[0].google.allowed_reasons[0]: "),
        (AUDIENCE, f"{AUDIENCE}\nissuer = 1", "keystore[0].google.issuer: unknown key"),
        (TLS, '[server]\nlisten = "127.0.0.1:8443"\nplaintext = true\n',
         "keystore[0].protocol: ekm needs [server.tls]"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_place(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert old in CONFIG
    found = problems(tmp_path, CONFIG.replace(old, new))
    assert any(text.startswith(problem) for text in found), found
