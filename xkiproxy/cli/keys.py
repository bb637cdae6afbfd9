"""`xkiproxy keys`: external keys, from their creation to their destruction."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer

from xkiproxy.cli.common import (
    DEFAULT_CONFIG,
    CommandError,
    ConfigOption,
    JsonOption,
    err,
    out,
    print_fields,
    print_json,
    print_table,
)
from xkiproxy.config import Config, load_config
from xkiproxy.config.models import KeystoreSettings, KmiSettings
from xkiproxy.config.secrets import SecretError
from xkiproxy.crypto.algorithms import KeySpec, Usage
from xkiproxy.crypto.operations import CiphertextFormat
from xkiproxy.keystores import lifecycle
from xkiproxy.keystores.encryptions import Counts, EncryptionsError, read_encryptions
from xkiproxy.keystores.key_patterns import KeyPatterns
from xkiproxy.keystores.lifecycle import ManagedKey
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog
from xkiproxy.kmi.base import KeyInfo, KeyManager, KeyManagerError
from xkiproxy.kmi.registry import open_key_manager

app = typer.Typer(no_args_is_help=True, help="Make, list, disable, rotate and delete keys.")

KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="The external key ID.")]
KmiOption = Annotated[
    str | None,
    typer.Option("--kmi", metavar="NAME", help="The KMI, where several are configured."),
]


class UsageName(StrEnum):
    """What a key may be used for, as it is written on the command line."""

    ENCRYPT = "encrypt"
    DECRYPT = "decrypt"
    BOTH = "both"


_USAGES = {
    UsageName.ENCRYPT: Usage.ENCRYPT,
    UsageName.DECRYPT: Usage.DECRYPT,
    UsageName.BOTH: Usage.BOTH,
}
_USAGE_NAMES = {usage: name.value for name, usage in _USAGES.items()}


class _Manager:
    """A KMI's key manager, opened when it is first asked; see `xkiproxy.kmi.base.KeyManager`.

    What changes the catalog alone must not fail because the KMI, or its secret, is away. A failure
    is remembered: a login that was refused is not tried again.
    """

    def __init__(self, settings: KmiSettings) -> None:
        self._settings = settings
        self._manager: KeyManager | None = None
        self._failure: str | None = None

    def create(self, key_id: str, spec: KeySpec) -> KeyInfo:
        return self._opened().create(key_id, spec)

    def get(self, key_id: str) -> KeyInfo | None:
        return self._opened().get(key_id)

    def list(self) -> list[KeyInfo]:
        return self._opened().list()

    def rotate(self, key_id: str) -> KeyInfo:
        return self._opened().rotate(key_id)

    def destroy(self, key_id: str) -> None:
        self._opened().destroy(key_id)

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()

    def _opened(self) -> KeyManager:
        if self._failure is not None:
            raise KeyManagerError(self._failure)
        if self._manager is None:
            try:
                self._manager = open_key_manager(self._settings)
            except (KeyManagerError, SecretError) as error:
                self._failure = str(error)
                raise KeyManagerError(self._failure) from None
        return self._manager


@dataclass(frozen=True, slots=True)
class _Place:
    """Where keys are: what the functions of `lifecycle` start with."""

    catalog: SqliteCatalog
    manager: KeyManager
    kmi: str
    encryptions: Counts | None
    keystores: Sequence[KeystoreSettings]
    """Those that use the KMI."""


LabelOption = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="NAME=VALUE", help="For policies; may be repeated."),
]

_LABEL = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,62})=([ -~]{0,256})")


@app.command(epilog="Example: xkiproxy keys create payroll --spec AES_256 --usage both")
def create(
    key: KeyArgument,
    spec: Annotated[KeySpec, typer.Option(help="Type and size of the key.")] = KeySpec.AES_256,
    usage: Annotated[UsageName, typer.Option(help="What it may be used for.")] = UsageName.BOTH,
    label: LabelOption = None,
    kmi: KmiOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
    json: JsonOption = False,
) -> None:
    """Make a key at the KMI and enable it."""
    labels = _labels(label)
    with _open(load_config(config), kmi) as at:
        made = lifecycle.create_key(
            at.catalog, at.manager, at.kmi, key, spec, _USAGES[usage], labels
        )
        _print(made, at, json)


@app.command("list", epilog="Example: xkiproxy keys list --json")
def list_(
    kmi: KmiOption = None, config: ConfigOption = DEFAULT_CONFIG, json: JsonOption = False
) -> None:
    """List the keys that the KMI or the catalog has; UNREGISTERED ones are not used."""
    with _open(load_config(config), kmi) as at:
        keys = lifecycle.list_keys(at.catalog, at.manager, at.kmi)
    found = [_fields(key, at) for key in keys]
    if json:
        print_json(found)
        return
    columns = (
        "id", "kmi", "spec", "state", "version", "encryptions", "created", "usage",
        "deletion_time", "problem",
    )  # fmt: skip
    rows = [["" if fields.get(c) is None else fields[c] for c in columns] for fields in found]
    print_table([column.removesuffix("_time").upper() for column in columns], rows)


@app.command(epilog="Example: xkiproxy keys show payroll")
def show(
    key: KeyArgument,
    kmi: KmiOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
    json: JsonOption = False,
) -> None:
    """Show one key."""
    with _open(load_config(config), kmi) as at:
        _print(lifecycle.show_key(at.catalog, at.manager, at.kmi, key), at, json)


@app.command(epilog="Example: xkiproxy keys enable payroll")
def enable(
    key: KeyArgument,
    usage: Annotated[
        UsageName | None,
        typer.Option(help="What it may be used for; only for an UNREGISTERED key."),
    ] = None,
    label: LabelOption = None,
    kmi: KmiOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
    json: JsonOption = False,
) -> None:
    """Let a key be used; registers a key that only the KMI has."""
    wanted, labels = None if usage is None else _USAGES[usage], _labels(label)
    with _open(load_config(config), kmi) as at:
        enabled = lifecycle.enable_key(at.catalog, at.manager, at.kmi, key, wanted, labels)
        _print(enabled, at, json)


@app.command(epilog="Example: xkiproxy keys disable payroll")
def disable(
    key: KeyArgument,
    kmi: KmiOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
    json: JsonOption = False,
) -> None:
    """Stop the use of a key until it is enabled again; the KMI may be away meanwhile."""
    with _open(load_config(config), kmi) as at:
        _print(lifecycle.disable_key(at.catalog, at.manager, at.kmi, key), at, json)


@app.command(epilog="Example: xkiproxy keys forget payroll")
def forget(
    key: KeyArgument,
    kmi: KmiOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
    json: JsonOption = False,
) -> None:
    """Take a DISABLED key out of the catalog; the KMI is not asked, and its key stays as it is."""
    with _open(load_config(config), kmi) as at:
        entry = lifecycle.forget_key(at.catalog, at.kmi, key)
        usage = _USAGE_NAMES.get(entry.usage, "both")
        if json:
            print_json({"id": key, "kmi": at.kmi, "state": lifecycle.UNREGISTERED, "usage": usage})
            return
        out.print(
            f"Key {key} is not registered any more, and its labels are gone; KMI {at.kmi} has it as"
            f" before. To register it again: xkiproxy keys enable {key} --kmi {at.kmi}"
            f" --usage {usage}",
            markup=False,
        )


@app.command("usage", epilog="Example: xkiproxy keys usage payroll decrypt")
def usage_command(
    key: KeyArgument,
    usage: Annotated[UsageName, typer.Argument(help="What it may be used for from now on.")],
    kmi: KmiOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
    json: JsonOption = False,
) -> None:
    """Change what a registered key may be used for."""
    with _open(load_config(config), kmi) as at:
        _print(lifecycle.set_usage(at.catalog, at.manager, at.kmi, key, _USAGES[usage]), at, json)


@app.command("label", epilog="Example: xkiproxy keys label payroll environment=production")
def label_command(
    key: KeyArgument,
    labels: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Labels to set.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A label to take away.")
    ] = None,
    kmi: KmiOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
    json: JsonOption = False,
) -> None:
    """Set or remove labels, which the policies of a key store can ask for."""
    wanted = _labels(labels)
    if not wanted and not remove:
        raise typer.BadParameter("give labels to set, or --remove NAME")
    with _open(load_config(config), kmi) as at:
        beside = {name for store in at.keystores for name in store.kmi}
        labelled = lifecycle.label_key(
            at.catalog, at.manager, at.kmi, key, wanted, remove or (), beside=beside
        )
        _print(labelled, at, json)


@app.command(epilog="Example: xkiproxy keys rotate payroll")
def rotate(
    key: KeyArgument,
    kmi: KmiOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
    json: JsonOption = False,
) -> None:
    """Add a version, which encrypts from now on; the older ones go on decrypting."""
    settings = load_config(config)
    with _open(settings, kmi) as at:
        _refuse_raw(settings, at.kmi)
        _print(lifecycle.rotate_key(at.catalog, at.manager, at.kmi, key), at, json)


@app.command(
    epilog="Examples: xkiproxy keys delete payroll --days 30; to keep it after all: "
    "xkiproxy keys delete payroll --cancel"
)
def delete(
    key: KeyArgument,
    days: Annotated[
        int | None,
        typer.Option(
            min=lifecycle.MIN_DELETION_DAYS,
            max=lifecycle.MAX_DELETION_DAYS,
            help="Days until the key is destroyed.",
        ),
    ] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Keep the key, DISABLED.")] = False,
    kmi: KmiOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
    json: JsonOption = False,
) -> None:
    """Stop the use of a key now and destroy it, for good, some days later.

    It is destroyed when a running server has said for a day, in its log, that the date has come.
    With several proxies delete and cancel on every host: each has its own catalog.
    """
    if cancel == (days is not None):
        raise typer.BadParameter("give either --days or --cancel")
    with _open(load_config(config), kmi) as at:
        if days is None:
            result = lifecycle.cancel_deletion(at.catalog, at.manager, at.kmi, key)
        else:
            result = lifecycle.schedule_deletion(at.catalog, at.manager, at.kmi, key, days)
        _print(result, at, json)
    err.print("on every host, if there are several: each has its own catalog", markup=False)


def _labels(texts: list[str] | None) -> dict[str, str]:
    """The labels of the command line; raises BadParameter."""
    found = {}
    for text in texts or ():
        match = _LABEL.fullmatch(text)
        if match is None:
            raise typer.BadParameter(
                f"{text!r}: write NAME=VALUE; a name has up to 63 letters, digits, '.', '_' and"
                " '-', a value up to 256 printable ASCII characters",
                param_hint="label",
            )
        found[match[1]] = match[2]
    return found


@contextmanager
def _open(config: Config, kmi: str | None) -> Iterator[_Place]:
    settings = _find(config, kmi)
    manager = _Manager(settings)
    try:
        catalog = SqliteCatalog(config.catalog.path)
        try:
            stores = [store for store in config.keystore if settings.name in store.kmi]
            yield _Place(catalog, manager, settings.name, _counted(config), stores)
        finally:
            catalog.close()
    finally:
        manager.close()


def _counted(config: Config) -> Counts | None:
    """How often keys have encrypted; whoever disables a key is not to fail for want of it."""
    try:
        return read_encryptions(config.catalog.path)
    except EncryptionsError as error:
        err.print(f"warning: {error}", markup=False)
        return None


def _find(config: Config, name: str | None) -> KmiSettings:
    names = ", ".join(kmi.name for kmi in config.kmi)
    if name is None:
        if len(config.kmi) != 1:
            raise CommandError(f"several KMIs are configured: say which with --kmi, of: {names}")
        name = config.kmi[0].name
    try:
        return config.find_kmi(name)
    except KeyError:
        raise CommandError(f"there is no KMI {name!r}; there are: {names}") from None


def _refuse_raw(config: Config, kmi: str) -> None:
    """Raw ciphertexts name no version: a second one would make the key useless there."""
    for store in config.keystore:
        if kmi in store.kmi and store.ciphertext_format is CiphertextFormat.RAW:
            raise CommandError(
                f'key store {store.name} uses KMI {kmi} with ciphertext_format = "raw":'
                " its keys cannot be rotated; make a new key"
            )


def _print(key: ManagedKey, at: _Place, json: bool) -> None:
    fields = _fields(key, at)
    if key.version is None or "disabled_by" in fields:
        err.print(f"warning: key {key.key_id}: {fields['problem']}", markup=False)
    if json:
        print_json(fields)
    else:
        if key.labels:
            fields["labels"] = ", ".join(f"{name}={value}" for name, value in key.labels)
        print_fields({name: value for name, value in fields.items() if value is not None})


def _disabled_by(key: ManagedKey, at: _Place) -> list[str]:
    """The key stores whose configuration disables a key."""
    return [
        store.name
        for store in at.keystores
        if store.disabled_keys and KeyPatterns(store.disabled_keys).admit(key.key_id)
    ]


def _fields(key: ManagedKey, at: _Place) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "id": key.key_id,
        "kmi": key.kmi,
        "spec": key.spec,
        "state": key.state,
        "version": key.version,
        "encryptions": None,
        "created": _rfc3339(key.created),
        "usage": _USAGE_NAMES.get(key.usage, "none"),
    }
    if at.encryptions is not None and key.version is not None:
        fields["encryptions"] = at.encryptions.get((key.kmi, key.key_id, key.version), 0)
    if key.labels:
        fields["labels"] = dict(key.labels)
    if key.deletion_time is not None:
        fields["deletion_time"] = _rfc3339(key.deletion_time)
    problems = [key.problem] if key.problem else []
    if stores := _disabled_by(key, at):
        fields["disabled_by"] = stores
        problems.append(f"disabled_keys of key store {', '.join(stores)}")
    if problems:
        fields["problem"] = "; ".join(problems)
    return fields


def _rfc3339(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
