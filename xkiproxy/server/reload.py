"""Taking over a changed configuration without a stop: whole, or not at all.

What may change while the server runs: key stores with their credentials, and the certificate, key
and client CA of TLS. Everything is opened and checked before anything is exchanged. Connections and
requests that have begun go on with what they began with; the next request meets what is new.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xkiproxy.config import Config, ConfigError, Problem
from xkiproxy.observability.logging import utf8
from xkiproxy.server.gateway import Tenant

_log = logging.getLogger(__name__)

_RESTART = "cannot change while the server runs: restart it"
_FIXED = ("kmi", "catalog", "audit", "log", "tracing")


@dataclass(frozen=True, slots=True)
class Change:
    """A configuration that has been checked, and what was opened of it."""

    config: Config
    tenants: list[Tenant]
    context: ssl.SSLContext | None
    certificate: str
    """The fingerprint of the server's certificate; empty without TLS."""
    expiry: float | None
    """When it expires, in seconds since the epoch; None without TLS."""
    untimely: str
    """Why it is not valid now; empty if it is."""
    described: list[str]
    """What is different, a sentence each; nothing of a secret."""


@dataclass(slots=True)
class History:
    """What came of the last reload, for /status."""

    number: int = 0
    time: str = ""
    problems: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    def add(self, problems: Sequence[str], changes: Sequence[str]) -> None:
        """Note a reload, and say it in the log."""
        self.number += 1
        self.time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.problems, self.changes = list(problems), list(changes)
        if problems:
            _log.error("the reload failed and changed nothing: %s", "; ".join(problems))
        else:
            _log.info("reloaded: %s", "; ".join(changes) or "nothing has changed")

    def status(self) -> dict[str, Any]:
        """For /status."""
        return {
            "number": self.number,
            "time": self.time,
            "problems": self.problems,
            "changes": self.changes,
        }


def config_path(path: Path) -> str:
    """For /status: which file a reload reads. A link may lead elsewhere than at the start."""
    return utf8(str(path.resolve()))


def fixed_differences(old: Config, new: Config) -> Iterator[Problem]:
    """What differs and may not."""
    for name in _FIXED:
        if getattr(old, name) != getattr(new, name):
            yield Problem(name, _RESTART)
    for name in type(old.server).model_fields:
        before, after = getattr(old.server, name), getattr(new.server, name)
        if name == "tls":
            if (before is None) != (after is None):
                yield Problem("server.tls", _RESTART)
        elif before != after:
            yield Problem(f"server.{name}", _RESTART)


def describe(
    old: Config, tenants: Sequence[Tenant], certificate: str, change: Change
) -> Iterator[str]:
    """What a change changes, a sentence each."""
    if certificate != change.certificate:
        yield f"the certificate is now {change.certificate}"
    if old.server.tls != change.config.server.tls:
        yield "the settings of [server.tls] have changed"
    before = {tenant.store.name: tenant for tenant in tenants}
    after = {tenant.store.name: tenant for tenant in change.tenants}
    for name in before.keys() - after.keys():
        yield f"key store {name} is no more"
    settings = {store.name: store for store in old.keystore}
    for store in change.config.keystore:
        tenant, known = after[store.name], before.get(store.name)
        if known is None:
            yield f"key store {store.name} is new"
            continue
        if settings[store.name] != store:
            yield f"the settings of key store {store.name} have changed"
        if _policies(known) != _policies(tenant):
            yield f"key store {store.name} has other policies"
        if known.token_keys != tenant.token_keys:
            yield f"key store {store.name} has other keys for tokens"
        yield from _describe_credentials(known, tenant)


def _policies(tenant: Tenant) -> str:
    authorizer = tenant.store.authorizer
    return "" if authorizer is None else authorizer.policies.digest


def _describe_credentials(old: Tenant, new: Tenant) -> Iterator[str]:
    before, after = old.store.signing_keys.identities, new.store.signing_keys.identities
    name = new.store.name
    for access_key_id in sorted(after.keys() - before.keys()):
        yield f"key store {name} has the new credential {access_key_id}"
    for access_key_id in sorted(before.keys() - after.keys()):
        yield f"key store {name} has the credential {access_key_id} no more"
    for access_key_id in sorted(before.keys() & after.keys()):
        if before[access_key_id] != after[access_key_id]:
            yield f"key store {name} has another secret for {access_key_id}"


@contextmanager
def refusing(where: str, path: Path) -> Iterator[None]:
    """A step of a reload: whatever goes wrong in it is a reason to refuse it, so a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(path, [Problem(where, error.strerror or str(error))]) from None
    except Exception:
        _log.exception("the reload failed")
        raise ConfigError(path, [Problem(where, "an internal error: see the log")]) from None


def texts(error: ConfigError) -> list[str]:
    """The problems of a configuration, a text each, which can be sent on whatever it names."""
    return [utf8(str(problem)) for problem in error.problems]
