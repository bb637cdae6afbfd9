"""The protocols there are, by the name that the configuration uses."""

from __future__ import annotations

from collections.abc import Callable

from xkiproxy.config.models import KeystoreSettings
from xkiproxy.protocols.base import Protocol
from xkiproxy.protocols.client import ClientDialect
from xkiproxy.protocols.console import Console, TokenConsole
from xkiproxy.protocols.ekm import EkmProtocol
from xkiproxy.protocols.ekm.console import EkmConsole
from xkiproxy.protocols.ekm.tokens import PublicKeys, TokenVerifier
from xkiproxy.protocols.xki import XkiProtocol
from xkiproxy.protocols.xki.client import XkiClient
from xkiproxy.protocols.xki.console import XkiConsole
from xkiproxy.protocols.xks import XksProtocol
from xkiproxy.protocols.xks.client import XksClient
from xkiproxy.protocols.xks.console import XksConsole


def _xki(settings: KeystoreSettings, token_keys: PublicKeys) -> Protocol:
    del token_keys
    return XkiProtocol(settings.ciphertext_format, settings.disable_output_form_plain)


def _xks(settings: KeystoreSettings, token_keys: PublicKeys) -> Protocol:
    del token_keys
    return XksProtocol(settings.ciphertext_format)


def _ekm(settings: KeystoreSettings, token_keys: PublicKeys) -> Protocol:
    google = settings.google
    assert google is not None  # noqa: S101 - the configuration's rule for this protocol
    verifier = TokenVerifier(google.audience, google.service_accounts, token_keys)
    reasons = None if google.allowed_reasons is None else frozenset(google.allowed_reasons)
    return EkmProtocol(verifier, reasons, settings.ciphertext_format)


PROTOCOLS: dict[str, Callable[[KeystoreSettings, PublicKeys], Protocol]] = {
    "xki": _xki,
    "xks": _xks,
    "ekm": _ekm,
}
"""What makes the protocol object of a key store, with the keys that verify its tokens if it has
such.
"""

CLIENTS: dict[str, ClientDialect] = {"xki": XkiClient(), "xks": XksClient()}
"""The cloud's side of each protocol, for `xkiproxy call`."""

CONSOLES: dict[str, Console] = {"xki": XkiConsole(), "xks": XksConsole()}
"""What the console of each protocol's cloud wants, where requests are signed with credentials."""

TOKEN_CONSOLES: dict[str, TokenConsole] = {"ekm": EkmConsole()}
"""The same where the cloud proves itself by tokens."""

DEFAULT_PROTOCOL = "xki"
"""What is meant where a command names none."""
