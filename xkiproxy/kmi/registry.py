"""Which code serves which type of `[[kmi]]`: that of a type is loaded once one is opened.

All of it takes 0.15 seconds, for which every command would wait.
"""

# ruff: noqa: PLC0415 - see above

from __future__ import annotations

from typing import TYPE_CHECKING

from xkiproxy.config.models import (
    KmipSettings,
    KmiSettings,
    Pkcs11Settings,
    SoftwareSettings,
    TransitSettings,
)
from xkiproxy.kmi.base import KeyManager, KeyManagerError, Launcher

if TYPE_CHECKING:
    from xkiproxy.kmi.contract import Kmi
    from xkiproxy.kmi.metrics import KmiMetrics
    from xkiproxy.kmi.queued import QueuedKmi
    from xkiproxy.observability.metrics import Metrics


def open_key_manager(settings: KmiSettings) -> KeyManager:
    """The administrator's side of a KMI; raises KeyManagerError or SecretError."""
    if isinstance(settings, SoftwareSettings):
        from xkiproxy.kmi.software import open_keyring

        return open_keyring(settings)
    if isinstance(settings, Pkcs11Settings):
        from xkiproxy.kmi.pkcs11.manager import Pkcs11KeyManager

        return Pkcs11KeyManager(settings)
    if isinstance(settings, KmipSettings):
        from xkiproxy.kmi.kmip import KmipKeyManager

        return KmipKeyManager(settings)
    if isinstance(settings, TransitSettings):
        from xkiproxy.kmi.transit import TransitKeyManager

        return TransitKeyManager(settings)
    raise _unknown(settings)


def open_kmi(settings: KmiSettings, metrics: Metrics) -> Kmi:
    """The server's side of a KMI, not started yet.

    Raises:
        KeyManagerError: what holds the keys cannot be opened.
        SecretError: a secret for it cannot be had.
        OperationError: its keys cannot be read.
    """
    from xkiproxy.kmi.inline import InlineKmi
    from xkiproxy.kmi.metrics import KmiMetrics

    bound = KmiMetrics(metrics, settings.name)
    if isinstance(settings, SoftwareSettings):
        from xkiproxy.kmi.software import SoftwareLane, open_keyring

        lane = SoftwareLane(open_keyring(settings))
        return InlineKmi(settings.name, settings.type, lane, bound)
    if isinstance(settings, Pkcs11Settings):
        from xkiproxy.kmi.pkcs11.lane import Pkcs11Launcher

        return _queued(settings, Pkcs11Launcher(settings, settings.pin.read()), bound)
    if isinstance(settings, KmipSettings):
        from xkiproxy.kmi.kmip import KmipLauncher

        return _queued(settings, KmipLauncher(settings), bound)
    if isinstance(settings, TransitSettings):
        from xkiproxy.kmi.transit import TransitLauncher

        return _queued(settings, TransitLauncher(settings), bound)
    raise _unknown(settings)


def _queued(
    settings: Pkcs11Settings | KmipSettings | TransitSettings,
    launcher: Launcher,
    metrics: KmiMetrics,
) -> QueuedKmi:
    from xkiproxy.kmi.queued import QueuedKmi

    return QueuedKmi(
        settings.name,
        settings.type,
        launcher,
        metrics,
        lanes=settings.lanes,
        queue_size=settings.queue_size,
        max_batch=settings.max_batch,
    )


def _unknown(settings: KmiSettings) -> KeyManagerError:
    return KeyManagerError(f"KMI {settings.name}: type {settings.type} is not known here")
