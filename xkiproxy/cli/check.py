"""`xkiproxy check`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from cryptography.x509.oid import NameOID

from xkiproxy.cli.common import (
    DEFAULT_CONFIG,
    ConfigOption,
    JsonOption,
    err,
    out,
    print_failure,
    print_json,
)
from xkiproxy.config import Config, ConfigError, Problem, load_config
from xkiproxy.config.models import GoogleSettings, is_loopback, split_address
from xkiproxy.config.secrets import SecretError
from xkiproxy.config.tls import TlsError, parse_certificate, read_pem
from xkiproxy.keystores.credentials import CredentialError, load_credentials
from xkiproxy.observability.logging import utf8
from xkiproxy.protocols.ekm.messages import AccessReason
from xkiproxy.protocols.registry import CONSOLES

if TYPE_CHECKING:
    from xkiproxy.server.runtime import Runtime

_SOON_DAYS = 30
"""When the alert on the date of a certificate begins too."""
_OLD_KEYS_DAYS = 7
_EKM_AGENT = "@gcp-sa-ekms.iam.gserviceaccount.com"
_USUAL_REASONS = frozenset({
    AccessReason.CUSTOMER_INITIATED_ACCESS.name,
    AccessReason.GOOGLE_INITIATED_SYSTEM_OPERATION.name,
})  # fmt: skip
"""The use of a key, and Google's checks of its health (docs/protocols/ekm.md)."""
_DELETION_SOON_SECONDS = 7 * 86_400


