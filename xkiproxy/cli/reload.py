"""`xkiproxy reload`: a running server takes over what has changed in its files."""

from __future__ import annotations

import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
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
from xkiproxy.observability.logging import utf8

_STEP_SECONDS = 0.05


def reload(
    timeout: Annotated[float, typer.Option(help="Seconds to wait for it.", min=0.1)] = 30.0,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Let the running server take over changed key stores, credentials and certificates.

    All of it or nothing: if there is a mistake in a file, nothing changes, and it is named. No
    connection and no request is dropped. The same as SIGHUP, but it waits and says what came of it,
    and refuses a server that has another configuration.

    Example: xkiproxy reload --config /etc/xkiproxy/xkiproxy.toml
    """
    try:
        settings = load_config(config)
    except ConfigError as error:
        raise CommandError(f"nothing was changed: {error}") from None
    url = status_url(settings.server.admin_listen)
    before = read_status(url)
    _check_config(before, config, settings.server.admin_listen)
    _hang_up(before["pid"])
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
    if not isinstance(found, dict) or not {"pid", "reload"} <= found.keys():
        raise CommandError(f"{url}: this is no xkiproxy: does something else listen there?")
    return found


def resolved(config: Path) -> str:
    """A configuration as /status names it."""
    return utf8(str(config.resolve()))


def _check_config(status: dict[str, Any], config: Path, address: str) -> None:
    """Raise CommandError if the server that answers has another configuration.

    Two directories may name the same admin_listen: the server of one must not be taken for that of
    the other, which would go on with a credential that was revoked.
    """
    ours, its = resolved(config), status.get("config")
    if its is None:
        raise CommandError(
            f"nothing was changed: the server at {address} does not say which configuration it has:"
            " it is of an earlier version, restart it"
        )
    if its != ours:
        raise CommandError(
            f"nothing was changed: the server at {address} has another configuration\n"
            f"  the server: {its}\n"
            f"  this command: {ours}\n"
            "name the server's with --config, or give each server an admin_listen of its own"
        )


def _hang_up(pid: Any) -> None:
    """Send SIGHUP to the server; raises CommandError if the process is none that is ours."""
    if not _is_server(pid):
        raise CommandError(
            f"nothing was changed: process {pid} is no xkiproxy serve of this user here; run this"
            " as the server's user, and in its container if it has one"
        )
    try:
        os.kill(pid, signal.SIGHUP)
    except (PermissionError, ProcessLookupError) as error:
        raise CommandError(f"process {pid}: {error.strerror}") from None


def _is_server(pid: Any) -> bool:
    """Whether a process is a server that this user may signal.

    /status is not authenticated: whoever answers there could name any process, and SIGHUP ends most
    of them. systemd says by itself which process the server is; its unit hides it from /proc.
    """
    if type(pid) is not int or pid <= 0:
        return False
    if os.environ.get("MAINPID") == str(pid):
        return True
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    (owner,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("Uid:"))
    names_it = b"serve" in words and any(word.rpartition(b"/")[2] == b"xkiproxy" for word in words)
    return names_it and os.geteuid() in {0, owner}


def _await_reload(url: str, number: int, timeout: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        came: dict[str, Any] = read_status(url)["reload"]
        if came["number"] > number:
            return came
        time.sleep(_STEP_SECONDS)
    raise CommandError(f"the server did not reload within {timeout:g} s: look at its log")
