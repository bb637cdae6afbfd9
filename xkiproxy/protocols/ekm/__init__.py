"""Google Cloud EKM, the calls of Cloud External Key Manager (docs/protocols/ekm.md)."""

from xkiproxy.protocols.ekm.protocol import EkmProtocol

__all__ = ["EkmProtocol"]
