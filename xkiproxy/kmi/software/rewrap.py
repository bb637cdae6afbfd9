"""How a keyring comes under a new master key, and how it is made: two files that must agree.

The file of the keyring and that of its master key cannot change in one step. So a new master key
is first written beside the old one, whole and durable; then one transaction wraps the keyring anew;
then the file takes the old one's place:

    interrupted      the keyring is under             what a second rewrap does
    before the file  the old master key               all of it
    before the end   the old master key               the rest, with the new one that is there
    before the move  the new one, in the file beside  the move alone

A file with a new master key is never deleted, not even when the transaction failed: a disk that
reports a failure may hold the transaction all the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from xkiproxy.config.models import SoftwareSettings
from xkiproxy.config.secrets import SecretSource, write_secret_file
from xkiproxy.files import locked, sync_directory
from xkiproxy.kmi.base import KeyManagerError
from xkiproxy.kmi.software.keyring import (
    Keyring,
    MasterKeyChanged,
    create_keyring,
    new_master_key,
)


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """What a rewrap has done; `versions` is None if it ended one that was interrupted."""

    place: Path
    """Where the new master key is."""
    in_force: bool
    """Whether that is where the configuration says."""
    versions: int | None


def rewrap_keyring(settings: SoftwareSettings, place: Path | None = None) -> Rewrapped:
    """Make a new master key and wrap the keyring under it.

    The new master key takes the place of the old one, or is left in `place`: what is not a file
    (the environment, a credential of systemd) is somebody else's to change.

    Raises:
        KeyManagerError: it was not done, or not to its end; the text says which file has the key.
        SecretError: the master key at hand cannot be had.
    """
    target = None if place is not None else _file_of(settings.master_key)
    if target is not None:
        place = target.with_name(f"{target.name}.new")
    assert place is not None  # noqa: S101 - it is one or the other
    place = place.absolute()
    with _alone(place.parent):
        versions = _wrap_anew(settings, place, beside=target is not None)
        if target is None:
            return Rewrapped(place, False, versions)
        _move(place, target, settings.keyring)
        return Rewrapped(target, True, versions)


def make_keyring(settings: SoftwareSettings) -> bool:
    """Make an empty keyring, and its master key if it is a file that is not there.

    Returns whether the master key is new. Nothing that is there is overwritten.

    Raises:
        KeyManagerError: there is such a keyring, or a file cannot be made.
        SecretError: the master key is there and of no use, or comes from where nobody has put it.
    """
    file = settings.master_key.file
    if os.path.lexists(settings.keyring):
        raise KeyManagerError(f"keyring {settings.keyring}: is there already; it was left as it is")
    is_new = file is not None and not os.path.lexists(file)
    if file is not None and is_new:
        _write_new_key(file)
    # After a failure the master key stays: it is used the next time.
    create_keyring(settings.keyring, settings.master_key.read())
    return is_new


def _file_of(source: SecretSource) -> Path:
    if source.file is None:
        raise KeyManagerError(
            f"the master key comes from {source}, which cannot be written here: say where the new"
            " one shall go with --new-master-key FILE, and put it there yourself"
        )
    return source.file.resolve()  # the file itself, not a link to it, is what is replaced


def _wrap_anew(settings: SoftwareSettings, place: Path, *, beside: bool) -> int | None:
    source = settings.master_key
    try:
        keyring = Keyring(settings.keyring, source.read(), str(source))
    except MasterKeyChanged:
        if not os.path.lexists(place):
            raise
        Keyring(settings.keyring, _read_key(place), str(place)).close()
        return None
    try:
        if not os.path.lexists(place):
            _write_new_key(place)
        return keyring.rewrap(_read_key(place), place, beside=beside)
    finally:
        keyring.close()


def _read_key(place: Path) -> str:
    return SecretSource(file=place).read()


def _write_new_key(place: Path) -> None:
    """A new master key in a file that is there whole, after a power cut too, or not at all."""
    part = place.with_name(f".{place.name}.part")
    try:
        part.unlink(missing_ok=True)
        try:
            write_secret_file(part, new_master_key() + "\n")
            os.link(part, place)  # unlike a rename, this never replaces a file
        finally:
            part.unlink(missing_ok=True)
        sync_directory(place.parent)
    except OSError as error:
        raise KeyManagerError(
            f"master key {place}: cannot be written ({error.strerror}); the keyring was not changed"
        ) from None


def _move(place: Path, target: Path, keyring: Path) -> None:
    try:
        place.rename(target)
        sync_directory(target.parent)
    except OSError as error:
        raise KeyManagerError(
            f"master key {target}: cannot be replaced ({error.strerror}); keyring {keyring} is"
            f" wrapped under the one in {place}: put that there before a server is started"
        ) from None


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep other rewraps out: two that write a new master key would each think it theirs."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(directory, wait=False))
        except BlockingIOError as error:
            raise KeyManagerError(
                f"{directory}: another rewrap is at work there ({error.strerror});"
                " nothing was changed"
            ) from None
        except OSError as error:
            raise KeyManagerError(f"{directory}: {error.strerror}; nothing was changed") from None
        yield
