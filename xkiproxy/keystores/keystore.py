"""A key store: who may do what with which key, and the way of an operation to a KMI."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Sequence
from dataclasses import replace

from xkiproxy.crypto import envelope
from xkiproxy.crypto.algorithms import Usage
from xkiproxy.crypto.operations import (
    Availability,
    CiphertextFormat,
    Decrypt,
    Decrypted,
    Describe,
    Encrypt,
    Encrypted,
    Fault,
    HealthReport,
    KeyDescription,
    KeyState,
    KmiHealth,
    Operation,
    OperationError,
    OutputForm,
    Random,
    RandomBytes,
    Result,
    no_such_key,
)
from xkiproxy.crypto.wrapping import wrap
from xkiproxy.keystores.authorization import Authorizer
from xkiproxy.keystores.catalog import Catalog, CatalogEntry, CatalogError
from xkiproxy.keystores.encryptions import Encryptions
from xkiproxy.keystores.failover import Failover, Served
from xkiproxy.keystores.key_patterns import KeyPatterns
from xkiproxy.keystores.quotas import Quotas
from xkiproxy.keystores.replay import Replay
from xkiproxy.keystores.signing_keys import CachedSigningKeys
from xkiproxy.keystores.trail import Trail
from xkiproxy.kmi.base import KmiState
from xkiproxy.kmi.contract import Kmi
from xkiproxy.observability.timing import Timing

MAX_CHECK_AGE_SECONDS = 60.0
"""An older check of a KMI says nothing about it."""

_MAX_WRAPPING = 8
"""Public-key wrappings at once in a key store; more are refused."""

_AVAILABILITY = {
    KmiState.CONNECTED: Availability.ACTIVE,
    KmiState.DEGRADED: Availability.DEGRADED,
    KmiState.DISCONNECTED: Availability.UNAVAILABLE,
}

# The hot path asks for these: a member by its class's name costs 65 ns.
_DISCONNECTED, _ENABLED, _BOTH = KmiState.DISCONNECTED, KeyState.ENABLED, Usage.BOTH

_STATE_FAULTS = {
    KeyState.DISABLED: (Fault.KEY_DISABLED, "The key is disabled at the proxy."),
    KeyState.PENDING_DELETION: (Fault.KEY_PENDING_DELETION, "The key awaits its deletion."),
}


class KeyStore:
    """One tenant of the proxy."""

    def __init__(
        self,
        name: str,
        catalog: Catalog,
        kmis: Sequence[Kmi],
        signing_keys: CachedSigningKeys,
        replay: Replay,
        *,
        deadline: float,
        authorizer: Authorizer | None = None,
        quotas: Quotas | None = None,
        failover: Failover | None = None,
        encryptions: Encryptions | None = None,
        keys: KeyPatterns | None = None,
        disabled: KeyPatterns | None = None,
    ) -> None:
        """`deadline` is in seconds from a request's arrival; without `authorizer` all may ask.

        Without `failover` the first KMI that is there is asked, and no other. What is encrypted is
        counted in `encryptions`. Without `keys` all keys of the KMIs may be used; those in
        `disabled` are, whatever the catalog says.
        """
        self.name = name
        self.kmis = kmis
        self.signing_keys = signing_keys
        self.replay = replay
        self.deadline = deadline
        self.authorizer = authorizer
        self.keys = keys
        self.disabled = disabled
        self._quotas = quotas
        self._failover = failover
        self._encryptions = encryptions
        self._catalog = catalog
        self._wrapping = 0

    async def perform(self, operation: Operation, deadline: float, trail: Trail) -> Result:
        """Check that an operation is allowed and let a KMI execute it; raises OperationError.

        `deadline` is on the clock of `time.monotonic`. `trail` is filled in along the way.
        """
        if self._quotas is not None:
            key_id = "" if isinstance(operation, Random) else operation.key_id
            self._quotas.take(key_id, trail.caller.principal)
        if isinstance(operation, Random):
            return await self._draw(operation, deadline, trail)
        trail.key_id = operation.key_id
        kmi, entry = self._find(operation.key_id)
        trail.kmi = kmi.name
        if self.authorizer is not None:
            self.authorizer.check(operation, entry, self._catalog.revision, trail)
        if not isinstance(operation, Describe):
            _check_state(entry)
            _check_usage(operation, entry)
        if self._failover is None:
            result = await kmi.submit(operation, deadline, trail.timing)
        else:
            result, kmi = await self._submit_to_any(operation, deadline, trail)
        if isinstance(operation, Describe):
            return _described(result, entry)
        if isinstance(result, Encrypted):
            trail.version = version = result.version
            if self._encryptions is not None:
                self._encryptions.counted[trail.kmi, trail.key_id, version] += 1
            if isinstance(operation, Encrypt) and operation.integrity:
                return await _proven(operation, result, kmi, deadline, trail.timing)
        elif isinstance(result, Decrypted):
            trail.version = result.version
        return result

    async def _draw(self, operation: Random, deadline: float, trail: Trail) -> Result:
        trail.kmi = self.kmis[0].name
        if self.authorizer is not None:
            self.authorizer.check(operation, None, self._catalog.revision, trail)
        if self._failover is None:
            drawn = await self.kmis[0].submit(operation, deadline, trail.timing)
        else:
            drawn, _ = await self._submit_to_any(operation, deadline, trail)
        assert isinstance(drawn, RandomBytes)  # noqa: S101 - the KMI's contract
        return await self._give_out(operation, drawn)

    async def _submit_to_any(self, operation: Operation, deadline: float, trail: Trail) -> Served:
        """Let the first KMI execute it that can; each is asked only if it may be.

        What the catalog says is looked up whenever it is needed: it may change while a KMI is
        waited for, and a verdict on what it said before would be remembered as one on now.
        """
        assert self._failover is not None  # noqa: S101 - the caller has looked

        def enter(kmi: Kmi) -> None:
            trail.kmi = kmi.name
            entry = self._entry(kmi, operation)
            if self.authorizer is not None:
                self.authorizer.check(operation, entry, self._catalog.revision, trail)
            if entry is not None and isinstance(operation, Encrypt | Decrypt):
                _check_state(entry)
                _check_usage(operation, entry)

        kmis = [kmi for kmi in self.kmis if self._holds(kmi, operation)]
        return await self._failover.submit(kmis, operation, deadline, enter, trail.timing)

    def _holds(self, kmi: Kmi, operation: Operation) -> bool:
        return isinstance(operation, Random) or bool(self._catalog.get(kmi.name, operation.key_id))

    def _entry(self, kmi: Kmi, operation: Operation) -> CatalogEntry | None:
        """What the catalog says of the key at a KMI; None for what needs no key."""
        if isinstance(operation, Random):
            return None
        entry = self._catalog.get(kmi.name, operation.key_id)
        if entry is None:  # it was removed meanwhile
            raise no_such_key()
        return entry

    @property
    def is_full(self) -> bool:
        """Whether no KMI would take an operation now."""
        for kmi in self.kmis:  # noqa: SIM110 - all() with a generator costs four times as much
            if not kmi.is_full:
                return False
        return True

    def may_use(self, entry: CatalogEntry) -> bool:
        """Whether a key is one of this key store's, whatever its state; for housekeeping."""
        is_here = any(kmi.name == entry.kmi for kmi in self.kmis)
        return is_here and (self.keys is None or self.keys.admit(entry.key_id))

    def health(self) -> HealthReport:
        """How this key store is, from the last deep checks of its KMIs."""
        oldest = time.monotonic() - MAX_CHECK_AGE_SECONDS
        kmis = tuple(KmiHealth(kmi.name, kmi.type, _availability(kmi, oldest)) for kmi in self.kmis)
        found = {kmi.availability for kmi in kmis}
        if len(found) == 1:
            return HealthReport(found.pop(), "", kmis)
        return HealthReport(Availability.DEGRADED, "", kmis)

    def _find(self, key_id: str) -> tuple[Kmi, CatalogEntry]:
        """The first KMI that has the key and is there, else the first that has it.

        A key that is not enabled at one of the KMIs is not enabled: to be disabled must not end
        when the KMI at which it was disabled goes away.
        """
        found = self._look_up(key_id)
        if found is None:
            # It may have been made a moment ago, by the command line.
            self._refresh_catalog()
            found = self._look_up(key_id)
        if found is None:
            raise no_such_key()
        return found

    def _look_up(self, key_id: str) -> tuple[Kmi, CatalogEntry] | None:
        if self.keys is not None and not self.keys.admit(key_id):
            return None  # from here on it goes the way of a key that does not exist
        first = present = None
        for kmi in self.kmis:
            entry = self._catalog.get(kmi.name, key_id)
            if entry is None:
                continue
            if entry.state is not _ENABLED:
                return kmi, entry
            if self.disabled is not None and self.disabled.admit(key_id):
                return kmi, replace(entry, state=KeyState.DISABLED)
            if kmi.state is not _DISCONNECTED:
                present = present or (kmi, entry)
            first = first or (kmi, entry)
        return present or first

    def _refresh_catalog(self) -> None:
        try:
            self._catalog.refresh()
        except CatalogError:
            # The server's housekeeping meets the same error, says it and stops serving.
            raise OperationError(Fault.UNAVAILABLE, "The catalog cannot be read.") from None

    async def _give_out(self, operation: Random, drawn: RandomBytes) -> RandomBytes:
        if operation.output is OutputForm.NONE:
            return RandomBytes(b"")
        if operation.wrapping is None:
            return drawn
        if self._wrapping >= _MAX_WRAPPING:
            raise OperationError(Fault.THROTTLED, "Too many requests wait for public-key wrapping.")
        self._wrapping += 1
        try:
            # SM2 takes many milliseconds: it must not hold up the event loop.
            return RandomBytes(await asyncio.to_thread(wrap, operation.wrapping, drawn.data))
        finally:
            self._wrapping -= 1


