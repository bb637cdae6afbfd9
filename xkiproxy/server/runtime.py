"""The parts of a running proxy, built from the configuration, and what keeps them fresh."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from xkiproxy import __version__
from xkiproxy.config import Config, ConfigError, Problem
from xkiproxy.config.models import (
    AuditSettings,
    KeystoreSettings,
    SoftwareSettings,
    SyslogSettings,
    TracingSettings,
)
from xkiproxy.config.secrets import SecretError
from xkiproxy.config.tls import TlsError, client_context, parse_certificate, untimely
from xkiproxy.crypto.operations import Fault, OperationError
from xkiproxy.keystores.authorization import Authorizer
from xkiproxy.keystores.catalog import CatalogEntry, CatalogError
from xkiproxy.keystores.credentials import CredentialError, parse_credentials
from xkiproxy.keystores.encryptions import (
    Counts,
    Encryptions,
    EncryptionsError,
    encryptions_path,
    most_used,
)
from xkiproxy.keystores.failover import Failover
from xkiproxy.keystores.key_patterns import KeyPatterns
from xkiproxy.keystores.keystore import KeyStore
from xkiproxy.keystores.last_use import LastUse, last_use_path
from xkiproxy.keystores.lifecycle import (
    announcement,
    disable_twins,
    due_entries,
    expected_destruction,
    is_to_be_destroyed,
    lost_entries,
    pending_entries,
    purge_due,
    watch_due,
)
from xkiproxy.keystores.policies import PolicyError, parse_policies
from xkiproxy.keystores.quotas import Quota, Quotas, QuotaTable
from xkiproxy.keystores.replay import Replay, ReplayWindow
from xkiproxy.keystores.shared_replay import SharedReplayWindow
from xkiproxy.keystores.signing_keys import CachedSigningKeys
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog
from xkiproxy.kmi.base import BreakReason, KeyManagerError, KmiState
from xkiproxy.kmi.contract import Kmi
from xkiproxy.kmi.registry import open_key_manager, open_kmi
from xkiproxy.observability.audit import AuditError, AuditOptions, Sink, SinkState, encode
from xkiproxy.observability.logging import utf8
from xkiproxy.observability.metrics import FailoverMetrics, Metrics
from xkiproxy.observability.series import Distribution
from xkiproxy.observability.tracing import Tracer, TracingError, TracingOptions, open_tracer
from xkiproxy.protocols.base import REASONS
from xkiproxy.protocols.ekm.tokens import KeySetError, PublicKeys, parse_keys
from xkiproxy.protocols.registry import PROTOCOLS
from xkiproxy.server.condition import Condition
from xkiproxy.server.contents import Contents, ContentsError, StoreFiles, read_contents
from xkiproxy.server.gateway import Tenant
from xkiproxy.server.key_changes import KeyChanges
from xkiproxy.server.networks import Networks
from xkiproxy.server.reload import (
    Change,
    History,
    config_path,
    describe,
    fixed_differences,
)
from xkiproxy.server.strangers import Strangers
from xkiproxy.server.tls import server_context
from xkiproxy.server.token_keys import FetchedKeys, refresh_all

_log = logging.getLogger(__name__)
_Part = TypeVar("_Part")

_REFRESH_SECONDS = 0.25
_AUDIT_SECONDS = 1.0
_CHECK_SECONDS = 30.0
_COUNTS_SECONDS = 60.0
_TOKEN_KEYS_SECONDS = 1.0
"""So often it is asked whether keys for tokens are to be fetched."""
_PURGE_SECONDS = 60.0
_PATIENCE_SECONDS = 1.0
"""So often a start looks whether it has to wait for those KMIs that still hang."""
_LONGEST_WAIT_SECONDS = 5.0
"""After this it waits for none as long as one key store can be served."""

STOPPING = "it is being stopped"

_PARTS = ("audit", "catalog")
"""Without which nothing is served."""

_OURS = (Fault.UNAVAILABLE, Fault.DEADLINE_EXCEEDED, Fault.INTERNAL)
"""What counts against the objective of availability."""

_MISTAKES = (
    CatalogError, ContentsError, CredentialError, EncryptionsError, KeyManagerError, KeySetError,
    OperationError, OSError, PolicyError, SecretError, TlsError, TracingError,
)  # fmt: skip


class Tables(NamedTuple):
    """Descriptors of what worker processes share: the replay window, quotas."""

    replay: int
    quotas: int


class Runtime:
    """Everything that serves requests, but for the sockets and the audit log's file."""

    def __init__(
        self,
        config: Config,
        tables: Tables | None = None,
        contents: Contents | None = None,
    ) -> None:
        """Open all parts; raises ConfigError with every problem that was found.

        `tables` is what worker processes share, `contents` what one process has read for all.
        """
        self.config = config
        self.metrics = Metrics()
        self.condition = Condition()
        for part in _PARTS:
            is_failing = partial(self.condition.reasons.__contains__, part)
            self.metrics.refusing.labels(part).set_function(is_failing)
        self.history = History()
        self.strangers = Strangers(config.audit.refusals_per_second)
        self.started = datetime.now(UTC)
        self.stopping = False
        self._tables = tables
        self._last_use = LastUse(last_use_path(config.catalog.path))
        self._quota_table = QuotaTable(tables.quotas if tables else None)
        self._revision = 0
        self._announced: set[CatalogEntry] = set()
        self._first_check: asyncio.Future[None] | None = None
        self._sinks: dict[str, SinkState] = {}
        opening = _Opening(config)
        self.audit_options = opening.open("audit.hmac_key", lambda: _audit_options(config.audit))
        for i, sink in enumerate(config.audit.sink):
            if isinstance(sink, SyslogSettings) and sink.tls is not None:
                opening.open(f"audit.sink[{i}].tls", partial(client_context, sink.tls))
        self.tracer = opening.open("tracing", lambda: _tracer(config.tracing))
        self.catalog = opening.open("catalog.path", lambda: SqliteCatalog(config.catalog.path))
        self.encryptions = opening.open(
            "catalog.path", lambda: Encryptions(encryptions_path(config.catalog.path))
        )
        self.kmis = {
            kmi.name: opening.open(f"kmi[{i}]", partial(open_kmi, kmi, self.metrics))
            for i, kmi in enumerate(config.kmi)
        }
        self.tenants: list[Tenant] = []
        self._sources: list[FetchedKeys] = []
        self.certificate = ""
        self.untimely = ""
        """Why the certificate was not valid when it was opened; empty if it was."""
        self.context: ssl.SSLContext | None = None
        self.apply(self._open_changeable(config, contents or read_contents(config), opening))
        for kmi in self.kmis.values():
            _show_kmi(self.metrics, kmi)

    def _open_changeable(self, config: Config, contents: Contents, opening: _Opening) -> Change:
        """What a reload may exchange; raises ConfigError, also with what was found before."""
        context = opening.open("server.tls", lambda: _tls_context(config, contents))
        certificate = opening.open("server.tls", lambda: _certificate(config, contents))
        tenants = [
            opening.open(f"keystore[{i}]", partial(self._open_tenant, settings, contents))
            for i, settings in enumerate(config.keystore)
        ]
        fingerprint, expiry = _fingerprint(certificate), _expiry(certificate)
        why = _untimely(certificate, contents)
        if why and self.certificate not in {"", fingerprint}:
            # In place of another: one that is served already must not keep a reload from the rest.
            opening.problems.append(Problem("server.tls", why))
        opening.finish()
        return Change(config, tenants, context, fingerprint, expiry, why, [])

    def prepare(self, config: Config, contents: Contents) -> Change:
        """Open what a configuration may change; raises ConfigError."""
        opening = _Opening(config)
        opening.problems.extend(fixed_differences(self.config, config))
        change = self._open_changeable(config, contents, opening)
        change.described.extend(describe(self.config, self.tenants, self.certificate, change))
        return change

    def apply(self, change: Change) -> None:
        """Take over what `prepare` has opened; nothing is read here, so that nothing can fail."""
        self.config = change.config
        self.tenants = change.tenants
        self._sources = list(set(self.token_sources().values()))
        self.context = change.context
        self.certificate = change.certificate
        self.untimely = change.untimely
        self.metrics.credential_created.clear()
        for tenant in change.tenants:
            _count_from_zero(self.metrics, tenant)
            if tenant.store.signing_keys.oldest is not None:
                created = self.metrics.credential_created.labels(tenant.store.name)
                created.set(tenant.store.signing_keys.oldest)
        if change.expiry is not None:
            self.metrics.certificate_expiry.labels("public").set(change.expiry)
        self._show_deletions()

    def _open_tenant(self, settings: KeystoreSettings, contents: Contents) -> Tenant:
        files = contents.of_store(settings.name)
        credentials = (
            []
            if files.credentials is None
            else parse_credentials(files.credentials, str(settings.credentials))
        )
        token_keys = self._token_keys(settings, files)
        store = KeyStore(
            settings.name,
            self.catalog,
            # One that is not there has been named as a problem.
            [self.kmis[name] for name in settings.kmi if name in self.kmis],
            CachedSigningKeys(credentials),
            self._replay(settings.name),
            deadline=settings.deadline_ms / 1000,
            authorizer=_authorizer(settings.name, files),
            quotas=self._quotas(settings),
            failover=self._failover(settings),
            encryptions=self.encryptions,
            keys=None if settings.keys is None else KeyPatterns(settings.keys),
            disabled=KeyPatterns(settings.disabled_keys) if settings.disabled_keys else None,
        )
        protocol = PROTOCOLS[settings.protocol](settings, token_keys)
        networks = settings.source_networks
        return Tenant(
            settings.path_prefix,
            protocol,
            store,
            None if networks is None else Networks(networks),
            self._last_use.of(settings.name),
            token_keys if settings.google is not None else None,
        )

    def _token_keys(self, settings: KeystoreSettings, files: StoreFiles) -> PublicKeys:
        """What verifies the tokens of a key store; empty if it has none."""
        google = settings.google
        if google is None:
            return {}
        if files.token_keys is not None:
            return parse_keys(files.token_keys, str(google.keys))
        # One for all key stores of an origin, also over reloads.
        for source in self._sources:
            if source.origin == (google.keys_url, google.tls):
                return source
        self._sources.append(made := FetchedKeys(google.keys_url, google.tls))
        return made

    def token_sources(self) -> dict[str, FetchedKeys]:
        """The keys for tokens that are fetched, by the names of their key stores."""
        return _fetched(self.tenants)

    async def fetch_token_keys(self, change: Change) -> None:
        """Fetch what a change brings; raises ConfigError where that comes to nothing."""
        known = set(self.token_sources().values())
        new = {name: s for name, s in _fetched(change.tenants).items() if s not in known}
        await refresh_all(new.values())
        problems = [
            Problem(f"keystore[{index}].google", new[store.name].error)
            for index, store in enumerate(change.config.keystore)
            if store.name in new and not len(new[store.name])
        ]
        if problems:
            self._sources = list(known)  # the next try begins anew
            raise ConfigError(change.config.path, problems)

    async def _refresh_token_keys(self) -> None:
        await refresh_all(self.token_sources().values())

    def _replay(self, keystore: str) -> Replay:
        """The replay window of a key store: the one that it has already, if it has one."""
        for tenant in self.tenants:
            if tenant.store.name == keystore:
                return tenant.store.replay
        if self._tables is None:
            return ReplayWindow(self.config.server.replay_capacity)
        return SharedReplayWindow(self._tables.replay, keystore)

    def _quotas(self, settings: KeystoreSettings) -> Quotas | None:
        found = {
            name: Quota(rate.rate, rate.burst or max(1, int(rate.rate)))
            for name, rate in settings.quota
            if rate is not None
        }
        return Quotas(settings.name, found, self._quota_table) if found else None

    def _failover(self, settings: KeystoreSettings) -> Failover | None:
        if len(settings.kmi) == 1:
            return None
        after = settings.hedge_after_ms
        counts = FailoverMetrics(self.metrics, settings.name)
        return Failover(counts, None if after is None else after / 1000)

    async def close(self) -> None:
        """Close what was opened."""
        if self._first_check is not None:
            self._first_check.cancel()
            await asyncio.gather(self._first_check, return_exceptions=True)
        self._write_last_use()
        self._add_encryptions(self.encryptions.take())
        self.encryptions.close()
        for kmi in self.kmis.values():
            await kmi.close()
        self.catalog.close()
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)

    async def start(self) -> None:
        """Start the KMIs and check them once; not to the end if a key store can be served before.

        A KMI that hangs must not keep the key stores of others closed: those that nobody needs are
        not waited for, and those that a key store has no other than not for long.
        """
        for kmi in self.kmis.values():
            kmi.start()
        self._add_encryptions({})
        await self._refresh_token_keys()
        self._first_check = asyncio.ensure_future(self.check_kmis())
        late = time.monotonic() + _LONGEST_WAIT_SECONDS
        while not self._first_check.done():
            await asyncio.wait({self._first_check}, timeout=_PATIENCE_SECONDS)
            served = [_has_checked_kmi(tenant.store) for tenant in self.tenants]
            if all(served) or (any(served) and time.monotonic() >= late):
                return
        await self._first_check

    async def check_kmis(self) -> None:
        """A deep check of every KMI."""
        await asyncio.gather(*(kmi.check() for kmi in self.kmis.values()))

    async def keep_fresh(self, audit: Sink, *, purges: bool) -> None:
        """Housekeeping, until cancelled; `purges`: keys whose time has come are destroyed here."""
        work = [
            _watch_event_loop(self.metrics.event_loop_lag.labels()),
            _every(_REFRESH_SECONDS, self._refresh),
            _every(_AUDIT_SECONDS, partial(self._check_audit, audit)),
            # Each by itself: one that is slow must not let what is known of the others grow old.
            *(_every(_CHECK_SECONDS, kmi.check) for kmi in self.kmis.values()),
            _every(_TOKEN_KEYS_SECONDS, self._refresh_token_keys),
            _every(_COUNTS_SECONDS, lambda: asyncio.to_thread(self._write_last_use)),
            _every(_COUNTS_SECONDS, self._write_encryptions),
        ]
        if purges:  # one process of several does what is to be done once
            changes = KeyChanges(self.catalog)
            work.append(_every(_AUDIT_SECONDS, partial(_write_changes, changes, audit)))
            work.append(_every(_PURGE_SECONDS, self._purge))
            work.append(asyncio.to_thread(_look_for_lost_entries, self.config))
        await asyncio.gather(*work)

    async def _refresh(self) -> None:
        """Take over what the command line changed: a change of state holds within a second."""
        try:
            self.catalog.refresh()
        except CatalogError as error:
            # A key may have been disabled meanwhile: nothing may be served on an old state.
            self.condition.fail("catalog", str(error))
        else:
            self.condition.recover("catalog")
        changed = self.catalog.revision != self._revision
        self._revision = self.catalog.revision
        if changed:
            self._show_deletions()
        for kmi in self.kmis.values():
            kmi.refresh(changed)

    def _show_deletions(self) -> None:
        """Show which keys await deletion: every process does, so that it holds whichever ends."""
        now, pending = time.time(), pending_entries(self.catalog)
        self.metrics.keys_pending_deletion.clear()
        self.metrics.key_destruction.clear()
        stores = [tenant.store for tenant in self.tenants]
        # What no key store may use is destroyed all the same.
        nobodys = [entry for entry in pending if not any(s.may_use(entry) for s in stores)]
        by_store = {s.name: [entry for entry in pending if s.may_use(entry)] for s in stores}
        for name, found in {**by_store, "": nobodys}.items():
            # A key at several KMIs is one key, though each of them destroys its own.
            count = len({entry.key_id for entry in found})
            self.metrics.keys_pending_deletion.labels(name).set(count)
            if found:
                first = min(expected_destruction(entry, now) for entry in found)
                self.metrics.key_destruction.labels(name).set(first)

    async def _check_audit(self, audit: Sink) -> None:
        self.check_audit(audit)

    def check_audit(self, audit: Sink) -> None:
        """See after the audit log, and show how it is with its sinks."""
        try:
            audit.check()
        except AuditError as error:
            self.condition.fail("audit", str(error))
        else:
            self.condition.recover("audit")
            self.write_strangers(audit)
        for state in audit.states():
            self._note_sink(state)

    def write_strangers(self, audit: Sink) -> None:
        """Tell the audit log of the refusals that have no record of their own."""
        summary = self.strangers.summary()
        if summary is None:
            return
        with suppress(AuditError):  # the next check meets the same error; nothing is forgotten
            audit.append([encode(summary)])
            self.strangers.forget()

    def _note_sink(self, state: SinkState) -> None:
        before = self._sinks.get(state.name)
        self._sinks[state.name] = state
        self.metrics.audit_sink_up.labels(state.name).set(state.is_up)
        if not state.is_up and (before is None or before.is_up):
            _log.error("the audit sink %s takes no records: %s", state.name, state.error)
        elif state.is_up and before is not None and not before.is_up:
            _log.warning("the audit sink %s takes records again", state.name)

    def _write_last_use(self) -> None:
        try:
            self._last_use.write()
        except OSError as error:
            # For people only: nothing depends on it.
            _log.warning("when credentials were used last cannot be written: %s", error)

    async def _write_encryptions(self) -> None:
        taken = self.encryptions.take()
        if not await asyncio.to_thread(self._add_encryptions, taken):
            self.encryptions.give_back(taken)

    def _add_encryptions(self, counts: Counts) -> bool:
        """Add to the file what was counted, and show what is in it now; whether that succeeded."""
        try:
            self.encryptions.add(counts)
            found = most_used(self.encryptions.read(), self.catalog.entries())
        except EncryptionsError as error:
            _log.warning("encryptions cannot be counted: %s", error)
            return False
        for kmi, most in found.items():
            self.metrics.key_encryptions.labels(kmi).set(most)
        return True

    async def _purge(self) -> None:
        now = time.time()
        if not due_entries(self.catalog, now):
            return
        due = await asyncio.to_thread(_watch_due, self.config, now)
        self._announce(due, now)
        if kmis := {entry.kmi for entry in due if is_to_be_destroyed(entry, now)}:
            await asyncio.to_thread(_purge_due, self.config, self.encryptions, kmis, now)

    def _announce(self, due: list[CatalogEntry], now: float) -> None:
        """Say once in each run which keys will be destroyed, while that can be prevented."""
        found = {replace(entry, watched_until=None) for entry in due}
        for entry in found - self._announced:
            _log.error("the date of a deletion has come: %s", announcement(entry, now))
        self._announced = found

    def problems(self) -> list[str]:
        """What is wrong, whether or not the proxy can serve."""
        return self.kmi_problems() + self._unfetched()

    def kmi_problems(self) -> list[str]:
        """Those of them that are not about a key store."""
        return self._refusals() + self._missing()

    def obstacles(self) -> list[str]:
        """Why the proxy is not ready; empty when it is.

        It is ready while it can serve one key store: who asks is a load balancer, and a KMI that
        is away must not take the key stores of others with it, nor one that has another KMI.
        """
        if self.stopping:
            return [STOPPING]
        missing = [] if self._can_serve_any() else self._missing() + self._unfetched()
        return self._refusals() or missing

    def _refusals(self) -> list[str]:
        return [f"{part}: {reason}" for part, reason in self.condition.reasons.items()]

    def _missing(self) -> list[str]:
        return [
            f"kmi {kmi.name} is disconnected: {kmi.error}"
            for kmi in self.kmis.values()
            if kmi.state is KmiState.DISCONNECTED
        ]

    def _unfetched(self) -> list[str]:
        """What is wrong with keys for tokens, also where those that are known go on."""
        return [
            f"key store {name}: keys for tokens cannot be fetched: {source.error}"
            for name, source in self.token_sources().items()
            if source.error
        ]

    def _can_serve_any(self) -> bool:
        open_to_all = [t for t in self.tenants if t.token_keys is None or len(t.token_keys)]
        kmis = [kmi for tenant in open_to_all for kmi in tenant.store.kmis]
        return any(kmi.state is not KmiState.DISCONNECTED for kmi in kmis)

    def status(self) -> dict[str, Any]:
        """What /status shows: no secret, nothing of a request."""
        now = time.monotonic()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "config": config_path(self.config.path),
            "started": self.started.isoformat(timespec="seconds"),
            "ready": not self.obstacles(),
            "problems": self.problems(),
            "reload": self.history.status(),
            "audit": {
                "required": self.config.audit.required,
                "sinks": [
                    {"name": state.name, "up": state.is_up, "error": utf8(state.error)}
                    for state in self._sinks.values()
                ],
            },
            "keystores": [_store_status(tenant) for tenant in self.tenants],
            "kmis": [_kmi_status(kmi, now) for kmi in self.kmis.values()],
        }


