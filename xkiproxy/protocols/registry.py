"""The protocols there are, by the name that the configuration uses."""

from __future__ import annotations

from collections.abc import Callable

from xkiproxy.config.models import KeystoreSettings
from xkiproxy.protocols.base import Protocol
from xkiproxy.protocols.xki import XkiProtocol
from xkiproxy.protocols.xks import XksProtocol


def _xki(settings: KeystoreSettings) -> Protocol:
    return XkiProtocol(settings.ciphertext_format, settings.disable_output_form_plain)


def _xks(settings: KeystoreSettings) -> Protocol:
    return XksProtocol(settings.ciphertext_format)


PROTOCOLS: dict[str, Callable[[KeystoreSettings], Protocol]] = {"xki": _xki, "xks": _xks}
"""What makes the protocol object of a key store."""
