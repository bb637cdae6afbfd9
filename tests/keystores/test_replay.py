"""The replay window: once, for as long as it matters, in bounded memory."""

from __future__ import annotations

import pytest

from xkiproxy.crypto.operations import Fault, OperationError
from xkiproxy.keystores.replay import ReplayWindow

NOW = 1_800_000_000.0


def test_a_nonce_is_admitted_once() -> None:
    window = ReplayWindow()
    assert window.admit("id", "nonce", NOW + 900, NOW)
    assert not window.admit("id", "nonce", NOW + 900, NOW)
    assert not window.admit("id", "nonce", NOW + 901, NOW + 1)
    assert window.admit("id", "other", NOW + 900, NOW)
    assert window.admit("another", "nonce", NOW + 900, NOW)


def test_a_nonce_is_kept_until_its_request_could_not_be_accepted_any_more() -> None:
    window = ReplayWindow()
    assert window.admit("id", "future", NOW + 1800, NOW)
    for later in (1, 900, 1799, 1800):
        assert not window.admit("id", "future", NOW + 1800, NOW + later)
    assert window.admit("id", "future", NOW + 4000, NOW + 1802)


def test_expired_nonces_are_forgotten() -> None:
    window = ReplayWindow()
    for i in range(1000):
        assert window.admit("id", f"nonce-{i}", NOW + 10, NOW)
    assert len(window) == 1000
    assert window.admit("id", "last", NOW + 900, NOW + 12)
    assert len(window) == 1


def test_a_full_window_admits_nothing() -> None:
    window = ReplayWindow(capacity=2)
    assert window.admit("id", "a", NOW + 10, NOW)
    assert window.admit("id", "b", NOW + 10, NOW)
    with pytest.raises(OperationError) as refused:
        window.admit("id", "c", NOW + 10, NOW)
    assert refused.value.fault is Fault.THROTTLED
    assert not window.admit("id", "a", NOW + 10, NOW)  # a replay stays one
    assert window.admit("id", "c", NOW + 900, NOW + 12)
