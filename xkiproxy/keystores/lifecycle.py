"""The life of a key: registered in the catalog, disabled, rotated, and destroyed in the end.

A key lives at its KMI and has its state in the catalog. It is made at the KMI first and destroyed
there first, so that whatever interrupts this leaves a key that is not used, never an entry that
allows a key which is not there. Every change reads and writes the catalog under its lock.

What changes the catalog alone does not need the KMI: whoever stops the use of a key must be able to
while the HSM, or the secret for it, is away.
"""

from __future__ import annotations

import logging
import os
import pwd
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from xkiproxy.crypto.algorithms import KeySpec, Usage
from xkiproxy.crypto.operations import KeyState
from xkiproxy.keystores.catalog import Catalog, CatalogEntry, Rotation
from xkiproxy.kmi.base import KeyInfo, KeyManager, KeyManagerError, check_key_id
from xkiproxy.observability.logging import utf8

UNREGISTERED = "UNREGISTERED"
"""The state of a key that its KMI has and the catalog does not: it is not used."""

MIN_DELETION_DAYS = 7
MAX_DELETION_DAYS = 366

WATCH_SECONDS = 86_400
"""How long a server says of a key which is due that it will be destroyed, before it is."""

_LONGEST_GAP_SECONDS = 600
"""How long servers may look away, as for a restart, without that beginning anew."""

_DAY_SECONDS = 86_400

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ManagedKey:
    """A key as its KMI and the catalog know it together; times are seconds since the epoch.

    `spec` and `version` are None if the KMI does not have the key, or does not say (`problem` says
    so then).
    """

    key_id: str
    kmi: str
    spec: KeySpec | None
    state: str
    version: int | None
    created: float | None
    usage: Usage
    deletion_time: float | None = None
    problem: str = ""
    labels: tuple[tuple[str, str], ...] = ()


def create_key(
    catalog: Catalog,
    manager: KeyManager,
    kmi: str,
    key_id: str,
    spec: KeySpec,
    usage: Usage,
    labels: Mapping[str, str] | None = None,
) -> ManagedKey:
    """Make a key and enable it; raises KeyManagerError or CatalogError."""
    check_key_id(key_id)
    with catalog.locked():
        entry = catalog.get(kmi, key_id)
        if manager.get(key_id) is not None:
            hint = (
                ""
                if entry
                else f"; it is not registered, do so with: xkiproxy keys enable {key_id}"
            )
            raise KeyManagerError(f"key {key_id}: KMI {kmi} has a key of this name already{hint}")
        if entry is not None:
            raise KeyManagerError(
                f"key {key_id}: the catalog knows it, but KMI {kmi} has lost it; restore the KMI"
            )
        info = manager.create(key_id, spec)
        entry = _new_entry(kmi, info, usage)
        _put(catalog, replace(entry, labels=_sorted(labels or {})))
    return show_key(catalog, manager, kmi, key_id)


def list_keys(catalog: Catalog, manager: KeyManager, kmi: str) -> list[ManagedKey]:
    """Every key that the KMI or the catalog has, by ID; raises KeyManagerError."""
    infos = {info.key_id: info for info in manager.list()}
    entries = {entry.key_id: entry for entry in catalog.entries() if entry.kmi == kmi}
    names = sorted(infos.keys() | entries.keys())
    return [_managed(kmi, infos.get(name), entries.get(name)) for name in names]


def lost_entries(catalog: Catalog, manager: KeyManager, kmi: str, file: Path) -> str:
    """What to say if a KMI has keys and the catalog none of them, else nothing.

    So it is where the catalog was lost: a new one is empty, and refuses everything. The KMI is only
    asked if the catalog has nothing of it. Raises KeyManagerError.
    """
    if any(entry.kmi == kmi for entry in catalog.entries()):
        return ""
    count = len(manager.list())
    if count == 0:
        return ""
    return (
        f"{count} keys at KMI {kmi} are not in the catalog {file}: was it lost?"
        f" restore it, or for each key: xkiproxy keys enable KEY --kmi {kmi}"
    )


def show_key(catalog: Catalog, manager: KeyManager, kmi: str, key_id: str) -> ManagedKey:
    """One key; raises KeyManagerError if neither the KMI nor the catalog has it."""
    info, entry = manager.get(key_id), catalog.get(kmi, key_id)
    if info is None and entry is None:
        raise _unknown(kmi, key_id)
    return _managed(kmi, info, entry)


