"""What the signature schemes have in common."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xkiproxy.protocols.signed_headers import SignedHeaders, fold_headers, hmac_sha256


@given(st.binary(max_size=64), st.lists(st.binary(max_size=300), min_size=1, max_size=4))
def test_hmac_under_a_kept_key(key: bytes, messages: list[bytes]) -> None:
    mac = hmac_sha256(key)
    for message in messages:
        assert mac(message) == hmac.new(key, message, hashlib.sha256).hexdigest().encode()


def test_hmac_of_rfc_4231() -> None:
    expected = b"5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert hmac_sha256(b"Jefe")(b"what do ya want for nothing?") == expected


def test_headers_in_any_case_and_repeated() -> None:
    assert fold_headers([]) == {}
    assert fold_headers([(b"Host", b"a"), (b"X-B", b"1")]) == {b"host": b"a", b"x-b": b"1"}
    repeated = [(b"X-B", b"1"), (b"host", b"a"), (b"x-b", b"2")]
    assert fold_headers(repeated) == {b"host": b"a", b"x-b": b"1,2"}


def test_lines_of_signed_headers() -> None:
    signed = SignedHeaders("a%d;host;x-b")
    headers = {b"a%d": b"100%", b"host": b"h", b"x-b": b"%s", b"other": b"x"}
    assert signed.lines(headers) == b"a%d:100%\nhost:h\nx-b:%s\n"
    with pytest.raises(KeyError):
        signed.lines({b"host": b"h"})
    for wrong in ("host", "host;a", "a;a", ""):
        with pytest.raises(ValueError, match="sorted"):
            SignedHeaders(wrong)
