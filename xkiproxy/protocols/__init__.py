"""Wire protocols. They are pure: bytes in, operations out; no I/O, no KMI, no web framework."""
