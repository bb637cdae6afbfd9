"""Ports of 127.0.0.1 for servers that are started a moment later.

They lie below those that the kernel gives to clients and to port 0 (ip_local_port_range), and each
process of a run has its own: what was free a moment ago is free still.
"""

from __future__ import annotations

import itertools
import os
import random
import socket

_FIRST, _EACH, _PROCESSES = 15_000, 1_000, 16

_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PROCESSES
_block = range(_FIRST + _worker * _EACH, _FIRST + (_worker + 1) * _EACH)
# Another run on this machine hardly begins at the same place.
_candidates = itertools.islice(itertools.cycle(_block), random.randrange(_EACH), None)


def free_ports(count: int) -> list[int]:
    """So many ports that nobody uses, each given out once."""
    return [free_port() for _ in range(count)]


def free_port() -> int:
    """A port that nobody uses."""
    for port in _candidates:
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError  # the candidates have no end
