"""The PROXY protocol, versions 1 and 2: how a TCP load balancer passes the client's address on.

The header stands before everything else on a connection, also before TLS. It is specified in
HAProxy's doc/proxy-protocol.txt (2020), sections 2.1 (version 1, text) and 2.2 (version 2, binary).
Its sender is believed, so only named balancers may send one, and a connection without one is none
of theirs. What the header has besides the addresses (TLVs) is checked for its form and not used.
"""

from __future__ import annotations

import ipaddress
import re

MAX_SIZE = 4096
"""Bytes. A header has 232 at most without TLVs, and balancers' TLVs are far below the rest."""

_V1_START = b"PROXY "
_V1_MAX_SIZE = 107
_V1 = re.compile(r"PROXY TCP([46]) ([0-9A-Fa-f.:]+) ([0-9A-Fa-f.:]+) (\d{1,5}) (\d{1,5})")

_V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FIXED_SIZE = 16
_V2_LOCAL, _V2_PROXY = 0x20, 0x21
_V2_FAMILIES = {0x11: 4, 0x21: 16}
"""TCP over IPv4 and IPv6: the size of an address. No other transport comes to a TCP port."""
_TLV_HEAD_SIZE = 3


class ProxyProtocolError(Exception):
    """What came first on a connection is no PROXY header; the text says what is wrong with it."""


def header_size(data: bytes) -> int | None:
    """The size in bytes of the header that `data` begins with, None while more is needed.

    Raises:
        ProxyProtocolError: no header begins like that, or one that is too long.
    """
    if data.startswith(_V1_START[: len(data)]):
        return _v1_size(data)
    if data.startswith(_V2_SIGNATURE[: len(data)]):
        return _v2_size(data)
    raise ProxyProtocolError("the connection does not begin with a PROXY header")


def parse_header(header: bytes) -> str:
    """The client's address; empty where the balancer speaks for itself (UNKNOWN, LOCAL).

    `header` is whole: as long as `header_size` says.

    Raises:
        ProxyProtocolError: it is malformed, or of another transport than TCP.
    """
    return _parse_v1(header) if header.startswith(_V1_START) else _parse_v2(header)


def _v1_size(data: bytes) -> int | None:
    end = data.find(b"\r\n", 0, _V1_MAX_SIZE)
    if end >= 0:
        return end + 2
    if len(data) >= _V1_MAX_SIZE:
        raise ProxyProtocolError("version 1: the line does not end within 107 bytes")
    return None


def _parse_v1(header: bytes) -> str:
    line = header[:-2].decode("ascii", "replace")
    if line == "PROXY UNKNOWN" or line.startswith("PROXY UNKNOWN "):
        return ""
    match = _V1.fullmatch(line)
    if match is None:
        raise ProxyProtocolError("version 1: the line is not PROXY TCP4|TCP6 and four fields")
    family, source, destination, *ports = match.groups()
    try:
        addresses = [ipaddress.ip_address(text) for text in (source, destination)]
    except ValueError:
        raise ProxyProtocolError("version 1: an address is malformed") from None
    if any(address.version != int(family) for address in addresses):
        raise ProxyProtocolError("version 1: an address is of the other family")
    if any(int(port) > 0xFFFF for port in ports):
        raise ProxyProtocolError("version 1: a port is over 65535")
    return str(addresses[0])


def _v2_size(data: bytes) -> int | None:
    if len(data) < _V2_FIXED_SIZE:
        return None
    size = _V2_FIXED_SIZE + int.from_bytes(data[14:16])
    if size > MAX_SIZE:
        raise ProxyProtocolError(f"version 2: {size} bytes are over the limit of {MAX_SIZE}")
    return size


def _parse_v2(header: bytes) -> str:
    command, family, rest = header[12], header[13], header[_V2_FIXED_SIZE:]
    if command == _V2_LOCAL:
        return ""
    if command != _V2_PROXY:
        raise ProxyProtocolError(f"version 2: version and command are 0x{command:02x}")
    size = _V2_FAMILIES.get(family)
    if size is None:
        raise ProxyProtocolError(f"version 2: 0x{family:02x} is neither TCP over IPv4 nor IPv6")
    tlvs = 2 * size + 4  # two addresses, two ports
    if len(rest) < tlvs:
        raise ProxyProtocolError("version 2: the addresses are cut short")
    _check_tlvs(rest[tlvs:])
    return str(ipaddress.ip_address(rest[:size]))


def _check_tlvs(data: bytes) -> None:
    while data:
        size = _TLV_HEAD_SIZE + int.from_bytes(data[1:3])
        if len(data) < size:
            raise ProxyProtocolError("version 2: a TLV is cut short")
        data = data[size:]