def enable_key(
    catalog: Catalog,
    manager: KeyManager,
    kmi: str,
    key_id: str,
    usage: Usage | None = None,
    labels: Mapping[str, str] | None = None,
) -> ManagedKey:
    """Let a key be used, and register it if it is not.

    `usage` is for a key that is not registered; None means whatever the KMI allows. `labels` are
    set with it, at once: a policy may ask for them.

    A key that is registered is enabled while its KMI is away, too; one that the KMI has lost, or
    that cannot be used, is not.

    Raises:
        KeyManagerError: no such key, it awaits deletion, or `usage` is given for a registered key.
        CatalogError: the catalog cannot be written.
    """
    with catalog.locked():
        entry = catalog.get(kmi, key_id)
        if entry is None:
            entry = _new_entry(kmi, _usable(manager.get(key_id), kmi, key_id), usage)
        else:
            if usage is not None:
                raise KeyManagerError(
                    f"key {key_id}: its usage was set when it was registered; to change it:"
                    f" xkiproxy keys usage {key_id} {(usage.name or '').lower()}"
                )
            _refuse_pending(entry)
            try:
                info = manager.get(key_id)
            except KeyManagerError:
                pass  # it is away: what it would say shows when it is back
            else:
                _usable(info, kmi, key_id)
        wanted = _sorted({**dict(entry.labels), **(labels or {})})
        _put(catalog, replace(entry, state=KeyState.ENABLED, labels=wanted))
    return _changed(catalog, manager, kmi, key_id)


def _usable(info: KeyInfo | None, kmi: str, key_id: str) -> KeyInfo:
    """What a KMI said of a key; raises KeyManagerError if it has none, or it is of no use."""
    if info is None:
        raise _unknown(kmi, key_id)
    if info.problem:
        raise KeyManagerError(f"key {key_id}: {info.problem}")
    return info


def disable_key(catalog: Catalog, manager: KeyManager, kmi: str, key_id: str) -> ManagedKey:
    """Let a key not be used until it is enabled again; raises KeyManagerError, CatalogError."""
    with catalog.locked():
        entry = _entry(catalog, manager, kmi, key_id)
        _refuse_pending(entry)
        _put(catalog, replace(entry, state=KeyState.DISABLED))
    return _changed(catalog, manager, kmi, key_id)


def forget_key(catalog: Catalog, kmi: str, key_id: str) -> CatalogEntry:
    """Take a key out of the catalog, and return what was there; its KMI's key stays as it is.

    Raises:
        KeyManagerError: it is not registered, it is ENABLED, or it awaits deletion.
        CatalogError: the catalog cannot be written.
    """
    with catalog.locked():
        entry = _registered(catalog, kmi, key_id)
        _refuse_pending(entry)
        if entry.state is KeyState.ENABLED:
            raise KeyManagerError(
                f"key {key_id}: it is ENABLED; stop its use first: xkiproxy keys disable {key_id}"
            )
        catalog.remove(kmi, key_id)
    return entry


def set_usage(
    catalog: Catalog, manager: KeyManager, kmi: str, key_id: str, usage: Usage
) -> ManagedKey:
    """Change what a key may be used for; raises KeyManagerError, CatalogError."""
    with catalog.locked():
        entry = _registered(catalog, kmi, key_id)
        _refuse_pending(entry)
        _put(catalog, replace(entry, usage=usage))
    return _changed(catalog, manager, kmi, key_id)


def _registered(catalog: Catalog, kmi: str, key_id: str) -> CatalogEntry:
    entry = catalog.get(kmi, key_id)
    if entry is None:
        raise KeyManagerError(
            f"key {key_id[:128]}: it is not registered at KMI {kmi}; to register one that the KMI"
            " has: xkiproxy keys enable KEY --usage USAGE"
        )
    return entry


