"""`xkiproxy check`."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from xkiproxy.cli.common import DEFAULT_CONFIG, ConfigOption, JsonOption, err, out, print_json
from xkiproxy.config import Config, ConfigError, Problem, load_config
from xkiproxy.config.secrets import SecretError
from xkiproxy.observability.logging import utf8

if TYPE_CHECKING:
    from xkiproxy.server.runtime import Runtime

_SOON_SECONDS = 7 * 86_400


def check(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Check the configuration and everything it points to; name every mistake by its place.

    It opens files, keys and key managers as `serve` would, and looks whether the key managers of a
    key store decrypt what the others encrypt. It changes nothing and may run beside a server.
    Remarks, which are no mistakes, tell of keys that will be destroyed within a week and of a
    catalog that has none of a key manager's keys.

    Example: xkiproxy check --config /etc/xkiproxy/xkiproxy.toml
    """
    problems = _problems(config)
    if as_json:
        print_json([{"where": p.where, "what": utf8(p.what)} for p in problems])
    if problems:
        raise ConfigError(config, problems)
    if not as_json:
        out.print(f"{config}: no problems", markup=False)


def _problems(path: Path) -> list[Problem]:
    try:
        settings = load_config(path)
    except ConfigError as error:
        return error.problems
    found = _check_audit(settings)
    try:
        asyncio.run(_open_all(settings))
    except ConfigError as error:
        found = error.problems + found
    return found


async def _open_all(settings: Config) -> None:
    # Only this command pays for these imports.
    from xkiproxy.keystores.agreement import disagreements  # noqa: PLC0415
    from xkiproxy.server.runtime import Runtime  # noqa: PLC0415
    from xkiproxy.server.sinks import unreachable  # noqa: PLC0415

    runtime = Runtime(settings.reach_all())
    try:
        await runtime.start()
        problems = [Problem("kmi", text) for text in await _kmi_problems(runtime)]
        for i, (store, tenant) in enumerate(zip(settings.keystore, runtime.tenants, strict=True)):
            form = store.ciphertext_format
            for why in await disagreements(tenant.store.kmis, runtime.catalog, form):
                problems.append(Problem(f"keystore[{i}].kmi", why))
        for i, why in await unreachable(settings.audit):
            problems.append(Problem(f"audit.sink[{i}]", why))
        problems += await asyncio.to_thread(_reach_collector, settings)
        for remark in await asyncio.to_thread(_remarks, runtime):
            err.print(f"remark: {remark}", markup=False)
    finally:
        await runtime.close()
    if problems:
        raise ConfigError(settings.path, problems)


async def _kmi_problems(runtime: Runtime) -> list[str]:
    """What is wrong with KMIs, also with those that serve: one address of several is away."""
    from xkiproxy.kmi.base import KmiState  # noqa: PLC0415

    failures = {kmi.name: await kmi.first_failures() for kmi in runtime.kmis.values()}
    problems = runtime.problems()
    for kmi in runtime.kmis.values():
        known = list(failures[kmi.name])
        if kmi.state is KmiState.DEGRADED and kmi.error not in known:
            known.append(kmi.error)
        disconnected = kmi.state is KmiState.DISCONNECTED
        problems += [
            f"kmi {kmi.name}, a lane: {text}"
            for text in known
            if not (disconnected and text == kmi.error)
        ]
    return problems


def _remarks(runtime: Runtime) -> list[str]:
    """What is no mistake, and what one would rather know before it is too late."""
    from xkiproxy.keystores import lifecycle  # noqa: PLC0415

    now = time.time()
    soon = lifecycle.due_entries(runtime.catalog, now + _SOON_SECONDS)
    return [lifecycle.announcement(entry, now) for entry in soon] + _lost_entries(runtime)


def _lost_entries(runtime: Runtime) -> list[str]:
    from xkiproxy.keystores.lifecycle import lost_entries  # noqa: PLC0415
    from xkiproxy.kmi.base import KeyManagerError, KmiState  # noqa: PLC0415
    from xkiproxy.kmi.registry import open_key_manager  # noqa: PLC0415

    found = []
    for kmi in runtime.config.kmi:
        # One that is away has a problem already; a PIN that was refused is not tried again.
        if runtime.kmis[kmi.name].state is not KmiState.CONNECTED:
            continue
        # What serves may lack the right to list keys: then nothing is said.
        with suppress(KeyManagerError, SecretError), closing(open_key_manager(kmi)) as manager:
            catalog, path = runtime.catalog, runtime.config.catalog.path
            found.append(lost_entries(catalog, manager, kmi.name, path))
    return [text for text in found if text]


def _reach_collector(settings: Config) -> list[Problem]:
    from xkiproxy.observability.tracing import TracingError, reach  # noqa: PLC0415
    from xkiproxy.server.runtime import tracing_options  # noqa: PLC0415

    try:
        if settings.tracing is not None:
            reach(tracing_options(settings.tracing))
    except TracingError as error:
        return [Problem("tracing.endpoint", str(error))]
    return []


def _check_audit(settings: Config) -> list[Problem]:
    path = settings.audit.path
    # The folder too: files that are closed get another name, and one beside them.
    places = [path.parent, path] if path.exists() else [path.parent]
    if all(os.access(place, os.W_OK) for place in places) and not path.is_dir():
        return []
    return [Problem("audit.path", f"{path}: cannot be written by this user")]
