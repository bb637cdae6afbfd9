"""Secrets never stand in xkiproxy.toml: this is where they come from instead.

A secret is named by a table with one of three keys, or by a plain string for the first:

    { file = "master.key" }              a file that only its owner can read (mode 0600 or 0400)
    { env = "XKIPROXY_MASTER_KEY" }      an environment variable
    { credential = "master-key" }        a file of systemd's $CREDENTIALS_DIRECTORY
"""

from __future__ import annotations

import os
import pwd
import re
import stat
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from xkiproxy.config.paths import ConfigPath

_MAX_SECRET_SIZE = 1 << 20
_HEX = re.compile(r"[0-9A-Fa-f]{64}")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{43}=")

_handed: dict[str, str] = {}
"""Secrets that another process has read for this one, by the text of their source."""

_variables: set[str] = set()
"""Every environment variable that a configuration of this process names as a secret."""


def secret_variables() -> frozenset[str]:
    """The environment variables that no child process may inherit."""
    return frozenset(_variables)


def take_secrets(secrets: Mapping[str, str]) -> None:
    """Go by secrets as another process has read them, whatever their sources hold by now."""
    _handed.update(secrets)


class SecretError(Exception):
    """A secret cannot be had; the text says where it was looked for and what to do."""


class SecretSource(BaseModel):
    """Where one secret comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: ConfigPath | None = None
    """A file of the proxy's user (or root) that nobody else can reach: mode 0600 or 0400, checked.
    A plain string instead of a table is one, too.
    """

    env: str | None = None
    """An environment variable."""

    credential: str | None = None
    """A file in `$CREDENTIALS_DIRECTORY` (systemd's `LoadCredential=`); whoever fills the directory
    answers for its access rights.
    """

    @model_validator(mode="before")
    @classmethod
    def _string_is_file(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _exactly_one(self) -> SecretSource:
        if [self.file, self.env, self.credential].count(None) != 2:
            raise ValueError("give exactly one of file, env or credential")
        if self.credential is not None and "/" in self.credential:
            raise ValueError("credential is a name in $CREDENTIALS_DIRECTORY, without a slash")
        if self.env is not None:
            _variables.add(self.env)
        return self

    def __str__(self) -> str:
        if self.env is not None:
            return f"environment variable {self.env}"
        if self.credential is not None:
            return f"$CREDENTIALS_DIRECTORY/{self.credential}"
        return str(self.file)

    def path(self) -> Path:
        """The file that holds the secret, checked; raises SecretError where there is none."""
        if self.credential is not None:
            # The directory's owner (systemd, a secrets volume) answers for its access rights.
            return _credentials_directory(self.credential) / self.credential
        if self.file is None:
            raise SecretError(f"{self}: this secret must be a file; use file or credential")
        _check_private(self.file)
        return self.file

    def read_key(self) -> bytes:
        """The secret as a key: 32 bytes in Base64 or hex; raises SecretError."""
        text = self.read()
        try:
            return parse_key(text)
        except ValueError as error:
            raise SecretError(f"{self}: {error}") from None

    def read(self) -> str:
        """The secret as text, without white space around it; raises SecretError."""
        handed = _handed.get(str(self))
        return self.read_anew() if handed is None else handed

    def read_anew(self) -> str:
        """The same as its source has it now, whatever was handed to this process."""
        if self.env is not None:
            value = os.environ.get(self.env)
            if not value:
                raise SecretError(f"environment variable {self.env} is not set")
            return value.strip()
        path = self.path()
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_SECRET_SIZE).decode("utf-8").strip()
        except UnicodeDecodeError:
            raise SecretError(f"{path}: is not UTF-8 text") from None
        except OSError as error:
            raise SecretError(f"{path}: {error.strerror}") from None
        if not text:
            # An empty PIN would be tried, and tokens lock after a few.
            raise SecretError(f"{path}: is empty")
        return text


def parse_key(text: str) -> bytes:
    """The 32 bytes that a text is in Base64 or hex; a ValueError says why it is none."""
    if _HEX.fullmatch(text):
        return bytes.fromhex(text)
    if _BASE64.fullmatch(text):
        key = b64decode(text)
        if b64encode(key).decode() == text:
            return key
        # One key, one spelling.
        raise ValueError("must be 32 bytes in Base64, and this has bits after the last of them")
    raise ValueError(
        f"must be 32 bytes, as 44 characters of Base64 or 64 of hex; it has {len(text)} characters"
    )


def write_secret_file(path: Path, text: str) -> None:
    """Write a new file that only its owner can read; raises FileExistsError if it is there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _credentials_directory(name: str) -> Path:
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise SecretError(
            "$CREDENTIALS_DIRECTORY is not set; systemd sets it with LoadCredential=, for a command"
            f" with: systemd-run --wait --pipe --uid=xkiproxy --property=LoadCredential={name}:FILE"
            " xkiproxy ... (docs/deploy-debian.md)"
        )
    return Path(directory)


def _check_private(path: Path) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise SecretError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise SecretError(f"{path}: is not a regular file")
    if status.st_uid not in {0, os.geteuid()}:
        raise SecretError(f"{path}: {_foreign(path, status.st_uid)}")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise SecretError(f"{path}: mode {mode:04o} lets others read it; run: chmod 0600 {path}")


def _foreign(path: Path, owner: int) -> str:
    """What to do about a file of somebody else; root mostly is the one who is wrong."""
    me = os.geteuid()
    theirs, mine = _user_name(owner), _user_name(me)
    said = f"belongs to {theirs or owner} and you are {mine or me}; run this as {theirs or owner}"
    if me != 0:
        return f"{said}, or if {mine or me} is the proxy's user: chown {mine or me} {path}"
    if theirs is None:  # a container's, mostly; runuser knows names alone
        return f"{said}: setpriv --reuid={owner} --clear-groups xkiproxy ..."
    return f"{said}: runuser -u {theirs} -- xkiproxy ..."


def _user_name(number: int) -> str | None:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return None
