"""What may go wrong between the steps of a reload: nothing is half taken over."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from test_end_to_end import Installation

from xkiproxy.config import load_config
from xkiproxy.server.contents import read_anew
from xkiproxy.server.serve import PublicSide, public_side, running_parts

NOBODY = "credential = []\n"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Installation]:
    made = Installation(tmp_path / "demo")
    yield made
    made.stop()


@pytest.fixture
def credentials(site: Installation) -> Path:
    return site.directory / "credentials" / "demo.toml"


@pytest.fixture
async def public(site: Installation) -> AsyncIterator[PublicSide]:
    """The public side of a server in this process."""
    async with (
        running_parts(load_config(site.config)) as (runtime, audit),
        public_side(runtime, audit) as made,
    ):
        yield made


def served(public: PublicSide) -> list[int]:
    """How many credentials requests are checked against, and how many /status shows."""
    (tenant,) = public._gateway._tenants.values()
    (shown,) = public._runtime.tenants
    return [len(one.store.signing_keys.identities) for one in (tenant, shown)]


async def test_files_that_go_after_they_were_read(
    site: Installation, credentials: Path, public: PublicSide
) -> None:
    """What has been prepared needs no file any more: a renewal may be writing them just then."""
    credentials.write_text(NOBODY)
    change = await public.prepare(lambda: read_anew(site.config))
    for file in (site.config, credentials, *(site.directory / "tls").iterdir()):
        file.unlink()
    await public.apply(change)
    assert served(public) == [0, 0]
    assert public._runtime.history.changes


async def test_a_listener_that_cannot_be_exchanged_changes_nothing(
    site: Installation, credentials: Path, public: PublicSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Socket:
        def dup(self) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = credentials.read_text()
    credentials.write_text(NOBODY)
    listener, metrics = public.listener, public._runtime.metrics
    sock = listener._socket
    for broken, problem in (
        (Socket(), "server.listen: Too many open files"),
        (object(), "server.listen: an internal error: see the log"),
    ):
        monkeypatch.setattr(listener, "_socket", broken)
        await public.reload()
        assert public._runtime.history.problems == [problem]
        assert served(public) == [1, 1]
    sample = metrics.registry.get_sample_value
    assert sample("xkiproxy_reloads_total", {"outcome": "failed"}) == 2
    monkeypatch.setattr(listener, "_socket", sock)
    await public.reload()
    assert public._runtime.history.problems == []
    assert served(public) == [0, 0]
    credentials.write_text(before)
    await public.reload()
    assert served(public) == [1, 1]
