"""The software KMI: keys in an SQLite keyring, wrapped under a master key."""

from xkiproxy.kmi.software.keyring import (
    Keyring,
    MasterKeyChanged,
    create_keyring,
    new_master_key,
    open_keyring,
)
from xkiproxy.kmi.software.lane import SoftwareLane
from xkiproxy.kmi.software.rewrap import Rewrapped, make_keyring, rewrap_keyring

__all__ = [
    "Keyring",
    "MasterKeyChanged",
    "Rewrapped",
    "SoftwareLane",
    "create_keyring",
    "make_keyring",
    "new_master_key",
    "open_keyring",
    "rewrap_keyring",
]
