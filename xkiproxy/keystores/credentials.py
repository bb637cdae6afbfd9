"""The credentials file of a key store: a list of `[[credential]]` with ID, secret and date."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from xkiproxy.config.secrets import SecretSource

_ACCESS_KEY_ID = re.compile(r"[A-Za-z0-9._-]{8,128}")
_ACCESS_KEY_SECRET = re.compile(r"[\x21-\x7e]{16,256}")
_FIELDS = {"access_key_id", "access_key_secret", "created"}


@dataclass(frozen=True, slots=True)
class Credential:
    """What the cloud signs with; `created` is an RFC 3339 date and time in UTC."""

    access_key_id: str
    access_key_secret: str = field(repr=False)
    created: str

    @property
    def created_at(self) -> float | None:
        """`created` in seconds since the epoch; None if it is no date."""
        try:
            made = datetime.fromisoformat(self.created)
        except ValueError:
            return None
        return (made if made.tzinfo else made.replace(tzinfo=UTC)).timestamp()


class CredentialError(Exception):
    """A credentials file cannot be used; the text says where and why, and never a secret."""


def load_credentials(source: SecretSource) -> list[Credential]:
    """The credentials that a source holds; raises SecretError or CredentialError."""
    return parse_credentials(source.read(), str(source))


def parse_credentials(text: str, where: str) -> list[Credential]:
    """Parse the text of a credentials file; raises CredentialError.

    An empty list is allowed, where it is written: every request is then refused. A file without
    one was cut short rather than meant.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # The message of the parser names a line and column, never the text that stands there.
        raise CredentialError(f"{where}: not valid TOML: {error}") from None
    tables = document.pop("credential", None)
    if document:
        raise CredentialError(f"{where}: only [[credential]] may stand here")
    if tables is None:
        none = "to refuse every request, write credential = []"
        raise CredentialError(f"{where}: there is no [[credential]] in it; {none}")
    if not isinstance(tables, list):
        raise CredentialError(f"{where}: credential must be an array, written [[credential]]")
    credentials = [_credential(item, f"{where}: credential[{i}]") for i, item in enumerate(tables)]
    names = [credential.access_key_id for credential in credentials]
    for name in names:
        if names.count(name) > 1:
            raise CredentialError(f"{where}: access_key_id {name} stands there twice")
    return credentials


def _credential(table: Any, where: str) -> Credential:
    if not isinstance(table, dict):
        raise CredentialError(f"{where}: must be a table")
    for name in sorted(_FIELDS - table.keys()):
        raise CredentialError(f"{where}.{name}: is missing")
    for name in sorted(table.keys() - _FIELDS):
        raise CredentialError(f"{where}.{name}: unknown key")
    created = str(table["created"])
    if not _matches(_ACCESS_KEY_ID, table["access_key_id"]):
        raise CredentialError(f"{where}.access_key_id: must be 8 to 128 of A-Z a-z 0-9 . _ -")
    if not _matches(_ACCESS_KEY_SECRET, table["access_key_secret"]):
        raise CredentialError(
            f"{where}.access_key_secret: must be 16 to 256 printable characters without spaces"
        )
    return Credential(table["access_key_id"], table["access_key_secret"], created)


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