def label_key(
    catalog: Catalog,
    manager: KeyManager,
    kmi: str,
    key_id: str,
    labels: Mapping[str, str],
    without: Iterable[str] = (),
    *,
    beside: Collection[str] = (),
) -> ManagedKey:
    """Set labels of a key, and take others away; raises KeyManagerError, CatalogError.

    A key that is not registered gets an entry that is DISABLED, to be enabled with its labels; not
    where it is in use at another KMI of a key store (`beside` are their names), since that would
    end there.
    """
    with catalog.locked():
        entry = _entry(catalog, manager, kmi, key_id)
        _refuse_to_end_use_beside(catalog, kmi, key_id, beside)
        wanted = {**dict(entry.labels), **labels}
        for name in without:
            if wanted.pop(name, None) is None:
                raise KeyManagerError(f"key {key_id} has no label {name}")
        _put(catalog, replace(entry, labels=_sorted(wanted)))
    return _changed(catalog, manager, kmi, key_id)


def _refuse_to_end_use_beside(
    catalog: Catalog, kmi: str, key_id: str, beside: Collection[str]
) -> None:
    if catalog.get(kmi, key_id) is not None:
        return
    for other in sorted(set(beside) - {kmi}):
        entry = catalog.get(other, key_id)
        if entry is not None and entry.state is KeyState.ENABLED:
            raise KeyManagerError(
                f"key {key_id} is not registered at KMI {kmi}, and its labels would register it"
                f" DISABLED, which ends its use at KMI {other} too; to enable it with them:"
                f" xkiproxy keys enable {key_id} --kmi {kmi} --label NAME=VALUE"
            )


def _sorted(labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items()))


def rotate_key(catalog: Catalog, manager: KeyManager, kmi: str, key_id: str) -> ManagedKey:
    """Add a version to a key; raises KeyManagerError or CatalogError."""
    with catalog.locked():
        if manager.get(key_id) is None:
            raise _unknown(kmi, key_id)
        entry = catalog.get(kmi, key_id)
        _refuse_pending(entry)
        made = manager.rotate(key_id)
        if entry is None:
            # It gets no entry: one that is not ENABLED would end its use at another KMI.
            catalog.note_rotation(Rotation(kmi, key_id, made.version, _operator()))
        else:
            _put(catalog, replace(entry, version=made.version))
    return show_key(catalog, manager, kmi, key_id)


def schedule_deletion(
    catalog: Catalog, manager: KeyManager, kmi: str, key_id: str, days: int
) -> ManagedKey:
    """Stop a key's use now, and have it destroyed in 7 to 366 days.

    Raises:
        KeyManagerError: no such key, too few or too many days, or it awaits deletion already.
        CatalogError: the catalog cannot be written.
    """
    if not MIN_DELETION_DAYS <= days <= MAX_DELETION_DAYS:
        raise KeyManagerError(
            f"key {key_id}: it is deleted after {MIN_DELETION_DAYS} to {MAX_DELETION_DAYS} days"
        )
    with catalog.locked():
        entry = _entry(catalog, manager, kmi, key_id)
        _refuse_pending(entry)
        when = time.time() + days * _DAY_SECONDS
        _put(catalog, replace(entry, state=KeyState.PENDING_DELETION, deletion_time=when))
    return _changed(catalog, manager, kmi, key_id)


def cancel_deletion(catalog: Catalog, manager: KeyManager, kmi: str, key_id: str) -> ManagedKey:
    """Keep a key that awaits deletion, DISABLED; raises KeyManagerError or CatalogError."""
    with catalog.locked():
        entry = _entry(catalog, manager, kmi, key_id)
        if entry.state is not KeyState.PENDING_DELETION:
            raise KeyManagerError(f"key {key_id}: it does not await deletion, it is {entry.state}")
        kept = replace(entry, state=KeyState.DISABLED, deletion_time=None)
        _put(catalog, replace(kept, watched_since=None, watched_until=None))
    return _changed(catalog, manager, kmi, key_id)


def watch_due(catalog: Catalog, now: float) -> list[CatalogEntry]:
    """Note that a server has seen which keys are due, and return their entries.

    A date that has passed is not enough to destroy a key for good. The catalog may be an older copy
    that was put back, in which a deletion awaits that was cancelled since; or the clock may have
    jumped. So a server must have seen the key due for a day, and looked every minute. After a
    longer gap than a restart takes, which is also what a copy or a clock that jumps look like, the
    day begins anew.

    Raises:
        CatalogError: the catalog cannot be read or written.
    """
    with catalog.locked():
        due = [_watched(entry, now) for entry in due_entries(catalog, now)]
        for entry in due:
            catalog.put(entry)
    return due


