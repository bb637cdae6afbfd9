"""xkiproxy: the proxy between a cloud's key management service and keys that stay at home."""

__version__ = "0.1.0"
