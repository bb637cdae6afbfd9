"""KMIs behind the Transit secrets engine of OpenBao and Vault: batches are HTTP requests."""

from xkiproxy.kmi.transit.lane import TransitLauncher
from xkiproxy.kmi.transit.manager import TransitKeyManager

__all__ = ["TransitKeyManager", "TransitLauncher"]
