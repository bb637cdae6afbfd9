"""PROXY headers: the parser against the specification's examples, and what is no header."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xkiproxy.server.proxy_protocol import (
    MAX_SIZE,
    ProxyProtocolError,
    header_size,
    parse_header,
)

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
V4 = bytes([192, 168, 0, 1, 192, 168, 0, 11]) + (56324).to_bytes(2) + (443).to_bytes(2)
V6 = bytes.fromhex("20010db8000000000000000000000001" * 2) + V4[8:]
TLV = b"\xea\x00\x05\x01vpce"


def version_2(rest: bytes, command: int = 0x21, family: int = 0x11) -> bytes:
    return SIGNATURE + bytes([command, family]) + len(rest).to_bytes(2) + rest


GOOD = [
    (b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n", "192.168.0.1"),
    (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", "255.255.255.255"),
    (b"PROXY TCP6 2001:db8::1 ::1 56324 443\r\n", "2001:db8::1"),
    (b"PROXY TCP6 " + b"ffff:f...f:ffff ".replace(b"f...f", b"ffff:ffff:ffff:ffff:ffff:ffff") * 2
     + b"65535 65535\r\n", "ffff:" * 7 + "ffff"),
    (b"PROXY UNKNOWN\r\n", ""),
    (b"PROXY UNKNOWN ffff:: ffff:: 65535 65535\r\n", ""),
    (version_2(V4), "192.168.0.1"),
    (version_2(V4 + TLV), "192.168.0.1"),
    (version_2(V6, family=0x21), "2001:db8::1"),
    (version_2(V6 + TLV + TLV, family=0x21), "2001:db8::1"),
    (version_2(b"", command=0x20, family=0x00), ""),
    (version_2(V4, command=0x20), ""),
]  # fmt: skip


@pytest.mark.parametrize(("header", "source"), GOOD)
def test_a_header_and_what_follows_it(header: bytes, source: str) -> None:
    for following in (b"", b"\x16\x03\x01\x02\x00", b"PROXY "):
        assert header_size(header + following) == len(header)
    assert parse_header(header) == source
    for size in range(1, len(header)):
        found = header_size(header[:size])
        assert found in (None, len(header))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"\x16\x03\x01\x02\x00\x01", "does not begin with a PROXY header"),
        (b"GET / HTTP/1.1\r\n", "does not begin with a PROXY header"),
        (b"proxy TCP4 1.2.3.4 1.2.3.4 1 2\r\n", "does not begin with a PROXY header"),
        (b"\r\n\r\n\0\r\nQUIX", "does not begin with a PROXY header"),
        (b"PROXY TCP4 " + b"1" * 100, "does not end within 107 bytes"),
        (b"PROXY UNKNOWN " + b" " * 92 + b"\r\n", "does not end within 107 bytes"),
        (version_2(bytes(MAX_SIZE)), "over the limit"),
    ],
)
def test_what_cannot_become_a_header(data: bytes, complaint: str) -> None:
    with pytest.raises(ProxyProtocolError, match=complaint):
        header_size(data)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n", "four fields"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2 3\r\n", "four fields"),
        (b"PROXY  TCP4 1.2.3.4 1.2.3.4 1 2\r\n", "four fields"),
        (b"PROXY TCP5 1.2.3.4 1.2.3.4 1 2\r\n", "four fields"),
        (b"PROXY UDP4 1.2.3.4 1.2.3.4 1 2\r\n", "four fields"),
        (b"PROXY UNKNOWNS\r\n", "four fields"),
        (b"PROXY TCP4 1.2.3 1.2.3.4 1 2\r\n", "an address is malformed"),
        (b"PROXY TCP4 01.2.3.4 1.2.3.4 1 2\r\n", "an address is malformed"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.400 1 2\r\n", "an address is malformed"),
        (b"PROXY TCP6 1.2.3.4 1.2.3.4 1 2\r\n", "other family"),
        (b"PROXY TCP4 ::1 ::1 1 2\r\n", "other family"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 65536\r\n", "over 65535"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 \xb2\r\n", "four fields"),
        (version_2(V4, command=0x22), "command are 0x22"),
        (version_2(V4, command=0x11), "command are 0x11"),
        (version_2(V4, family=0x12), "0x12 is neither"),
        (version_2(bytes(216), family=0x31), "0x31 is neither"),
        (version_2(b"", family=0x00), "0x00 is neither"),
        (version_2(V4[:-1]), "cut short"),
        (version_2(V4, family=0x21), "cut short"),
        (version_2(V4 + TLV[:-1]), "a TLV is cut short"),
        (version_2(V4 + b"\x04"), "a TLV is cut short"),
    ],
)
def test_what_is_refused(header: bytes, complaint: str) -> None:
    assert header_size(header) == len(header)
    with pytest.raises(ProxyProtocolError, match=complaint):
        parse_header(header)


@given(st.one_of(st.binary(max_size=300), st.sampled_from([b"PROXY ", SIGNATURE])),
       st.binary(max_size=300))  # fmt: skip
def test_nothing_but_its_own_error_comes_of_any_bytes(start: bytes, rest: bytes) -> None:
    data = start + rest
    try:
        size = header_size(data)
        if size is not None and size <= len(data):
            parse_header(data[:size])
    except ProxyProtocolError as error:
        assert str(error)
