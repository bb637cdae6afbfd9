"""What a credential says of itself."""

from __future__ import annotations

import pytest

from xkiproxy.keystores.credentials import Credential
from xkiproxy.keystores.signing_keys import CachedSigningKeys


def made(created: str) -> Credential:
    return Credential("XKITESTACCESSKEY00000001", "a-secret-of-the-tests-0123456789", created)


@pytest.mark.parametrize(
    ("created", "seconds"),
    [
        ("1970-01-02T00:00:00Z", 86400.0),
        ("1970-01-01T01:00:00+01:00", 0.0),
        ("1970-01-01 00:00:10", 10.0),
        ("yesterday", None),
        ("", None),
    ],
)
def test_when_a_credential_was_made(created: str, seconds: float | None) -> None:
    assert made(created).created_at == seconds


def test_the_oldest_of_those_that_are_known() -> None:
    keys = CachedSigningKeys([made("2026-01-01T00:00:00Z"), made("now"), made("1970-01-02")])
    assert keys.oldest == 86400.0
    assert CachedSigningKeys([made("now")]).oldest is None
    assert CachedSigningKeys([]).oldest is None
