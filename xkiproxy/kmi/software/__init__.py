"""The software KMI: keys in an SQLite keyring, wrapped under a master key."""

from xkiproxy.kmi.software.keyring import Keyring, create_keyring, new_master_key, open_keyring
from xkiproxy.kmi.software.lane import SoftwareLane

__all__ = ["Keyring", "SoftwareLane", "create_keyring", "new_master_key", "open_keyring"]
