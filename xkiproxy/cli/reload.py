"""`xkiproxy reload`: a running server takes over what has changed in its files."""

from __future__ import annotations

import os
import signal
import time
import urllib.error
import urllib.request
from typing import Annotated, Any

import orjson
import typer

from xkiproxy.cli.common import (
    DEFAULT_CONFIG,
    CommandError,
    ConfigOption,
    JsonOption,
    out,
    print_json,
)
from xkiproxy.config import ConfigError, load_config
from xkiproxy.config.models import split_address

_STEP_SECONDS = 0.05


def reload(
    timeout: Annotated[float, typer.Option(help="Seconds to wait for it.", min=0.1)] = 30.0,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Let the running server take over changed key stores, credentials and certificates.

    All of it or nothing: if there is a mistake in a file, nothing changes, and it is named. No
    connection and no request is dropped. The same as SIGHUP, but it waits and says what came of it.

    Example: xkiproxy reload --config /etc/xkiproxy/xkiproxy.toml
    """
    try:
        settings = load_config(config)
    except ConfigError as error:
        raise CommandError(f"nothing was changed: {error}") from None
    url = status_url(settings.server.admin_listen)
    before = read_status(url)
    try:
        os.kill(before["pid"], signal.SIGHUP)
    except (PermissionError, ProcessLookupError) as error:
        raise CommandError(f"process {before['pid']}: {error.strerror}") from None
    came = _await_reload(url, before["reload"]["number"], timeout)
    if as_json:
        print_json(came)
    if came["problems"]:
        problems = "\n".join(f"  {problem}" for problem in came["problems"])
        raise CommandError(f"nothing was changed:\n{problems}")
    if not as_json:
        for change in came["changes"] or ["nothing has changed"]:
            out.print(change, markup=False)


def status_url(address: str) -> str:
    """Where the server with this `admin_listen` says how it is."""
    host, port = split_address(address)
    everywhere = host in {"0.0.0.0", "::"}  # noqa: S104 - read, not bound
    host = "127.0.0.1" if everywhere else host
    return f"http://[{host}]:{port}/status" if ":" in host else f"http://{host}:{port}/status"


def read_status(url: str, seconds: float = 10) -> dict[str, Any]:
    """What a running server says of itself; raises CommandError if there is none."""
    try:
        with urllib.request.urlopen(url, timeout=seconds) as response:  # noqa: S310 - made above
            found: dict[str, Any] = orjson.loads(response.read())
    except (urllib.error.URLError, OSError, orjson.JSONDecodeError) as error:
        reason = getattr(error, "reason", error)
        raise CommandError(f"{url}: {reason}: is the server running?") from None
    return found


def _await_reload(url: str, number: int, timeout: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        came: dict[str, Any] = read_status(url)["reload"]
        if came["number"] > number:
            return came
        time.sleep(_STEP_SECONDS)
    raise CommandError(f"the server did not reload within {timeout:g} s: look at its log")
