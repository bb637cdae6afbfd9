"""A black-box suite for XKI and XKS proxies, ours or another's: `xkiproxy conformance`.

It knows the protocols by their pages in docs/protocols alone and shares no code with the server: it
signs with signers of its own, so that a mistake of the server's cannot hide in the suite. `wire.py`
has what a protocol is to the suite, `common.py`, `xki.py` and `xks.py` the cases, each with the
requirement that it shows.
"""
