"""The admin listener: /metrics, /livez, /readyz and /status, for people and machines inside."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import orjson
from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from xkiproxy.server.listener import bind
from xkiproxy.server.runtime import Runtime


class Overview(Protocol):
    """What there is to say of a server, whether it is one process or several."""

    async def metrics(self) -> bytes:
        """In the text format of Prometheus."""
        ...

    async def problems(self) -> list[str]:
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

    async def problems(self) -> list[str]:
        """See `Overview`."""
        return self._runtime.problems()

    async def status(self) -> dict[str, Any]:
        """See `Overview`."""
        return self._runtime.status()


@asynccontextmanager
async def admin_listener(address: str, overview: Overview) -> AsyncIterator[None]:
    """Serve the admin endpoints; raises OSError if the address cannot be had."""
    runner = web.AppRunner(_application(overview), access_log=None)
    await runner.setup()
    try:
        await web.SockSite(runner, bind(address)).start()
        yield
    finally:
        await runner.cleanup()


def _application(overview: Overview) -> web.Application:
    app = web.Application()

    async def metrics(_: web.Request) -> web.Response:
        body = await overview.metrics()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def livez(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        problems = await overview.problems()
        if problems:
            return web.Response(status=503, text="\n".join(problems) + "\n")
        return web.Response(text="ok\n")

    async def status(_: web.Request) -> web.Response:
        body = orjson.dumps(await overview.status(), option=orjson.OPT_INDENT_2)
        return web.Response(body=body, content_type="application/json")

    app.router.add_get("/metrics", metrics)
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/status", status)
    return app
