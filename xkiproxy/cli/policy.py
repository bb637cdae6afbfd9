"""`xkiproxy policy`: what the policies of a key store would say, before they say it."""

from __future__ import annotations

import time
from contextlib import closing
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

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
from xkiproxy.cli.credentials import KeystoreOption, pick_keystore
from xkiproxy.config import Config, load_config
from xkiproxy.config.models import KeystoreSettings
from xkiproxy.crypto.operations import no_such_key
from xkiproxy.keystores.authorization import KNOWN_ATTRIBUTES, SAID_ATTRIBUTES
from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.keystores.key_patterns import KeyPatterns
from xkiproxy.keystores.policies import AccessRequest, load_policies, schema_text
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog

app = typer.Typer(
    name="policy",
    no_args_is_help=True,
    help="Check and try out the policies of key stores. Example: xkiproxy policy check",
)


class Action(StrEnum):
    """What can be asked of a key store."""

    ENCRYPT = "encrypt"
    DECRYPT = "decrypt"
    RANDOM = "random"
    META = "meta"


class Expectation(StrEnum):
    """What a test expects."""

    ALLOW = "allow"
    DENY = "deny"


@app.command("check")
def check_command(
    folder: Annotated[
        Path | None,
        typer.Argument(help="A folder of policies; default: all that the configuration names."),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Check policies against the schema, and list them.

    Examples: xkiproxy policy check; before they are put in place: xkiproxy policy check new/
    """
    named = {"": folder} if folder is not None else _configured(load_config(config))
    listed = [
        {"keystore": name, "policy": found.name, "file": found.file, "line": found.line}
        for name, place in named.items()
        for found in load_policies(place).statements
    ]
    if as_json:
        print_json(listed)
    else:
        print_table(
            ("KEY STORE", "POLICY", "FILE", "LINE"), [tuple(row.values()) for row in listed]
        )


@app.command("schema")
def schema_command() -> None:
    """Print the schema, for editors and for reading.

    Example: xkiproxy policy schema > xkiproxy.cedarschema
    """
    typer.echo(schema_text(), nl=False)


@app.command("test")
def try_command(
    action: Annotated[Action, typer.Argument(help="What is asked.")],
    key: Annotated[str, typer.Option(help="The external key ID.", metavar="KEY")] = "",
    principal: Annotated[str, typer.Option(help="Who asks the cloud.", metavar="ARN")] = "",
    source: Annotated[
        str, typer.Option(help="The address of the client.", metavar="IP")
    ] = "127.0.0.1",
    at: Annotated[
        str | None, typer.Option("--time", help="When; default: now.", metavar="RFC3339")
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option(help="What the cloud says; may be repeated.", metavar="NAME=VALUE"),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="Instead of the labels that the key has.", metavar="NAME=VALUE"),
    ] = None,
    expect: Annotated[
        Expectation | None, typer.Option(help="Exit with 1 if it comes out otherwise.")
    ] = None,
    keystore: KeystoreOption = "",
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Say whether a request would be permitted, and which policies decide.

    A key that is none of the `keys` of its key store is denied before any policy is asked.

    Example: xkiproxy policy test decrypt --key payroll --principal acs:ram::1:role/payroll
    --context source_vpc=vpc-1
    """
    settings = load_config(config)
    store = pick_keystore(settings, keystore)
    if (action is Action.RANDOM) == bool(key):
        raise typer.BadParameter("needed for all but random", param_hint="--key")
    request = _request(settings, store, action, key, principal, label)
    request.context.update(
        {**_context(action, context or []), "source": source, "time": _seconds(at)}
    )
    allowed, reason = _decide(store, key, request)
    said = "allow" if allowed else "deny"
    fields = {"decision": said, "reason": reason}
    if as_json:
        print_json(fields)
    else:
        print_fields(fields)
    if expect is not None and expect != said:
        raise typer.Exit(1)


def _decide(store: KeystoreSettings, key: str, request: AccessRequest) -> tuple[bool, str]:
    """Whether the server would permit it, and why: no policy is asked of a key of others."""
    if key and store.keys is not None and not KeyPatterns(store.keys).admit(key):
        err.print(
            f"key {key} is none of the keys of key store {store.name}: it is answered as one that"
            " does not exist", markup=False,
        )  # fmt: skip
        return False, no_such_key().message
    if store.policies is None:
        raise CommandError(f"key store {store.name} has no policies: all may do everything")
    policies = load_policies(store.policies)
    try:
        verdict = policies.evaluate(request)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--source") from None
    return verdict.allowed, verdict.reason


def _configured(config: Config) -> dict[str, Path]:
    """The folders of policies, by key store."""
    found = {store.name: store.policies for store in config.keystore if store.policies is not None}
    if not found:
        raise CommandError("no key store has policies (keystore.policies): all that is signed may")
    return found


def _request(
    config: Config,
    store: KeystoreSettings,
    action: Action,
    key: str,
    principal: str,
    labels: list[str] | None,
) -> AccessRequest:
    if not key:
        return AccessRequest(principal, action, store.name)
    entry = _entry(config, store, key)
    kmi = entry.kmi if entry else store.kmi[0]
    own = entry.labels if entry else ()
    given = tuple(_pairs(labels, "--label").items()) if labels is not None else own
    return AccessRequest(principal, action, store.name, key, kmi, given)


def _entry(config: Config, store: KeystoreSettings, key: str) -> CatalogEntry | None:
    with closing(SqliteCatalog(config.catalog.path)) as catalog:
        found = (catalog.get(kmi, key) for kmi in store.kmi)
        return next((entry for entry in found if entry is not None), None)


def _context(action: Action, texts: list[str]) -> dict[str, Any]:
    """The context of the schema: what is not given is absent, or as it mostly is."""
    is_crypto = action in {Action.ENCRYPT, Action.DECRYPT}
    mostly = {"mode": "GCM", "client_iv": False} if is_crypto else {}
    given: dict[str, Any] = dict(_pairs(texts, "--context"))
    known = SAID_ATTRIBUTES | (KNOWN_ATTRIBUTES - {"source", "time"} if is_crypto else set())
    for name in given.keys() - known:
        raise typer.BadParameter(
            f"{name!r}: for {action} there are: {', '.join(sorted(known))}", param_hint="--context"
        )
    if "client_iv" in given:
        given["client_iv"] = given["client_iv"] == "true"
    return {"access_key_id": "", **mostly, **given}


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts or ()]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise typer.BadParameter("write NAME=VALUE", param_hint=option)
    return {name: value for name, _, value in pairs}


def _seconds(text: str | None) -> int:
    if text is None:
        return int(time.time())
    try:
        return int(datetime.fromisoformat(text).timestamp())
    except ValueError:
        raise typer.BadParameter("write 2026-11-23T12:00:00Z", param_hint="--time") from None