def check(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Check the configuration and everything it points to; name every mistake by its place.

    It opens files, keys and key managers as `serve` would, and looks whether the key managers of a
    key store decrypt what the others encrypt. It changes nothing and may run beside a server.
    Remarks, on what works and may not be meant, come last, on standard error; the exit status and
    --json are of the problems alone.

    Example: xkiproxy check --config /etc/xkiproxy/xkiproxy.toml
    """
    problems, remarks = _look(config)
    if as_json:
        print_json([{"where": p.where, "what": utf8(p.what)} for p in problems])
    if problems:
        print_failure(ConfigError(config, problems))
    elif not as_json:
        out.print(f"{config}: no problems", markup=False)
    for text in remarks:
        err.print(f"remark: {text}", markup=False)
    if problems:
        raise typer.Exit(1)


def _look(path: Path) -> tuple[list[Problem], list[str]]:
    """What is wrong, and what is worth saying although it is no mistake."""
    try:
        settings = load_config(path)
    except ConfigError as error:
        return error.problems, []
    remarks = [text for remark in _REMARKS for text in remark(settings)]
    found = _check_audit(settings)
    try:
        asyncio.run(_open_all(settings, remarks))
    except ConfigError as error:
        found = error.problems + found
    return found, remarks


def _shared_kmis(settings: Config) -> Iterator[str]:
    for store in settings.keystore:
        others = [
            other.name
            for other in settings.keystore
            if other is not store and set(other.kmi) & set(store.kmi)
        ]
        if others and store.keys is None and store.policies is None:
            yield (
                f"key store {store.name} shares a KMI with {', '.join(others)} and has neither"
                " keys nor policies: whoever has its credentials may use all keys there"
            )


def _certificate(settings: Config) -> Iterator[str]:
    if settings.server.tls is None:
        return
    file = settings.server.tls.certificate
    try:
        certificate = parse_certificate(read_pem(file))
    except TlsError:
        return
    days = (certificate.not_valid_after_utc - datetime.now(UTC)).days
    if 0 <= days < _SOON_DAYS:
        yield f"{file}: expires within {days + 1} days: renew it"
    consoles = [(s.name, CONSOLES[s.protocol]) for s in settings.keystore if s.credentials]
    wary = [name for name, console in consoles if not console.pins_certificate]
    if not wary:
        return
    if certificate.issuer == certificate.subject:
        yield (
            f"{file}: is self-issued, and the cloud of {', '.join(wary)} connects only to the"
            " certificate of a public authority; unless something in front ends its TLS, get one"
        )
    if not certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        yield (
            f"{file}: its subject has no common name, and the cloud of {', '.join(wary)} wants"
            " one that matches the host of the proxy"
        )


def _credentials(settings: Config) -> Iterator[str]:
    for store in settings.keystore:
        if store.credentials is None:
            continue
        try:
            credentials = load_credentials(store.credentials)
        except (CredentialError, SecretError):
            continue
        for credential in credentials:
            pair = credential.access_key_id, credential.access_key_secret
            if why := CONSOLES[store.protocol].mistrusted(pair):
                yield f"key store {store.name}, credential {credential.access_key_id}: {why}"


def _google(settings: Config) -> Iterator[str]:
    for store in settings.keystore:
        if store.google is not None:
            for text in _google_of(store.google):
                yield f"key store {store.name}: {text}"


def _google_of(google: GoogleSettings) -> Iterator[str]:
    named = set(google.allowed_reasons or ())
    for reason in sorted(named - set(AccessReason.__members__)):
        yield f"{reason} is no reason that is known; is it a mistake?"
    if named and (missing := sorted(_USUAL_REASONS - named)):
        yield (
            f"allowed_reasons lacks {', '.join(missing)}: without it a key is of little use, and"
            " Google may disable its version at a refusal"
        )
    for account in google.service_accounts:
        if not account.endswith(_EKM_AGENT):
            yield f"{account} is no service agent of Cloud EKM"
    if google.keys is not None and google.keys.exists():
        days = (time.time() - google.keys.stat().st_mtime) / 86_400
        if days > _OLD_KEYS_DAYS:
            yield f"{google.keys} is {days:.0f} days old: Google has changed its keys since"


def _admin_listener(settings: Config) -> Iterator[str]:
    address = settings.server.admin_listen
    if not is_loopback(split_address(address)[0]):
        yield f"server.admin_listen: {address} has no authentication: let only your own reach it"


_REMARKS: tuple[Callable[[Config], Iterator[str]], ...] = (
    _shared_kmis,
    _certificate,
    _credentials,
    _google,
    _admin_listener,
)
"""Each says what it finds, a text each, and nothing where it cannot look: that is a problem."""


async def _open_all(settings: Config, remarks: list[str]) -> None:
    # Only this command pays for these imports.
    from xkiproxy.keystores.agreement import disagreements  # noqa: PLC0415
    from xkiproxy.server.runtime import Runtime  # noqa: PLC0415
    from xkiproxy.server.sinks import unreachable  # noqa: PLC0415

    runtime = Runtime(settings.reach_all())
    try:
        await runtime.start()
        problems = [Problem("kmi", text) for text in await _kmi_problems(runtime)]
        sources = runtime.token_sources()
        for i, store in enumerate(settings.keystore):
            if store.name in sources and (error := sources[store.name].error):
                problems.append(Problem(f"keystore[{i}].google", error))
        if runtime.untimely:
            problems.append(Problem("server.tls", runtime.untimely))
        for i, (store, tenant) in enumerate(zip(settings.keystore, runtime.tenants, strict=True)):
            form, held = store.ciphertext_format, tenant.store
            for why in await disagreements(held.kmis, runtime.catalog, form, held.keys):
                problems.append(Problem(f"keystore[{i}].kmi", why))
        for i, why in await unreachable(settings.audit):
            problems.append(Problem(f"audit.sink[{i}]", why))
        problems += await asyncio.to_thread(_reach_collector, settings)
        remarks += await asyncio.to_thread(_keys, runtime)
    finally:
        await runtime.close()
    if problems:
        raise ConfigError(settings.path, problems)


async def _kmi_problems(runtime: Runtime) -> list[str]:
    """What is wrong with KMIs, also with those that serve: one address of several is away."""
    from xkiproxy.kmi.base import KmiState  # noqa: PLC0415

    failures = {kmi.name: await kmi.first_failures() for kmi in runtime.kmis.values()}
    problems = runtime.kmi_problems()
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


def _keys(runtime: Runtime) -> list[str]:
    """What one would rather know of keys before it is too late."""
    from xkiproxy.keystores import lifecycle  # noqa: PLC0415

    now = time.time()
    soon = lifecycle.due_entries(runtime.catalog, now + _DELETION_SOON_SECONDS)
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
