"""KMIs behind a PKCS#11 module: lanes are processes, batches are frames (docs/architecture.md)."""

from xkiproxy.kmi.pkcs11.lane import Pkcs11Launcher
from xkiproxy.kmi.pkcs11.manager import Pkcs11KeyManager

__all__ = ["Pkcs11KeyManager", "Pkcs11Launcher"]
