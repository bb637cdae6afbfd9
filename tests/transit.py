"""A Transit server for tests and what a proxy needs to use it: its CA, a token, settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from harness import make_certificate

from xkiproxy.config.models import TransitSettings
from xkiproxy.config.secrets import write_secret_file

sys.path.append(str(Path(__file__).parent / "kmi" / "transit"))

from transit_server import (
    ADMIN_POLICY,
    PROXY_POLICY,
    ServerToken,
    TransitServer,
)

TOKEN = "hvs.a-token-of-the-tests-0123456789"
ADMIN_TOKEN = "hvs.a-token-of-the-tests-for-administrators"


class TransitSite:
    """A running server with the key `key`, and two tokens: a proxy's and an administrator's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        ca = self.issuer = make_certificate(
            directory, "ca", common_name="a CA of the tests", dns_names=()
        )
        make_certificate(directory, "server", issuer=ca)
        make_certificate(directory, "client", common_name="a-proxy", dns_names=(), issuer=ca)
        make_certificate(directory, "stranger", common_name="another CA", dns_names=())
        self.ca = directory / "ca.crt"
        self.token_file = directory / "transit-token"
        self.admin_token_file = directory / "admin-token"
        write_secret_file(self.token_file, TOKEN + "\n")
        write_secret_file(self.admin_token_file, ADMIN_TOKEN + "\n")
        self.server = TransitServer(directory / "server.crt", self.ca)
        self.server.tokens[TOKEN] = ServerToken(PROXY_POLICY)
        self.server.tokens[ADMIN_TOKEN] = ServerToken(ADMIN_POLICY)
        self.server.add_key("key")
        self.server.start()

    def settings(self, **changes: Any) -> TransitSettings:
        fields: dict[str, Any] = {
            "name": "bao",
            "type": "transit",
            "address": self.server.address,
            "auth": {"token": self.token_file},
            "tls": {"ca": self.ca},
            "lanes": 1,
            **changes,
        }
        return TransitSettings(**fields)

    def admin_settings(self, **changes: Any) -> TransitSettings:
        return self.settings(auth={"token": self.admin_token_file}, **changes)

    def toml(self, name: str) -> str:
        """The administrator's settings as a table of the configuration file."""
        return (
            f'\n[[kmi]]\nname = "{name}"\ntype = "transit"\naddress = "{self.server.address}"\n'
            f'[kmi.auth]\ntoken = {{ file = "{self.admin_token_file}" }}\n'
            f'[kmi.tls]\nca = "{self.ca}"\n'
        )
