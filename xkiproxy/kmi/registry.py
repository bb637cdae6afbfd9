"""Which code serves which type of `[[kmi]]`."""

from __future__ import annotations

from xkiproxy.config.models import KmiSettings, SoftwareSettings
from xkiproxy.kmi.base import InlineLane, KeyManager, KeyManagerError
from xkiproxy.kmi.software import SoftwareLane, open_keyring


def open_key_manager(settings: KmiSettings) -> KeyManager:
    """The administrator's side of a KMI; raises KeyManagerError or SecretError."""
    if isinstance(settings, SoftwareSettings):
        return open_keyring(settings)
    raise _unknown(settings)


def open_inline_lane(settings: KmiSettings) -> InlineLane:
    """The server's side of a KMI that executes on the spot.

    Raises:
        KeyManagerError: what holds the keys cannot be opened.
        SecretError: a secret for it cannot be had.
        OperationError: its keys cannot be read.
    """
    if isinstance(settings, SoftwareSettings):
        return SoftwareLane(open_keyring(settings))
    raise _unknown(settings)


def _unknown(settings: KmiSettings) -> KeyManagerError:
    return KeyManagerError(f"KMI {settings.name}: type {settings.type} is not known here")
