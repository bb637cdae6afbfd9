"""XKI v1, the protocol of Alibaba Cloud KMS external key instances (docs/protocols/xki.md)."""

from xkiproxy.protocols.xki.protocol import XkiProtocol

__all__ = ["XkiProtocol"]
