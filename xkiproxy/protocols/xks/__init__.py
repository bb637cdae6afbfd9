"""XKS v1, the AWS KMS external key store proxy API (docs/protocols/xks.md)."""

from xkiproxy.protocols.xks.protocol import XksProtocol

__all__ = ["XksProtocol"]
