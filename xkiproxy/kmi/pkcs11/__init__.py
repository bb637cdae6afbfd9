"""KMIs behind a PKCS#11 module: lanes are processes, batches are frames (docs/architecture.md).

Nothing is imported here: a lane process, of which there may be many, needs none of the server's
side.
"""
