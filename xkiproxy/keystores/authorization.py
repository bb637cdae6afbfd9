"""What the policies of a key store say of a request, remembered.

To evaluate policies takes some 100 microseconds, so a verdict is kept under everything on which it
depends: principal, action, key, its KMI, and those attributes of the context that the policies
mention. What the catalog says of a key (its labels) is left out of that: when the catalog changes
all verdicts are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from time import time
from typing import Any

from xkiproxy.crypto.algorithms import Algorithm
from xkiproxy.crypto.caller import Caller
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

_SAID: dict[str, str] = {
    "instance": "instance",
    "kms_operation": "operation",
    "kms_key_arn": "key_arn",
    "source_vpc": "source_vpc",
    "source_vpc_endpoint": "source_vpc_endpoint",
    "source_ip": "source_ip",
    "via_service": "via_service",
}
"""Attributes of the context that the cloud says, with their names in a `Caller`."""

_KNOWN: dict[str, Callable[[Trail, Operation], Any]] = {
    "access_key_id": lambda trail, _: trail.access_key_id,
    "source": lambda trail, _: trail.source,
    "time": lambda _, __: int(time()),  # so that what depends on it is asked once a second
    "mode": lambda _, operation: _mode(operation),
    "client_iv": lambda _, operation: isinstance(operation, Encrypt) and operation.iv is not None,
}
"""Attributes that the proxy knows itself."""

_OF_CRYPTO = {"mode", "client_iv"}

SAID_ATTRIBUTES, KNOWN_ATTRIBUTES = frozenset(_SAID), frozenset(_KNOWN)
"""The context of the schema: what the cloud may say, and what the proxy knows."""


class Authorizer:
    """Asks the policies of a key store, each question once."""

    def __init__(self, keystore: str, policies: Policies) -> None:
        self.policies = policies
        self._keystore = keystore
        said = [name for attribute, name in _SAID.items() if attribute in policies.needs]
        self._said: Callable[[Caller], Any] | None = attrgetter(*said) if said else None
        self._known = [ask for name, ask in _KNOWN.items() if name in policies.needs]
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
        if revision != self._revision or len(verdicts) > _MAX_VERDICTS:
            verdicts.clear()
            self._revision = revision
        caller = trail.caller
        said = self._said(caller) if self._said else None
        known = tuple([ask(trail, operation) for ask in self._known]) if self._known else None
        question = (type(operation), caller.principal, trail.key_id, trail.kmi, said, known)
        denial = verdicts.get(question, "")
        if denial == "":
            verdict = self.policies.evaluate(self._request(operation, entry, trail))
            denial = verdicts[question] = None if verdict.allowed else verdict.reason
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
    said = {name: getattr(trail.caller, attribute) for name, attribute in _SAID.items()}
    is_crypto = isinstance(operation, Encrypt | Decrypt)
    known = {
        name: ask(trail, operation)
        for name, ask in _KNOWN.items()
        if is_crypto or name not in _OF_CRYPTO
    }
    return {**{name: value for name, value in said.items() if value}, **known}


def _mode(operation: Operation) -> str:
    """GCM, CBC or ECB; where none is named the default is GCM for every key."""
    algorithm = operation.algorithm if isinstance(operation, Encrypt | Decrypt) else None
    return (algorithm or Algorithm.AES_GCM).value.rpartition("_")[2]
