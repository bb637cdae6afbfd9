"""`xkiproxy credentials`: the access keys with which a cloud signs its requests."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from xkiproxy.cli.common import (
    DEFAULT_CONFIG,
    CommandError,
    ConfigOption,
    JsonOption,
    err,
    print_fields,
    print_json,
    print_table,
)
from xkiproxy.config import Config, load_config
from xkiproxy.config.models import KeystoreSettings
from xkiproxy.config.secrets import SecretSource
from xkiproxy.keystores.credentials import Credential, load_credentials
from xkiproxy.keystores.credentials_file import changing_credentials
from xkiproxy.keystores.last_use import last_use_path, read_last_use
from xkiproxy.protocols.registry import CONSOLES

KeystoreOption = Annotated[
    str, typer.Option("--keystore", help="The key store; default: the only one.", metavar="NAME")
]

app = typer.Typer(
    name="credentials",
    no_args_is_help=True,
    help="Add, list and revoke the credentials of a key store. Example: xkiproxy credentials list",
)


def new_credential(protocol: str) -> Credential:
    """A new credential of the form that a protocol demands, from the system's generator."""
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Credential(*CONSOLES[protocol].new_credential(), created)


def check_protocol(name: str) -> None:
    """Raise BadParameter for `--protocol` if there is no protocol of this name."""
    if name not in CONSOLES:
        raise typer.BadParameter(f"known are: {', '.join(CONSOLES)}", param_hint="--protocol")


def pick_keystore(config: Config, name: str) -> KeystoreSettings:
    """The key store of this name, or the only one if the name is empty; raises CommandError."""
    names = ", ".join(store.name for store in config.keystore)
    if not name:
        if len(config.keystore) == 1:
            return config.keystore[0]
        raise CommandError(f"there are several key stores; choose one with --keystore: {names}")
    for store in config.keystore:
        if store.name == name:
            return store
    raise CommandError(f"there is no key store {name!r}; there are: {names}")


def credentials_source(store: KeystoreSettings) -> SecretSource:
    """Where the credentials of a key store are; raises CommandError if it has none."""
    if store.credentials is None:
        raise CommandError(
            f"key store {store.name} has no credentials: over {store.protocol} the cloud proves"
            f" itself by its own tokens. See: xkiproxy kms-config --keystore {store.name}"
        )
    return store.credentials


@app.command("add")
def add_command(
    keystore: KeystoreOption = "",
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Make a credential and print it: this is the only time that its secret is shown.

    Example: xkiproxy credentials add --keystore demo
    """
    store = pick_keystore(load_config(config), keystore)
    file = _file(store)
    credential = new_credential(store.protocol)
    with changing_credentials(file) as credentials:
        credentials.append(credential)
    fields = {
        "keystore": store.name,
        "access_key_id": credential.access_key_id,
        "access_key_secret": credential.access_key_secret,
        "created": credential.created,
    }
    if as_json:
        print_json(fields)
    else:
        print_fields(fields)
    _print_when()


@app.command("list")
def list_command(
    keystore: KeystoreOption = "",
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """List the credentials, without their secrets, with their last use as a server saw it.

    A running server writes that down once a minute.

    Example: xkiproxy credentials list --json
    """
    settings = load_config(config)
    store = pick_keystore(settings, keystore)
    credentials = load_credentials(credentials_source(store))
    used = read_last_use(last_use_path(settings.catalog.path)).get(store.name, {})
    rows = [(c.access_key_id, c.created, _time(used.get(c.access_key_id))) for c in credentials]
    if as_json:
        names = ("access_key_id", "created", "last_used")
        print_json([dict(zip(names, row, strict=True)) for row in rows])
    else:
        shown = [(name, created, last or "not seen") for name, created, last in rows]
        print_table(("ACCESS KEY ID", "CREATED", "LAST USED"), shown)


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@app.command("revoke")
def revoke_command(
    access_key_id: Annotated[str, typer.Argument(help="The ID to revoke.", metavar="ID")],
    keystore: KeystoreOption = "",
    force: Annotated[
        bool, typer.Option("--force", help="Revoke even the last: all requests are then refused.")
    ] = False,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Remove a credential.

    Example: xkiproxy credentials revoke XKIABCDEFGHIJKLMNOPQRSTU
    """
    store = pick_keystore(load_config(config), keystore)
    with changing_credentials(_file(store)) as credentials:
        kept = [c for c in credentials if c.access_key_id != access_key_id]
        if len(kept) == len(credentials):
            raise CommandError(f"key store {store.name} has no credential {access_key_id}")
        if not kept and not force:
            raise CommandError(
                f"{access_key_id} is the last credential of key store {store.name}: without it"
                " every request is refused. Add another first, or use --force"
            )
        credentials[:] = kept
    if as_json:
        print_json({"keystore": store.name, "access_key_id": access_key_id, "revoked": True})
    else:
        print_fields({"keystore": store.name, "revoked": access_key_id})
    _print_when()


def _file(store: KeystoreSettings) -> Path:
    source = credentials_source(store)
    if source.file is None:
        raise CommandError(
            f"the credentials of key store {store.name} come from {source}:"
            " change them where that is set; this command changes files only"
        )
    return source.file


def _print_when() -> None:
    err.print("A running server takes this change with: xkiproxy reload")