def _watched(entry: CatalogEntry, now: float) -> CatalogEntry:
    since = entry.watched_since if _is_watched(entry, now) else now
    return replace(entry, watched_since=since, watched_until=now)


def _is_watched(entry: CatalogEntry, now: float) -> bool:
    """Whether servers have looked at a key until now."""
    if entry.watched_since is None or entry.watched_until is None:
        return False
    return (
        entry.watched_since
        <= entry.watched_until
        <= now
        <= (entry.watched_until + _LONGEST_GAP_SECONDS)
    )


def destruction_time(entry: CatalogEntry) -> float | None:
    """When a key is destroyed, as far as that is known: a day after a server has seen it due."""
    return None if entry.watched_since is None else entry.watched_since + WATCH_SECONDS


def expected_destruction(entry: CatalogEntry, now: float) -> float:
    """When a key that awaits deletion is destroyed if a server watches it from now on."""
    when = destruction_time(entry) if _is_watched(entry, now) else None
    return max(entry.deletion_time or now, now) + WATCH_SECONDS if when is None else when


def announcement(entry: CatalogEntry, now: float) -> str:
    """When a key that awaits deletion will be destroyed, and how that is prevented."""
    when = datetime.fromtimestamp(expected_destruction(entry, now), UTC)
    date = when.strftime("%Y-%m-%dT%H:%M:%SZ")
    return (
        f"key {entry.key_id} of KMI {entry.kmi} will be destroyed, for good, after {date};"
        f" to keep it: xkiproxy keys delete {entry.key_id} --kmi {entry.kmi} --cancel,"
        " on every host: each has its own catalog"
    )


def is_to_be_destroyed(entry: CatalogEntry | None, now: float) -> bool:
    """Whether a key is due, and servers have watched it for long enough."""
    if entry is None or not _is_due(entry, now) or not _is_watched(entry, now):
        return False
    when = destruction_time(entry)
    return when is not None and when <= now


def disable_twins(
    catalog: Catalog, due: Iterable[CatalogEntry], groups: Iterable[Collection[str]]
) -> list[CatalogEntry]:
    """Disable a due key at the other KMIs of its key stores, and return what was changed.

    While it awaits deletion at one of them it is used at none; once its entry there is gone it
    would be used at the others again, after days in which everybody took it for dead. `groups` are
    the names of KMIs that are in one key store.

    Raises:
        CatalogError: the catalog cannot be read or written.
    """
    ids = {(entry.kmi, entry.key_id) for entry in due}
    twins = {(o, key) for kmi, key in ids for group in groups if kmi in group for o in group}
    found = []
    with catalog.locked():
        for twin in sorted(twins - ids):
            entry = catalog.get(*twin)
            if entry is not None and entry.state is KeyState.ENABLED:
                catalog.put(replace(entry, state=KeyState.DISABLED, changed_by=""))
                found.append(entry)
    return found


def purge_due(
    catalog: Catalog, managers: Mapping[str, KeyManager], now: float
) -> list[CatalogEntry]:
    """Destroy the keys whose time has come, and return their entries; `managers` by KMI name.

    Which these are depends on `watch_due`, to be called before.

    A key whose KMI fails, or is not in `managers`, is left for the next time. The state is read
    again under the catalog's lock, which also keeps a cancellation, or another process that purges,
    out until the key is gone: so none is destroyed that was just kept.

    Raises:
        CatalogError: the catalog cannot be read or written.
    """
    catalog.refresh()
    due = [entry for entry in catalog.entries() if is_to_be_destroyed(entry, now)]
    return [entry for entry in due if _purge(catalog, managers, entry, now)]


def pending_entries(catalog: Catalog) -> list[CatalogEntry]:
    """The keys that await deletion, due or not, as of the catalog's last refresh."""
    return [e for e in catalog.entries() if e.state is KeyState.PENDING_DELETION]


def due_entries(catalog: Catalog, now: float) -> list[CatalogEntry]:
    """The keys whose date of deletion has come by now, as of the catalog's last refresh."""
    return [entry for entry in catalog.entries() if _is_due(entry, now)]


