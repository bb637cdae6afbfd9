"""What the policies of a key store say of a request, remembered.

To evaluate policies takes some 100 microseconds, so a verdict is kept under everything on which it
depends: principal, action, key, its KMI, and those attributes of the context that the policies
mention. What the catalog says of a key (its labels) is left out of that: when the catalog changes
all verdicts are forgotten.
"""

from __future__ import annotations

from operator import attrgetter
from time import time
from typing import Any

from xkiproxy.crypto.algorithms import Algorithm
from xkiproxy.crypto.operations import (
    Decrypt,
    Describe,
    Encrypt,
    Fault,
    Operation,
    OperationError,
    Random,
)
from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.keystores.policies import AccessRequest, Policies
from xkiproxy.keystores.trail import Trail

ACTIONS: dict[type[Operation], str] = {
    Encrypt: "encrypt",
    Decrypt: "decrypt",
    Random: "random",
    Describe: "meta",
}
"""The actions of the schema."""

_MAX_VERDICTS = 8192
_LONGEST_REMEMBERED = 4096
"""A question of more characters is asked anew each time: a client chooses how long it is."""

_SAID = {
    "instance": "caller.instance",
    "kms_operation": "caller.operation",
    "kms_key_arn": "caller.key_arn",
    "source_vpc": "caller.source_vpc",
    "source_vpc_endpoint": "caller.source_vpc_endpoint",
    "source_ip": "caller.source_ip",
    "via_service": "caller.via_service",
    "access_reason": "caller.access_reason",
}
"""Attributes of the context that the cloud says, with their places in a `Trail`."""

_TRAIL = {**_SAID, "access_key_id": "access_key_id", "source": "source"}
_OF_CRYPTO = frozenset({"mode", "client_iv"})

SAID_ATTRIBUTES = frozenset(_SAID)
"""What of the schema's context the cloud may say."""
KNOWN_ATTRIBUTES = frozenset({"access_key_id", "source", "time", *_OF_CRYPTO})
"""What of it the proxy knows itself."""


class Authorizer:
    """Asks the policies of a key store, each question once."""

    def __init__(self, keystore: str, policies: Policies) -> None:
        self.policies = policies
        self._keystore = keystore
        needed = [name for attribute, name in _TRAIL.items() if attribute in policies.needs]
        self._who = attrgetter("caller.principal", "key_id", "kmi", *needed)
        self._asks_crypto = not policies.needs.isdisjoint(_OF_CRYPTO)
        self._asks_time = "time" in policies.needs
        self._verdicts: dict[tuple[Any, ...], str | None] = {}
        self._revision = 0

    def check(
        self, operation: Operation, entry: CatalogEntry | None, revision: int, trail: Trail
    ) -> None:
        """Refuse what the policies do not permit; `revision` is that of the catalog.

        Raises:
            OperationError: ACCESS_DENIED; its details name the `policy` that decided.
        """
        verdicts = self._verdicts
        if revision != self._revision:
            verdicts.clear()
            self._revision = revision
        kind = type(operation)
        how = None
        if self._asks_crypto and (kind is Encrypt or kind is Decrypt):
            how = operation.algorithm, operation.iv is None  # type: ignore[union-attr]
        who = self._who(trail)
        question = kind, who, how, int(time()) if self._asks_time else 0
        denial = verdicts.get(question, "")
        if denial == "":
            if len(verdicts) >= _MAX_VERDICTS:
                verdicts.clear()
            verdict = self.policies.evaluate(self._request(operation, entry, trail))
            denial = None if verdict.allowed else verdict.reason
            if sum(map(len, who)) <= _LONGEST_REMEMBERED:
                verdicts[question] = denial
        if denial is not None:
            why = "The key's owner does not permit this."
            raise OperationError(Fault.ACCESS_DENIED, why, details={"policy": denial})

    def _request(
        self, operation: Operation, entry: CatalogEntry | None, trail: Trail
    ) -> AccessRequest:
        return AccessRequest(
            trail.caller.principal,
            ACTIONS[type(operation)],
            self._keystore,
            trail.key_id,
            trail.kmi if entry else "",
            entry.labels if entry else (),
            _context(operation, trail),
        )


def _context(operation: Operation, trail: Trail) -> dict[str, Any]:
    """The context of the schema; what the cloud has not said is absent."""
    said = {name: attrgetter(place)(trail) for name, place in _SAID.items()}
    context: dict[str, Any] = {name: value for name, value in said.items() if value}
    context.update(access_key_id=trail.access_key_id, source=trail.source, time=int(time()))
    if isinstance(operation, Encrypt | Decrypt):
        context["mode"] = _mode(operation.algorithm)
        context["client_iv"] = isinstance(operation, Encrypt) and operation.iv is not None
    return context


def _mode(algorithm: Algorithm | None) -> str:
    """GCM, CBC or ECB; where none is named the default is GCM for every key."""
    return (algorithm or Algorithm.AES_GCM).value.rpartition("_")[2]
