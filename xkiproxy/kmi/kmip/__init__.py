"""Keys in a key manager that speaks KMIP (OASIS), 1.4 to 2.1, over TLS."""

from xkiproxy.kmi.kmip.lane import KmipLauncher
from xkiproxy.kmi.kmip.manager import KmipKeyManager

__all__ = ["KmipKeyManager", "KmipLauncher"]