def _purge(
    catalog: Catalog, managers: Mapping[str, KeyManager], entry: CatalogEntry, now: float
) -> bool:
    manager = managers.get(entry.kmi)
    if manager is None:
        return False
    with catalog.locked():
        if not is_to_be_destroyed(catalog.get(entry.kmi, entry.key_id), now):
            return False
        try:
            # It may be gone: destroyed by a process that was stopped before the next line.
            if manager.get(entry.key_id) is not None:
                manager.destroy(entry.key_id)
        except KeyManagerError as error:
            _log.error("key %s awaits its destruction: %s", entry.key_id, error)
            return False
        catalog.remove(entry.kmi, entry.key_id)
    return True


def _is_due(entry: CatalogEntry, now: float) -> bool:
    return (
        entry.state is KeyState.PENDING_DELETION
        and entry.deletion_time is not None
        and entry.deletion_time <= now
    )


def _changed(catalog: Catalog, manager: KeyManager, kmi: str, key_id: str) -> ManagedKey:
    """A key whose entry was changed, which holds whether or not the KMI can say more of it."""
    try:
        return show_key(catalog, manager, kmi, key_id)
    except KeyManagerError as error:
        entry = catalog.get(kmi, key_id)
        if entry is None:  # destroyed this very moment
            raise
        return _without_kmi(entry, f"spec and version are not known: {error}")


def _without_kmi(entry: CatalogEntry, problem: str) -> ManagedKey:
    return ManagedKey(
        entry.key_id,
        entry.kmi,
        None,
        entry.state,
        None,
        entry.created,
        entry.usage,
        entry.deletion_time,
        problem,
        entry.labels,
    )


def _managed(kmi: str, info: KeyInfo | None, entry: CatalogEntry | None) -> ManagedKey:
    if info is None:
        assert entry is not None  # noqa: S101 - one of them has the key
        return _without_kmi(entry, f"KMI {kmi} has no such key")
    return ManagedKey(
        info.key_id,
        kmi,
        info.spec,
        entry.state if entry else UNREGISTERED,
        info.version,
        entry.created if entry and info.created is None else info.created,
        entry.usage & info.usage if entry else info.usage,
        entry.deletion_time if entry else None,
        info.problem,
        entry.labels if entry else (),
    )


def _entry(catalog: Catalog, manager: KeyManager, kmi: str, key_id: str) -> CatalogEntry:
    """A key's entry, or for a key that is not registered the one to start with: not usable."""
    entry = catalog.get(kmi, key_id)
    if entry is not None:
        return entry
    info = manager.get(key_id)
    if info is None:
        raise _unknown(kmi, key_id)
    return replace(_new_entry(kmi, info, None), state=KeyState.DISABLED)


def _new_entry(kmi: str, info: KeyInfo, usage: Usage | None) -> CatalogEntry:
    created = time.time() if info.created is None else info.created
    return CatalogEntry(
        kmi, info.key_id, KeyState.ENABLED, usage or info.usage, created, version=info.version
    )


def _put(catalog: Catalog, entry: CatalogEntry) -> None:
    """Write an entry, with who changed it, if it is not what is there."""
    if catalog.get(entry.kmi, entry.key_id) != entry:
        entry = replace(entry, changed_by=_operator())
    catalog.put(entry)


def _operator() -> str:
    """The user who runs this, as the operating system knows him, and who became him by sudo."""
    number = os.getuid()
    try:
        name = f"{pwd.getpwuid(number).pw_name} ({number})"
    except KeyError:  # a container's, mostly
        name = str(number)
    sudo = os.environ.get("SUDO_USER")
    return utf8(f"{name}, by sudo of {sudo}" if sudo else name)


def _refuse_pending(entry: CatalogEntry | None) -> None:
    if entry is not None and entry.state is KeyState.PENDING_DELETION:
        raise KeyManagerError(
            f"key {entry.key_id}: it awaits deletion; to keep it:"
            f" xkiproxy keys delete {entry.key_id} --cancel"
        )


def _unknown(kmi: str, key_id: str) -> KeyManagerError:
    return KeyManagerError(
        f"key {key_id[:128]}: KMI {kmi} has no such key; see those it has with: xkiproxy keys list"
    )
