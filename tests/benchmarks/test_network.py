"""The benchmark of key managers over a network runs, whatever its figures are."""

from __future__ import annotations

import pytest

from benchmarks import network


async def test_a_short_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "ROUND_TRIPS_MS", (0, 5))
    monkeypatch.setattr(network, "CONCURRENCIES", (1, 64))
    found = await network.run(0.1)
    assert len(found) == 16
    assert min(found.values()) > 0
    assert found["kmip", 5, 1, 1] < 200  # the relay does add five milliseconds
    assert "batches are worth" in capsys.readouterr().out