async def _proven(
    operation: Encrypt, result: Encrypted, kmi: Kmi, deadline: float, timing: Timing | None
) -> Encrypted:
    """The result with its integrity value, once it has been shown to decrypt.

    The order matters (AWS XKS API): the value is made of what will be returned, and only then is
    that decrypted. Whatever changes a bit in between makes one of the two wrong.
    """
    is_raw = operation.format is CiphertextFormat.RAW
    metadata = b"" if is_raw else envelope.metadata(result.version)
    value = envelope.integrity_value(operation.aad, metadata, result.iv, result.ciphertext)
    decrypt = opening(operation, result)
    if not await decrypts_to(kmi, decrypt, operation.plaintext, deadline, timing):
        raise OperationError(Fault.INTERNAL, "The key manager does not decrypt what it encrypted.")
    return replace(result, integrity=value)


def opening(operation: Encrypt, result: Encrypted) -> Decrypt:
    """The operation that decrypts what another has encrypted."""
    return Decrypt(
        operation.key_id,
        result.ciphertext,
        result.iv,
        None if operation.format is CiphertextFormat.RAW else result.version,
        result.algorithm,
        result.padding,
        operation.aad,
        operation.format,
    )


async def decrypts_to(
    kmi: Kmi, operation: Decrypt, wanted: bytes, deadline: float, timing: Timing | None = None
) -> bool:
    """Whether a KMI decrypts to these bytes; raises OperationError if it cannot say."""
    try:
        result = await kmi.submit(operation, deadline, timing)
    except OperationError as error:
        if error.fault is Fault.INVALID_CIPHERTEXT:
            return False
        raise
    return isinstance(result, Decrypted) and hmac.compare_digest(result.plaintext, wanted)


def _availability(kmi: Kmi, oldest: float) -> Availability:
    return _AVAILABILITY[kmi.state] if kmi.checked > oldest else Availability.UNAVAILABLE


def _check_state(entry: CatalogEntry) -> None:
    if entry.state is not _ENABLED:
        raise OperationError(*_STATE_FAULTS[entry.state])


def _check_usage(operation: Encrypt | Decrypt, entry: CatalogEntry) -> None:
    if entry.usage is _BOTH:  # members of a Flag are singletons, and its operators are slow
        return
    wanted = Usage.ENCRYPT if isinstance(operation, Encrypt) else Usage.DECRYPT
    if not wanted & entry.usage:
        what = "encryption" if wanted is Usage.ENCRYPT else "decryption"
        raise OperationError(Fault.USAGE_FORBIDDEN, f"The key may not be used for {what}.")


def _described(result: Result, entry: CatalogEntry) -> Result:
    assert isinstance(result, KeyDescription)  # noqa: S101 - the KMI's contract
    created = entry.created if result.created is None else result.created
    return replace(result, usage=result.usage & entry.usage, state=entry.state, created=created)
