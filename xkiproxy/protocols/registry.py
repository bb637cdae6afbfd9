"""The protocols there are, by the name that the configuration uses."""

from __future__ import annotations

from collections.abc import Callable

from xkiproxy.config.models import KeystoreSettings
from xkiproxy.protocols.base import Protocol
from xkiproxy.protocols.client import ClientDialect
from xkiproxy.protocols.console import Console
from xkiproxy.protocols.xki import XkiProtocol
from xkiproxy.protocols.xki.client import XkiClient
from xkiproxy.protocols.xki.console import XkiConsole
from xkiproxy.protocols.xks import XksProtocol
from xkiproxy.protocols.xks.client import XksClient
from xkiproxy.protocols.xks.console import XksConsole


def _xki(settings: KeystoreSettings) -> Protocol:
    return XkiProtocol(settings.ciphertext_format, settings.disable_output_form_plain)


def _xks(settings: KeystoreSettings) -> Protocol:
    return XksProtocol(settings.ciphertext_format)


PROTOCOLS: dict[str, Callable[[KeystoreSettings], Protocol]] = {"xki": _xki, "xks": _xks}
"""What makes the protocol object of a key store."""

CLIENTS: dict[str, ClientDialect] = {"xki": XkiClient(), "xks": XksClient()}
"""The cloud's side of each protocol, for `xkiproxy call`."""

CONSOLES: dict[str, Console] = {"xki": XkiConsole(), "xks": XksConsole()}
"""What the console of each protocol's cloud wants."""

DEFAULT_PROTOCOL = "xki"
"""What is meant where a command names none."""
