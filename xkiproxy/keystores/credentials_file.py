"""Changing the credentials file of a key store: atomic for readers, one writer after another.

The file is replaced as a whole: a server that reads it meanwhile sees the old one or the new one.
Two changes at a time wait for each other, on a lock of the directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import tomli_w

from xkiproxy.config.secrets import SecretSource
from xkiproxy.files import locked, replacing
from xkiproxy.keystores.credentials import Credential, CredentialError, load_credentials

_HEADER = (
    "# The credentials of one key store. All of them work at once, so that one can take the place\n"
    "# of another. Change them with: xkiproxy credentials add, xkiproxy credentials revoke\n\n"
)


def format_credentials(credentials: Sequence[Credential]) -> str:
    """The text of a credentials file, which `parse_credentials` reads."""
    tables = [
        {
            "access_key_id": credential.access_key_id,
            "access_key_secret": credential.access_key_secret,
            "created": credential.created,
        }
        for credential in credentials
    ]
    return _HEADER + tomli_w.dumps({"credential": tables})


def newest(credentials: Sequence[Credential]) -> Credential | None:
    """The credential that was created last; of several, the one that stands last."""
    if not credentials:
        return None
    return max(enumerate(credentials), key=lambda item: (item[1].created_at or 0.0, item[0]))[1]


@contextmanager
def changing_credentials(path: Path) -> Iterator[list[Credential]]:
    """Lock a credentials file, give its list to change, and replace the file with what it became.

    Nothing is written if the body raises or changes nothing. A file that is missing is made; its
    mode is 0600, and a file that is replaced keeps its owner.

    Raises:
        SecretError: the file may not be read, or others may read it.
        CredentialError: the file is not a credentials file, or cannot be written.
    """
    target = path.resolve()
    with _locked(target.parent):
        before = load_credentials(SecretSource(file=target)) if target.exists() else []
        credentials = list(before)
        yield credentials
        if credentials != before:
            _replace(target, format_credentials(credentials))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(directory))
        except OSError as error:
            raise CredentialError(f"{directory}: {error.strerror}") from None
        yield


def _replace(path: Path, text: str) -> None:
    try:
        with replacing(path, durable=True) as file:
            _keep_owner(path, file.fileno())
            file.write(text)
    except OSError as error:
        raise CredentialError(f"{path}: cannot be written: {error.strerror}") from None


def _keep_owner(path: Path, descriptor: int) -> None:
    """Root may change a file of the proxy's user, who must still be able to read it after that."""
    if path.exists():
        status = path.stat()
        if status.st_uid != os.geteuid():
            os.fchown(descriptor, status.st_uid, status.st_gid)