class _Opening:
    """Opens parts and collects what is wrong with them, so that one run finds all mistakes."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.problems: list[Problem] = []

    def open(self, where: str, open_part: Callable[[], _Part]) -> _Part:
        """Open a part; a mistake is noted."""
        try:
            return open_part()
        except _MISTAKES as error:
            problem = Problem(where, str(error))
            if problem not in self.problems:
                self.problems.append(problem)
            return None  # type: ignore[return-value] # nothing is used once there are problems

    def finish(self) -> None:
        """Raise ConfigError if there was a mistake."""
        if self.problems:
            raise ConfigError(self._config.path, self.problems)


def _authorizer(name: str, files: StoreFiles) -> Authorizer | None:
    return None if files.policies is None else Authorizer(name, parse_policies(files.policies))


def _tls_context(config: Config, contents: Contents) -> ssl.SSLContext | None:
    tls = config.server.tls
    return None if tls is None else server_context(tls, contents.of_tls())


def _certificate(config: Config, contents: Contents) -> x509.Certificate | None:
    tls = config.server.tls
    return None if tls is None else parse_certificate(contents.of_tls().certificate)


def _fingerprint(certificate: x509.Certificate | None) -> str:
    return "" if certificate is None else f"sha256-{certificate.fingerprint(hashes.SHA256()).hex()}"


def _untimely(certificate: x509.Certificate | None, contents: Contents) -> str:
    if certificate is None:
        return ""
    why = untimely(certificate, datetime.now(UTC))
    return why and f"{contents.of_tls().certificate.path}: {why}"


def _expiry(certificate: x509.Certificate | None) -> float | None:
    return None if certificate is None else certificate.not_valid_after_utc.timestamp()


def _audit_options(settings: AuditSettings) -> AuditOptions:
    return AuditOptions(
        max_bytes=settings.max_bytes,
        max_age=timedelta(hours=settings.max_age_hours),
        fsync=settings.fsync,
        hmac_key=None if settings.hmac_key is None else settings.hmac_key.read_key(),
    )


def tracing_options(settings: TracingSettings) -> TracingOptions:
    """Where traces go; raises TlsError or SecretError."""
    tls = settings.tls
    client_context(tls)  # names what is wrong with the files
    key = tls.private_key
    return TracingOptions(
        settings.endpoint,
        settings.sample_ratio,
        service_name=settings.service_name,
        timeout_seconds=settings.timeout_seconds,
        headers={name: value.read() for name, value in settings.headers.items()},
        ca=tls.ca,
        certificate=tls.certificate,
        private_key=None if key is None else key.path(),
    )


def _tracer(settings: TracingSettings | None) -> Tracer | None:
    return None if settings is None else open_tracer(tracing_options(settings))


def _store_status(tenant: Tenant) -> dict[str, Any]:
    return {
        "name": tenant.store.name,
        "protocol": tenant.protocol.name,
        "path": tenant.base,
        "availability": tenant.store.health().availability.value,
        "kmis": [kmi.name for kmi in tenant.store.kmis],
        "credentials": [
            {"access_key_id": name, "created": created}
            for name, created in tenant.store.signing_keys.created.items()
        ],
    }


def _kmi_status(kmi: Kmi, now: float) -> dict[str, Any]:
    last = kmi.last_error
    return {
        "name": kmi.name,
        "type": kmi.type,
        "state": kmi.state.value,
        "error": kmi.error,
        "last_error": None
        if last is None
        else {"error": last.error, "time": last.time.isoformat(timespec="seconds")},
        "lanes": [state.value for state in kmi.lanes],
        "checked_seconds_ago": round(max(0.0, now - kmi.checked), 1) if kmi.checked > 0 else None,
    }


def _fetched(tenants: Iterable[Tenant]) -> dict[str, FetchedKeys]:
    return {
        tenant.store.name: tenant.token_keys
        for tenant in tenants
        if isinstance(tenant.token_keys, FetchedKeys)
    }


def _count_from_zero(metrics: Metrics, tenant: Tenant) -> None:
    """Make the counters of what goes wrong: a first value that is no change is seen by no alert."""
    store, protocol = tenant.store.name, tenant.protocol
    for reason in REASONS:
        metrics.auth_failures.labels(store, reason)
    metrics.shed.labels(store, "overload")
    for fault in _OURS:
        code = protocol.refuse(OperationError(fault, "")).code
        for call in protocol.calls | protocol.key_calls | protocol.key_methods:
            metrics.requests.labels(store, protocol.name, call, code)


def _show_kmi(metrics: Metrics, kmi: Kmi) -> None:
    """The counters of its lanes from 0 on, as above; and how failover stands to it."""
    for reason in BreakReason:
        metrics.kmi_lane_restarts.labels(kmi.name, reason.value)
    metrics.kmi_left_alone.labels(kmi.name).set_function(lambda: not kmi.standing.is_good)


async def _write_changes(changes: KeyChanges, audit: Sink) -> None:
    records = [encode(record) for record in changes.records()]
    if records:
        with suppress(AuditError):  # the next round finds the same changes
            audit.append(records)
            changes.forget()


def _look_for_lost_entries(config: Config) -> None:
    """Say if the catalog has none of the keys of a keyring; other KMIs are not asked at a start."""
    try:
        with closing(SqliteCatalog(config.catalog.path)) as catalog:
            for kmi in config.kmi:
                if isinstance(kmi, SoftwareSettings):
                    with closing(open_key_manager(kmi)) as manager:
                        lost = lost_entries(catalog, manager, kmi.name, config.catalog.path)
                    if lost:
                        _log.warning("%s", lost)
    except (CatalogError, KeyManagerError, SecretError) as error:
        # For people only: what serves has met the same, and says so.
        _log.warning("whether the catalog was lost is not known: %s", error)


def _has_checked_kmi(store: KeyStore) -> bool:
    return any(k.checked > 0 and k.state is not KmiState.DISCONNECTED for k in store.kmis)


def _watch_due(config: Config, now: float) -> list[CatalogEntry]:
    """In a thread, with a connection of its own: it waits for the disk."""
    with closing(SqliteCatalog(config.catalog.path)) as catalog:
        due = watch_due(catalog, now)
        for entry in disable_twins(catalog, due, [store.kmi for store in config.keystore]):
            _log.error(
                "key %s of KMI %s is disabled: at another KMI of its key store it is due to be"
                " destroyed, and this one would serve in its place", entry.key_id, entry.kmi,
            )  # fmt: skip
        return due


def _purge_due(config: Config, encryptions: Encryptions, kmis: set[str], now: float) -> None:
    """Destroy the keys whose time has come; in a thread, with connections of its own."""
    catalog = SqliteCatalog(config.catalog.path)
    managers = {kmi.name: open_key_manager(kmi) for kmi in config.kmi if kmi.name in kmis}
    try:
        for entry in purge_due(catalog, managers, now):
            _log.warning("key %s of KMI %s was destroyed as scheduled", entry.key_id, entry.kmi)
            encryptions.forget(entry.kmi, entry.key_id)
    finally:
        for manager in managers.values():
            manager.close()
        catalog.close()


async def _watch_event_loop(lag: Distribution) -> None:
    """Measure how late the event loop is: what every request waits for, whatever it is."""
    while True:
        due = time.monotonic() + _REFRESH_SECONDS
        await asyncio.sleep(_REFRESH_SECONDS)
        lag.observe(max(0.0, time.monotonic() - due))


async def _every(seconds: float, work: Callable[[], Any]) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Exception:
            # Housekeeping must outlive a fault in one of its rounds.
            _log.exception("housekeeping failed")
