"""The protocols there are, by the name that the configuration uses."""

from __future__ import annotations

from collections.abc import Callable

from xkiproxy.config.models import KeystoreSettings
from xkiproxy.protocols.base import Protocol
from xkiproxy.protocols.xki import XkiProtocol


def _xki(settings: KeystoreSettings) -> Protocol:
    return XkiProtocol(settings.ciphertext_format, settings.disable_output_form_plain)


PROTOCOLS: dict[str, Callable[[KeystoreSettings], Protocol]] = {"xki": _xki}
"""What makes the protocol object of a key store."""
