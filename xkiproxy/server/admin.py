"""The admin listener: a page, /metrics, /livez, /readyz and /status, for those inside."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Protocol

import orjson
from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from xkiproxy.observability.metrics import REQUEST_BUCKETS
from xkiproxy.observability.series import Snapshot
from xkiproxy.server.listener import bind
from xkiproxy.server.page import POLICY, render
from xkiproxy.server.runtime import Runtime
from xkiproxy.server.trend import STEP_SECONDS, Trend

_log = logging.getLogger(__name__)

_PAGE_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Overview(Protocol):
    """What there is to say of a server, whether it is one process or several."""

    async def metrics(self) -> bytes:
        """In the text format of Prometheus."""
        ...

    async def snapshot(self) -> Snapshot:
        """The same as numbers."""
        ...

    async def obstacles(self) -> list[str]:
        """Why it is not ready; empty when it is."""
        ...

    async def status(self) -> dict[str, Any]:
        """What /status shows."""
        ...


class OneProcess:
    """The overview of a server that is one process."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def metrics(self) -> bytes:
        """See `Overview`."""
        return generate_latest(self._runtime.metrics.registry)

    async def snapshot(self) -> Snapshot:
        """See `Overview`."""
        return self._runtime.metrics.collection.snapshot()

    async def obstacles(self) -> list[str]:
        """See `Overview`."""
        return self._runtime.obstacles()

    async def status(self) -> dict[str, Any]:
        """See `Overview`."""
        return self._runtime.status()


@asynccontextmanager
async def admin_listener(address: str, overview: Overview) -> AsyncIterator[None]:
    """Serve the admin endpoints; raises OSError if the address cannot be had."""
    trend = Trend(REQUEST_BUCKETS)
    runner = web.AppRunner(_application(overview, trend), access_log=None)
    await runner.setup()
    sampling = asyncio.create_task(_sample(overview, trend))
    try:
        await web.SockSite(runner, bind(address)).start()
        yield
    finally:
        sampling.cancel()
        await runner.cleanup()


async def _sample(overview: Overview, trend: Trend) -> None:
    """For the page's plots, until cancelled."""
    while True:
        try:
            trend.add(time.monotonic(), await overview.snapshot())
        except Exception:
            # A fault in one sample must not freeze the plots.
            _log.exception("no sample for the status page")
        await asyncio.sleep(STEP_SECONDS)


def _application(overview: Overview, trend: Trend) -> web.Application:
    app = web.Application()

    async def page(_: web.Request) -> web.Response:
        status, snapshot = await overview.status(), await overview.snapshot()
        text = render(status, snapshot, trend.points(), datetime.now(UTC))
        return web.Response(text=text, content_type="text/html", headers=_PAGE_HEADERS)

    async def metrics(_: web.Request) -> web.Response:
        body = await overview.metrics()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def livez(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        obstacles = await overview.obstacles()
        if obstacles:
            return web.Response(status=503, text="\n".join(obstacles) + "\n")
        return web.Response(text="ok\n")

    async def status(_: web.Request) -> web.Response:
        body = orjson.dumps(await overview.status(), option=orjson.OPT_INDENT_2)
        return web.Response(body=body, content_type="application/json")

    app.router.add_get("/", page)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/status", status)
    return app
