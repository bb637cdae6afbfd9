"""From where a key store may be asked."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from xkiproxy.config.models import Network

_MAX_REMEMBERED = 4096


class Networks:
    """An allow-list of networks, in CIDR notation (RFC 4632, RFC 4291 section 2.3)."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = networks
        self._verdicts: dict[str, bool] = {}

    def admit(self, address: str) -> bool:
        """Whether an address is in one of them; what is no IP address is not."""
        verdict = self._verdicts.get(address)
        if verdict is None:
            if len(self._verdicts) >= _MAX_REMEMBERED:
                self._verdicts.clear()
            verdict = self._verdicts[address] = self._look_up(address)
        return verdict

    def _look_up(self, text: str) -> bool:
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped  # as a socket for both families shows IPv4
        return any(address in network for network in self._networks)
